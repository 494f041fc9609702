"""Combinators rewrite a method's formulas: what comes of it, what goes together, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

import peltc
from peltc.spec.combinators import COMBINATORS
from peltc.spec.combinators.combinator import groups
from peltc.spec.interpreters.check import check_formulas
from peltc.spec.method import Method, shipped

PLACES = {"linear": "attention.query", "block": "feed_forward.block", "attention": "attention", "norm": "*norm",
          "embedding": "embedding.word"}  # fmt: skip


def combined(method: str, **said: Any) -> Method:
    spec = peltc.load_spec({"pelt": 1, "attach": [{"method": method, "at": PLACES[shipped()[method].site], **said}]})
    check_formulas(spec)
    return spec.attach[0].method


def formulas(method: Method) -> dict[str, str]:
    return {name: expr.text for name, expr in (*method.let, *method.effects)}


@pytest.mark.parametrize("name", list(shipped()))
@pytest.mark.parametrize("combinator", list(COMBINATORS))
def test_every_method_goes_or_is_refused_with_a_reason(name: str, combinator: str) -> None:
    """No pair is left to chance: shapes fit, or the spec is refused where it says the combinator."""
    try:
        method = combined(name, **{combinator: True})
    except peltc.PeltError as error:
        (found,) = error.diagnostics
        assert found.code == "E211"
        assert f"`{combinator}:` does not go with '{name}': " in found.message
        assert found.place.key == f"attach[0].{combinator}"
    else:
        assert method.parameters != shipped()[name].parameters or method.effects != shipped()[name].effects


def test_false_is_as_if_nothing_were_said() -> None:
    assert combined("lora", gate=False) == combined("lora")


class TestGate:
    def test_stands_in_place_of_the_scale(self) -> None:
        assert formulas(combined("lora", gate=True))["delta"] == "gate * (update + B_bias if bias else update)"
        kept = formulas(combined("lora", gate={"replaces_scale": False}))["delta"]
        assert kept.startswith("gate * ((alpha / ")

    def test_reads_what_the_module_reads(self) -> None:
        for method, value in {"lora": "x", "prefix": "x", "bottleneck": "z", "tiny_attention": "z"}.items():
            assert formulas(combined(method, gate=True))["gate"] == (
                f"mean_seq(sigmoid(linear({value}, gate_weight, gate_bias)))"
            )

    def test_leaves_padding_out_where_told(self) -> None:
        assert formulas(combined("lora", gate={"mask_padding": True}))["gate"].endswith(", mask)")

    def test_scales_a_change_or_a_result(self) -> None:
        change = combined("ia3", gate=True)
        assert "y + gate * (" in str(change.effect("output")) or change.effect("output")
        result = combined("ia3", gate={"scales": "result"})
        assert change.effects != result.effects

    def test_leaves_alone_what_changes_nothing(self) -> None:
        """A definition that is the value itself stays so, or it would no longer be left out of the graph."""
        output = combined("ia3", gate=True, position="input").effect("output")
        assert output is not None
        assert output.other.id == "y"  # type: ignore[union-attr]

    @pytest.mark.parametrize(("method", "reads"), [("lora", "r"), ("prefix", "y"), ("norm_tuning", "h")])
    def test_cannot_read_what_the_site_does_not_have(self, method: str, reads: str) -> None:
        with pytest.raises(peltc.PeltError, match="E211"):
            combined(method, gate={"reads": reads})

    def test_an_option_that_it_makes_meaningless(self) -> None:
        with pytest.raises(peltc.PeltError, match="takes the place of 'alpha', which is given too"):
            combined("lora", alpha=4, gate=True)
        combined("lora", alpha=4, gate={"replaces_scale": False})


class TestGroups:
    @pytest.mark.parametrize(
        ("method", "expected"),
        [
            ("lora", {"A": "A", "B": "B"}),
            ("bottleneck", {"down": "down", "down_bias": "down", "up": "up", "up_bias": "up"}),
            ("compacter", {"rule": "rule", "down_l": "down_l", "down_r": "down_l", "down_bias": "down_l",
                           "up_l": "up_l", "up_r": "up_l", "up_bias": "up_l"}),
            ("ia3", {"l": "l"}),
        ],
    )  # fmt: skip
    def test_a_map_and_its_bias(self, method: str, expected: dict[str, str]) -> None:
        found = groups(shipped()[method].chosen(shipped()[method].defaults))
        assert found == expected


class TestExperts:
    def test_a_stack_for_each_parameter_that_is_not_shared(self) -> None:
        method = combined("bottleneck", experts={"count": 3, "share": "up_bias"})
        assert {p.name for p in method.parameters} == {"down_experts", "down_bias_experts", "up", "up_bias"}
        found = formulas(method)
        assert (found["down"], found["down_bias"]) == ("choose(down_experts, 0)", "choose(down_bias_experts, 0)")

    def test_what_is_frozen_is_no_expert(self) -> None:
        assert {"A", "B"} <= {p.name for p in combined("vera", experts=True).parameters}

    @pytest.mark.parametrize("share", ["C", "up"])
    def test_refused(self, share: str) -> None:
        with pytest.raises(peltc.PeltError, match="to share"):
            combined("lora", experts={"share": share})


class TestBank:
    def test_a_mask_for_each_map(self) -> None:
        method = combined("bottleneck", bank={"size": 9, "k": 4}, inner_norm="affine")
        names = [p.name for p in method.parameters]
        assert [n for n in names if n.startswith("mask_")] == ["mask_down", "mask_up"]
        assert {"inner_gain", "inner_bias"} <= set(names), "a norm is the profile's own"
        assert all(p.frozen and p.source for p in method.parameters if p.name.endswith("_bank"))
        assert formulas(method)["weights_down"] == "top_k_mask(mask_down, 4) / 4"

    def test_the_normaliser_is_said(self) -> None:
        found = formulas(combined("bottleneck", bank={"size": 9, "k": 4, "normalise": "sum"}))
        assert found["weights_up"] == "top_k_mask(mask_up, 4)"

    def test_masks_exist_where_what_they_mix_does(self) -> None:
        """With one value per layer both forms are there, and a layer has the masks of its own."""
        method = combined("prefix", reparameterise=[True, False], bank={"size": 3, "k": 1})
        conditions = {p.name: p.condition.text if p.condition else "" for p in method.parameters}
        assert conditions["mask_K"] == conditions["K_bank"] == "not reparameterise"
        assert conditions["mask_down"] == conditions["down_bank"] == "reparameterise"

    @pytest.mark.parametrize(("method", "reason"), [("ia3", "so would all modules"), ("dora", "cannot know")])
    def test_a_random_bank_of_equal_modules(self, method: str, reason: str) -> None:
        with pytest.raises(peltc.PeltError, match=reason):
            combined(method, bank=True)
        combined(method, bank={"file": "bank.safetensors"})

    def test_a_random_bank_of_vectors_is_not_of_zeros(self) -> None:
        inits = {p.name: p.init.text for p in combined("bitfit", bank=True).parameters}
        assert [text for name, text in inits.items() if name.endswith("_bank")] == ["normal(0.02)"]

    def test_a_mask_cannot_choose_more_than_there_are(self) -> None:
        with pytest.raises(peltc.PeltError, match="cannot choose 10 of 9"):
            combined("bottleneck", bank={"size": 9, "k": 10})

    @pytest.mark.parametrize("other", ["generate", "prototype"])
    def test_one_source_of_parameters(self, other: str) -> None:
        with pytest.raises(peltc.PeltError, match=f"`bank:` and `{other}:` do not go together"):
            combined("bottleneck", bank=True, **{other: True})


def test_all_that_go_together_at_once() -> None:
    found = formulas(combined("bottleneck", experts=True, bank={"size": 5, "k": 2}, gate=True))
    assert found["down"] == "choose(down_experts, 0)"
    assert found["down_experts"] == "einsum('n,nabc->abc', weights_down_experts, down_experts_bank)"
    assert found["delta"].startswith("gate * ")


def test_a_name_that_is_taken(tmp_path: Any) -> None:
    own = {"title": "t", "source": "s", "site": "linear", "delta": "gate_bias * y",
           "parameters": {"gate_bias": {"shape": ["out"], "init": "zeros"}}}  # fmt: skip
    with pytest.raises(peltc.PeltError, match="has a 'gate_bias' of its own"):
        peltc.load_spec({"pelt": 1, "methods": {"mine": own},
                         "attach": [{"method": "mine", "at": "attention.query", "gate": True}]})  # fmt: skip
