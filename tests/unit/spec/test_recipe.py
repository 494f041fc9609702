"""Recipes: attachments under one name, and where their findings are told."""

from __future__ import annotations

from typing import Any

import pytest

import peltc
from peltc.spec.interpreters.check import check_formulas
from peltc.spec.recipe import recipes


def load(*entries: dict[str, Any]) -> peltc.Spec:
    return peltc.load_spec({"pelt": 1, "attach": list(entries)})


@pytest.mark.parametrize("name", list(recipes()))
def test_shipped_recipe(name: str) -> None:
    recipe = recipes()[name]
    assert "arXiv:" in recipe.source, "a paper"
    assert all(option.doc for option in recipe.options)
    check_formulas(load({"recipe": name}))


@pytest.mark.parametrize("name", list(recipes()))
def test_every_option_matters(name: str) -> None:
    """Each option, given another value, makes another spec; none is left over in the file."""
    other = {True: False, False: True, "": "x", "none": "plain", "relu": "gelu", "gelu": "silu", "silu": "relu",
             "hard": "soft", "mean": "sum", "normed": "raw", "up": "down", "B": "A", "layer": "site", "x": "residual",
             "embedding": "embedding.word", "prompt": "text"}  # fmt: skip
    before = [a.entry() for a in load({"recipe": name}).attach]
    for option in recipes()[name].options:
        default = option.default
        if type(default) in (int, float):
            value: Any = default / 2 if isinstance(default, float) else default + 1
        else:
            value = other[default]
        more = {"gates": False} if option.name == "alpha" and name == "unipelt" else {}
        if option.name == "task":
            more = {"tasks": 3}
        if option.name == "k":
            more = {"n": 200}
        plain = [a.entry() for a in load({"recipe": name, **more}).attach] if more else before
        changed = [a.entry() for a in load({"recipe": name, **more, option.name: value}).attach]
        assert changed != plain, f"{option.name}: {value}"


def test_what_may_be_said_about_all_attachments() -> None:
    spec = load({"recipe": "unipelt", "name": "mine", "layers": "first 2", "mode": "static"})
    assert [a.name for a in spec.attach] == ["mine_lora", "mine_prefix", "mine_bottleneck"]
    assert {(a.layers, a.mode, a.recipe) for a in spec.attach} == {("first 2", "static", "unipelt")}


def test_a_name_keeps_networks_apart() -> None:
    spec = load({"recipe": "hyperpelt"}, {"recipe": "hyperpelt", "name": "other"})
    networks = {a.name: a.combined["generate"]["network"] for a in spec.attach if a.combined}
    assert networks == {"adapter": "hyper", "prefix": "hyper", "other_adapter": "other_hyper",
                        "other_prefix": "other_hyper"}  # fmt: skip
    spec = load({"recipe": "unipelt_central"}, {"recipe": "unipelt_central", "name": "other"})
    assert [a.combined["gate"]["central"] for a in spec.attach] == ["central", "central", "",
                                                                    "other_central", "other_central", ""]  # fmt: skip


def test_parts_go() -> None:
    spec = load({"recipe": "unipelt", "lora": False, "gates": False})
    assert [(a.name, dict(a.combined)) for a in spec.attach] == [("prefix", {}), ("bottleneck", {})]


def test_two_of_a_kind_need_names() -> None:
    with pytest.raises(peltc.PeltError, match="two attachments are called 'bottleneck'"):
        load({"recipe": "pfeiffer"}, {"recipe": "adamix"})
    load({"recipe": "pfeiffer"}, {"recipe": "adamix", "name": "mixture"})


@pytest.mark.parametrize(
    ("entry", "message", "key"),
    [
        ({"recipe": "unipelt", "rank": 3}, "unknown key 'rank'", "attach[0].rank"),
        ({"recipe": "unipelt", "r": 0}, "out of range", "attach[0].r"),
        ({"recipe": "unipelt", "at": "attention.query"}, "unknown key 'at'", "attach[0].at"),
        ({"recipe": "unipeltt"}, "unknown value 'unipeltt'", "attach[0].recipe"),
        ({"recipe": "xpeft", "k": 101}, "cannot choose 101 of 100", "attach[0]"),
        ({"recipe": "unipelt", "method": "lora"}, "stand together", "attach[0]"),
        ({"layers": "all"}, "'method' or 'recipe' is missing", "attach[0]"),
    ],
)
def test_findings_stand_where_the_user_wrote(entry: dict[str, Any], message: str, key: str) -> None:
    with pytest.raises(peltc.PeltError) as caught:
        load(entry)
    assert (message, key) in [
        (message if message in found.message else found.message, found.place.key) for found in caught.value.diagnostics
    ]


def test_an_expanded_entry_is_the_same_spec() -> None:
    """What `entry` says about an attachment makes the same attachment again."""
    for name in recipes():
        first = load({"recipe": name})
        again = load(*(a.entry() for a in first.attach))
        assert [(a.name, a.method, a.options, a.combined) for a in again.attach] == [
            (a.name, a.method, a.options, a.combined) for a in first.attach
        ]
