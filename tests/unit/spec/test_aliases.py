"""Hints for what other libraries call things."""

from __future__ import annotations

import pytest

from peltc.spec.aliases import ALIASES, SENTENCES, ours
from peltc.spec.combinators import COMBINATORS
from peltc.spec.diagnostics import nearest
from peltc.spec.method import shipped
from peltc.spec.modes import PROVIDERS
from peltc.spec.recipe import recipes
from peltc.spec.schema import COMMON_KEYS, MODES, PRECISIONS, spec_schema

ROLES = {"attention", "feed_forward", "head", "embedding", "embedding.word", "norm"}


def test_every_alias_leads_to_a_word_of_the_language() -> None:
    schema = spec_schema(shipped())["properties"]
    known = {*schema, *schema["model"]["properties"], *schema["deploy"]["properties"], "method", *ROLES}
    known |= {*shipped(), *recipes(), *COMBINATORS, *COMMON_KEYS, *MODES, *PRECISIONS, *PROVIDERS}
    for one in (*shipped().values(), *recipes().values(), *COMBINATORS.values()):
        known |= {option.name for option in one.options}
    assert {name for names in ALIASES.values() for name in names} - known == set()
    assert [word for word, names in ALIASES.items() if word in names] == []


@pytest.mark.parametrize(
    ("word", "known", "own"),
    [("rank", ["bank", "r"], "r"), ("rank", ["bank"], ""), ("Prefix-Tuning", ["prefix"], "prefix"),
     ("(IA)3", ["ia3"], ""), ("UniPELT", ["unipelt"], "unipelt"), ("share", ["generate"], "generate")],
)  # fmt: skip
def test_ours(word: str, known: list[str], own: str) -> None:
    assert ours(word, known) == own


def test_words_that_no_word_of_ours_stands_for() -> None:
    """The hint is a sentence, whatever is known at the place."""
    assert nearest("modules_to_save", ["method", "at"]).startswith("attach `method: replace` there")
    assert nearest("all-linear", ["attention.query"]).startswith("`at: '*'` is every linear map")
    assert {*SENTENCES} & {*ALIASES} == set()


def test_the_nearest_word_where_nobody_else_has_one() -> None:
    assert nearest("metod", ["method", "recipe"]) == "did you mean 'method'?"
