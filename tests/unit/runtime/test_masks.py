"""Hard masks over banks and prototypes: their values, and the gradients that pass straight through them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import answer, shake
from torch import nn

import peltc
from peltc.compiler.interpreters.numeric import top_k_mask
from peltc.runtime.training.interpreter import TorchInterpreter
from peltc.spec.formula.reader import parse

N, K, SIZE = 9, 4, 4
BANK = {"method": "bottleneck", "at": "feed_forward.block", "size": SIZE, "bank": {"size": N, "k": K}}
SUM = {**BANK, "bank": {"size": N, "k": K, "normalise": "sum"}}
KEEP = 0.3
PROTOTYPE = {"method": "bottleneck", "at": "feed_forward.block", "size": SIZE, "prototype": {"keep": KEEP}}
CLOSE = 1e-6
"""Gradients of the same float32 operations in another order, as a share of the largest."""

Tensors = dict[str, torch.Tensor]


class StraightThrough(torch.autograd.Function):
    """As the authors of ProPETL write it (GetSubnet): a mask forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, k: int) -> torch.Tensor:
        chosen = sorted(range(scores.numel()), key=lambda i: (-scores.flatten()[i].item(), i))[:k]
        mask = torch.zeros(scores.numel())
        mask[chosen] = 1.0
        return mask.reshape(scores.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # type: ignore[override]
        return gradients[0], None


def tensors(model: Any, layer: int) -> Tensors:
    """The parameters at a layer by their names in the method."""
    claim = next(c for c in model.pelt.plan.claims if c.site.layer == layer)
    return {name: model.pelt.parameter(t.name) for name, t in claim.tensors.items()}


def mixed(p: Tensors, factor: float) -> Tensors:
    """X-PEFT: Σᵢ mᵢ downᵢ and Σᵢ m'ᵢ upᵢ, each with its bias."""
    weights = {group: StraightThrough.apply(p[f"mask_{group}"], K) * factor for group in ("down", "up")}
    return {
        name: sum(m * t for m, t in zip(weights[name.split("_")[0]], p[f"{name}_bank"], strict=True))
        for name in ("down", "down_bias", "up", "up_bias")
    }


def kept(p: Tensors) -> Tensors:
    """ProPETL: the shared matrices where a layer's scores are largest, and the shared biases whole."""
    found = {n: p[n] for n in ("down_bias", "up_bias")}
    for name in ("down", "up"):
        scores = p[f"{name}_scores"].abs()
        found[name] = p[f"{name}_prototype"] * StraightThrough.apply(
            scores, scores.numel() - int(scores.numel() * (1 - KEEP))
        )
    return found


def transcribed(base: Any, model: Any, rule: Any) -> Any:
    """The base with y + Wu relu(Wd y + bd) + bu after each feed-forward network, on the model's own parameters."""
    again = copy.deepcopy(base)
    for i, layer in enumerate(again.bert.encoder.layer):

        def hook(module: nn.Module, args: Any, y: torch.Tensor, i: int = i) -> torch.Tensor:
            w = rule(tensors(model, i))
            return y + F.linear(F.relu(F.linear(y, w["down"], w["down_bias"])), w["up"], w["up_bias"])

        layer.output.dense.register_forward_hook(hook)
    return again


RULES: dict[str, tuple[Any, Any]] = {
    "bank": (BANK, lambda p: mixed(p, 1 / K)),
    "bank-sum": (SUM, lambda p: mixed(p, 1.0)),
    "prototype": (PROTOTYPE, kept),
}


def gradients(model: Any, owner: Any, inputs: Any) -> Tensors:
    owner.zero_grad()
    model(**inputs).logits.square().sum().backward()
    return {n: p.grad.clone() for n, p in owner.pelt.named_parameters() if p.requires_grad}


def same(found: Tensors, expected: Tensors) -> None:
    assert set(found) == set(expected)
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        error = float((found[name] - gradient).abs().max()) / largest
        assert error <= CLOSE, f"the gradient of {name} differs by {error:.1e}"


@pytest.mark.parametrize("name", RULES)
def test_values_and_gradients_are_the_published_ones(name: str, attached: Any, base: Any, inputs: Any) -> None:
    entry, rule = RULES[name]
    model = attached(entry, training=True)
    again = transcribed(base, model, rule)
    found, expected = answer(model, inputs), answer(again, inputs)
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()
    same(gradients(model, model, inputs), gradients(again, model, inputs))


@pytest.mark.parametrize("entry", [BANK, SUM, PROTOTYPE], ids=list(RULES))
def test_training_runs_the_hard_mask_itself(entry: Any, attached: Any, inputs: Any) -> None:
    """To the bit what evaluation runs: no softened value is left of the straight-through pass."""
    assert torch.equal(answer(attached(entry, training=True), inputs), answer(attached(entry), inputs))


def test_every_logit_learns_and_the_bank_does_not(attached: Any, inputs: Any) -> None:
    model = attached(BANK, training=True)
    found = gradients(model, model, inputs)
    assert set(found) == {n for n, _ in model.pelt.named_parameters() if "mask_" in n}
    assert all(bool(gradient.all()) for gradient in found.values()), "those not chosen learn too"
    banks = [p for n, p in model.pelt.named_parameters() if n.endswith("_bank")]
    assert len(banks) == 8 and all(p.grad is None and not p.requires_grad for p in banks)


def test_a_soft_mask_sums_to_one(attached: Any, base: Any, inputs: Any) -> None:
    model = attached({**BANK, "bank": {"size": N, "mask": "soft"}}, training=True)

    def rule(p: Tensors) -> Tensors:
        return {
            name: torch.einsum("n,n...->...", torch.softmax(p[f"mask_{name.split('_')[0]}"], 0), p[f"{name}_bank"])
            for name in ("down", "down_bias", "up", "up_bias")
        }

    same(gradients(model, model, inputs), gradients(transcribed(base, model, rule), model, inputs))


def test_equal_logits_choose_the_lowest_modules(attached: Any, inputs: Any) -> None:
    """And what PyTorch chooses is what is packed to bits."""
    model = attached(BANK)
    ties = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, -1.0])
    masks = [p for n, p in model.pelt.named_parameters() if "mask_" in n]
    with torch.no_grad():
        for mask in masks:
            mask.copy_(ties)
    tied = answer(model, inputs)
    with torch.no_grad():
        for mask in masks:
            mask.copy_(torch.tensor([1.0, 1, 0, 1, 0, 0, 1, 0, 0]))
    assert torch.equal(answer(model, inputs), tied)
    assert top_k_mask(ties.numpy(), K).tolist() == [1, 1, 0, 1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_has_k_ones_and_zeros(training: bool) -> None:
    logits = torch.randn(50, N, generator=torch.Generator().manual_seed(0)).round()  # full of ties
    mask = TorchInterpreter(training).evaluate(parse(f"top_k_mask(z, {K})"), {"z": logits})
    assert (mask.sum(-1) == K).all() and set(mask.unique().tolist()) == {0.0, 1.0}
    assert np.array_equal(mask.numpy(), top_k_mask(logits.numpy(), K))


def test_a_prototype_keeps_as_many_elements_as_it_says(attached: Any) -> None:
    """One shared matrix, of which each layer keeps other elements."""
    model = attached(PROTOTYPE)
    first, second = (tensors(model, i) for i in range(2))
    assert first["down_prototype"] is second["down_prototype"]
    masks = [(kept(p)["down"] != 0) for p in (first, second)]
    assert [int(m.sum()) for m in masks] == [SIZE * 32 - int(SIZE * 32 * (1 - KEEP))] * 2
    assert not torch.equal(*masks)


def test_profiles_share_the_bank_of_their_seed(base: Any, cache: Any) -> None:
    spec = {"pelt": 1, "attach": [BANK]}
    banks = []
    for seed in (0, 0, 1):
        model = peltc.attach(copy.deepcopy(base), {**spec, "seed": seed})
        shake(model.pelt, seed=len(banks))
        banks.append(torch.cat([p.flatten() for n, p in model.pelt.named_parameters() if n.endswith("_bank")]))
    assert torch.equal(banks[0], banks[1]) and not torch.equal(banks[0], banks[2])


# Witnesses: each of these mistakes must show.


def test_another_normaliser_shows(attached: Any, base: Any, inputs: Any) -> None:
    model = attached(SUM, training=True)
    again = transcribed(base, model, RULES["bank"][1])
    with pytest.raises(AssertionError, match="the gradient of"):
        same(gradients(again, model, inputs), gradients(model, model, inputs))


def test_a_gradient_of_the_chosen_only_shows(
    attached: Any, base: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen_only(self: TorchInterpreter, z: torch.Tensor, k: int) -> torch.Tensor:
        hard = torch.zeros_like(z).scatter(-1, torch.topk(z, k).indices, 1.0)
        return hard + hard * (z - z.detach())

    model = attached(BANK, training=True)
    expected = gradients(transcribed(base, model, RULES["bank"][1]), model, inputs)
    monkeypatch.setattr(TorchInterpreter, "top_k_mask", chosen_only)
    with pytest.raises(AssertionError, match=r"the gradient of .*mask_"):
        same(gradients(model, model, inputs), expected)


def test_a_softened_mask_shows(attached: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hard = answer(attached(BANK), inputs)
    model = attached(BANK, training=True)
    monkeypatch.setattr(TorchInterpreter, "top_k_mask", lambda self, z, k: k * torch.softmax(50 * z, -1))
    assert not torch.equal(answer(model, inputs), hard)
