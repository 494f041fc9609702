"""Recipes that a spec brings itself: expanded as shipped ones are, and checked where they are written."""

from __future__ import annotations

from typing import Any

import pytest

from peltc.spec.diagnostics import PeltError
from peltc.spec.document import parse
from peltc.spec.specification import build_spec

SPEC = """\
pelt: 1
recipes:
  ours:
    options: {r: {type: integer, default: 4}, wide: {type: boolean, default: true}}
    attach:
      - FIRST
      - {if: wide, method: bottleneck, at: feed_forward.block, reduction: 8}
attach:
  - {recipe: ours}
"""
LORA = "{method: lora, at: attention.query, r: '{r}'}"


def spec(first: str = LORA, **changes: str) -> Any:
    text = SPEC.replace("FIRST", first)
    for before, after in changes.items():
        text = text.replace(before.replace("_", " "), after)
    return build_spec(parse(text, "<spec>"))


def test_is_expanded_with_the_options_given() -> None:
    made = spec(**{"{recipe:_ours}": "{recipe: ours, r: 16, wide: false, name: two}"})
    assert [(a.name, a.method.name, a.options["r"], a.recipe) for a in made.attach] == [
        ("two_lora", "lora", 16, "ours")
    ]
    assert [a.name for a in spec().attach] == ["lora", "bottleneck"]


@pytest.mark.parametrize(
    ("first", "code", "key"),
    [
        ("{method: lora, at: attention.query, r: '{rank}'}", "E305", "recipes.ours.attach[0].r"),
        ("{method: lora, at: attention.query, rank: '{r}'}", "E110", "recipes.ours.attach[0].rank"),
        ("{method: lorra, at: attention.query}", "E113", "recipes.ours.attach[0].method"),
        ("{method: lora, r: 2}", "E111", "recipes.ours.attach[0]"),
        ("{method: lora, at: attention.query, gate: {reeds: x}}", "E110", "recipes.ours.attach[0].gate.reeds"),
        ("{method: lora, at: attention.query, if: narrow}", "E305", "recipes.ours.attach[0].if"),
        ("{method: lora, at: attention.query, if: 'r +'}", "E301", "recipes.ours.attach[0].if"),
        ("{at: attention.query}", "E111", "recipes.ours.attach[0]"),
    ],
)
def test_what_is_wrong_is_told_where_it_is_written(first: str, code: str, key: str) -> None:
    with pytest.raises(PeltError) as caught:
        spec(first)
    found = caught.value.diagnostics[0]
    assert (found.code, found.place.key) == (code, key)
    assert found.place.line == 6


@pytest.mark.parametrize(
    ("changes", "code", "key"),
    [
        ({"{recipe:_ours}": "{recipe: ours, r: zero}"}, "E112", "attach[0].r"),
        ({"{recipe:_ours}": "{recipe: ours, rank: 2}"}, "E110", "attach[0].rank"),
        ({"{recipe:_ours}": "{recipe: ours, r: 0}"}, "E114", "attach[0].r"),
        ({"ours": "unipelt"}, "E201", "recipes.unipelt"),
        ({"default:_4}": "default: four}"}, "E112", "recipes.ours.options.r.default"),
    ],
)
def test_what_an_entry_gives_is_told_at_the_entry(changes: dict[str, str], code: str, key: str) -> None:
    with pytest.raises(PeltError) as caught:
        spec(**changes)
    assert (caught.value.diagnostics[0].code, caught.value.diagnostics[0].place.key) == (code, key)
