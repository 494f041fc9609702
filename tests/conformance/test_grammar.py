"""Specs drawn from the grammar mean one thing: what they say, evaluated by Python itself on plain torch models, is what
`attach` trains, what folding leaves and what the graph computes; or the plan refuses them.

A failure shrinks to a small spec. 200 are drawn in every run, 2,000 in sweeps, and those reach every function of the
language; the summary tells how many were refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grammar
import naive
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from meaning import FAMILIES, disagreements

from peltc.spec.formula.functions import FUNCTIONS


def drawn(
    family: str, folder: Path, count: int, figures: Callable[[str, float], None]
) -> tuple[Counter[str], set[str]]:
    """Draw specs, and hold everybody's results against their meaning; how many were equal or refused, and the functions
    that the former call."""
    told: Counter[str] = Counter()
    reached: set[str] = set()

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False,
    )  # fmt: skip
    @given(st.data())
    def each(data: Any) -> None:
        content = grammar.spec(lambda choices: data.draw(st.sampled_from(list(choices))))
        what, share, names = disagreements(content, family, folder)
        told[what] += 1
        reached.update(names)
        figures(f"drawn specs, {what}, of the limit", share)

    each()
    return told, reached


CONSTANT = {"floor_divide", "modulo", "not_equal", "less", "less_equal", "greater_equal", "and", "or", "not", "min",
            "max", "floor", "length", "equal", "greater"}  # fmt: skip
"""Functions of options and sizes alone, which have one meaning for all interpreters."""


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_specs_mean_one_thing(family: str, shared: Path, figures: Callable[[str, float], None]) -> None:
    told, _ = drawn(family, shared / "models", 67, figures)
    assert told["equal"] > told["refused"] / 2


@pytest.mark.slow
def test_many_drawn_specs_mean_one_thing(shared: Path, figures: Callable[[str, float], None]) -> None:
    found = [drawn(family, shared / "models", 667, figures) for family in FAMILIES]
    assert sorted(set(FUNCTIONS) - CONSTANT - set().union(*(reached for _, reached in found))) == []


def test_a_wrong_module_is_found(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: with one function of the language that means something else."""
    monkeypatch.setitem(naive.FUNCTIONS, "linear", lambda x, weight, bias=None: 1.001 * x @ weight.T)
    content = {"pelt": 1, "name": "one", "attach": [{"method": "lora", "at": "attention.query", "r": 2}]}
    with pytest.raises(AssertionError, match="torch is off by"):
        disagreements(content, "bert", shared / "models")
