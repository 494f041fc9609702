"""Gates: one number per sample, which padding moves or does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import answer, batch

SMALL = {"recipe": "unipelt", "r": 2, "length": 2, "hidden": 4, "reduction": 8}
MASKED = {**SMALL, "mask_padding": True}
EXACT = 1e-6
GATED = {"method": "lora", "at": "attention.query", "r": 2, "gate": {}}


def longer(inputs: dict[str, torch.Tensor], more: int) -> dict[str, torch.Tensor]:
    """The same texts with more padding."""
    return {name: F.pad(tensor, (0, more)) for name, tensor in inputs.items()}


def rows(inputs: dict[str, torch.Tensor], part: slice) -> dict[str, torch.Tensor]:
    return {name: tensor[part] for name, tensor in inputs.items()}


@pytest.mark.parametrize("entry", [SMALL, MASKED], ids=["plain", "masked"])
def test_splitting_a_batch_changes_nothing(entry: Any, attached: Any, inputs: Any) -> None:
    model = attached(entry)
    whole = answer(model, inputs)
    split = torch.cat([answer(model, rows(inputs, slice(i, i + 1))) for i in range(3)])
    assert (split - whole).abs().max() <= EXACT * whole.abs().max()


def test_padding_moves_a_gate(attached: Any, inputs: Any) -> None:
    """As in the authors' code, whose weights are trained at 128 tokens."""
    model = attached(SMALL)
    before, after = answer(model, inputs), answer(model, longer(inputs, 9))
    assert ((before - after).abs().amax(1) > 1e-3).all()


def test_padding_does_not_move_a_gate_that_leaves_it_out(attached: Any, inputs: Any) -> None:
    model = attached(MASKED)
    before, after = answer(model, inputs), answer(model, longer(inputs, 9))
    assert (before - after).abs().max() <= EXACT * before.abs().max()


def test_without_padding_both_gates_are_one(attached: Any) -> None:
    whole = batch(padding=0)
    plain, masked = answer(attached(SMALL), whole), answer(attached(MASKED), whole)
    assert (plain - masked).abs().max() <= EXACT * plain.abs().max()


def change(model: Any, inputs: Any) -> torch.Tensor:
    """What a module adds to the first layer's query, [B, S, d]."""
    seen: list[torch.Tensor] = []
    query = model.bert.encoder.layer[0].attention.self.query
    handle = query.register_forward_hook(lambda m, args, y: seen.append(y - F.linear(args[0], m.weight, m.bias)))
    answer(model, inputs)
    handle.remove()
    return seen[0]


def only(model: Any, *roles: str, value: float) -> Any:
    """The model with the parameters of these names set."""
    with torch.no_grad():
        for name, parameter in model.pelt.named_parameters():
            if name.endswith(roles):
                parameter.fill_(value)
    return model


def test_a_gate_starts_at_one_half(attached: Any, inputs: Any) -> None:
    """Its map starts at N(0, 0.02) and its bias at zero: one half, and nothing of alpha / r."""
    model = attached(GATED, std=0.0)
    with torch.no_grad():
        for name, parameter in model.pelt.named_parameters():
            if name.endswith("/B"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    x = answered_input(model, inputs)
    a, b = (model.pelt.parameter(f"lora.encoder.layers.0.attention.query.{n}") for n in "AB")
    ungated = F.linear(F.linear(x, a), b)
    ratio = (change(model, inputs) * ungated).sum((1, 2)) / ungated.square().sum((1, 2))
    assert ((ratio - 0.5).abs() < 0.1).all() and len(ratio.unique()) == 3
    exact = change(only(model, "gate_weight", "gate_bias", value=0.0), inputs)
    assert (exact - 0.5 * ungated).abs().max() <= EXACT * ungated.abs().max()


def answered_input(model: Any, inputs: Any) -> torch.Tensor:
    """What the first layer reads."""
    with torch.no_grad():
        hidden: torch.Tensor = model.bert.embeddings(inputs["input_ids"])
    return hidden


def test_a_gate_is_one_number_for_a_sample(attached: Any, inputs: Any) -> None:
    """Sigmoid first, then the mean over the sequence, padding included."""
    model = attached(GATED)
    x = answered_input(model, inputs)
    p = {n: model.pelt.parameter(f"lora.encoder.layers.0.attention.query.{n}") for n in ("A", "B")}
    p |= {n: model.pelt.parameter(f"lora.encoder.layers.0.attention.query.gate_{n}") for n in ("weight", "bias")}
    gate = torch.sigmoid(x @ p["weight"].T + p["bias"]).mean(1, keepdim=True)
    expected = gate * F.linear(F.linear(x, p["A"]), p["B"])
    assert (change(model, inputs) - expected).abs().max() <= EXACT * expected.abs().max()


def test_a_constant_gate_is_its_number(attached: Any, inputs: Any) -> None:
    model = attached({**GATED, "gate": {"constant": True}}, std=0.0)
    assert [p.item() for n, p in model.pelt.named_parameters() if n.endswith("gate")] == [0.5, 0.5]


# Witnesses: each of these mistakes must show.


def test_a_mean_over_the_batch_shows(attached: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from peltc.runtime.training import interpreter as torch_interpreter

    model = attached(SMALL)
    mean = torch_interpreter._MEANING["mean_seq"]
    monkeypatch.setitem(
        torch_interpreter._MEANING, "mean_seq", lambda x, mask: mean(x, mask).mean(0, keepdim=True).expand(len(x), 1, 1)
    )
    with pytest.raises(AssertionError):
        test_splitting_a_batch_changes_nothing(SMALL, lambda entry: model, inputs)


def test_a_mask_that_is_forgotten_shows(attached: Any, inputs: Any) -> None:
    with pytest.raises(AssertionError):
        test_padding_does_not_move_a_gate_that_leaves_it_out(lambda entry: attached(SMALL), inputs)
