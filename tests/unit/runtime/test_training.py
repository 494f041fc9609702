"""Beside an attached model: the second loss of AdaMix, and groups of parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import peltc
from peltc.spec.diagnostics import PeltError

CLOSE = 1e-6
EVERY = [
    {"method": "lora", "at": "attention.query", "r": 2, "gate": {}},
    {"method": "bottleneck", "at": "feed_forward.block", "bank": {"size": 9, "k": 4}, "gate": {"constant": True}},
    {"method": "norm_tuning", "at": "*norm"},
]  # fmt: skip


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric_kl_loss(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The authors' code for understanding tasks: 1/2 · (KL(p ‖ q) + KL(q ‖ p)), the target of each detached."""
    p_tec, q_tec = F.softmax(p, dim=-1).detach(), F.softmax(q, dim=-1).detach()
    loss = F.kl_div(F.log_softmax(p, dim=-1), q_tec, reduction="batchmean")
    loss = loss + F.kl_div(F.log_softmax(q, dim=-1), p_tec, reduction="batchmean")
    return loss / 2


def test_consistency_loss_is_that_of_the_authors() -> None:
    first, second = logits(5, 3, seed=1), logits(5, 3, seed=2)
    found, expected = peltc.consistency_loss(first, second), symmetric_kl_loss(first, second)
    assert abs(found - expected) <= CLOSE * expected and expected > 0.1


def test_consistency_loss_of_tokens_leaves_padding_out_and_is_scaled() -> None:
    """As for generation: the mean over unmasked tokens, times 100."""
    first, second = logits(2, 4, 3, seed=1), logits(2, 4, 3, seed=2)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    kept = [(b, s) for b in range(2) for s in range(4) if mask[b, s]]
    one, two = (torch.stack([t[place] for place in kept]) for t in (first, second))
    found = peltc.consistency_loss(first, second, mask, scale=100)
    assert abs(found - 100 * symmetric_kl_loss(one, two)) <= CLOSE * found
    second[1, 2:] += 1000
    assert peltc.consistency_loss(first, second, mask, scale=100) == found


def gradient(loss: Any) -> torch.Tensor:
    first, second = logits(5, 3, seed=1).requires_grad_(), logits(5, 3, seed=2).requires_grad_()
    loss(first, second).backward()
    assert first.grad is not None and second.grad is not None
    return torch.stack([first.grad, second.grad])


def closed_form() -> torch.Tensor:
    """Of ½ KL(sg q ‖ softmax(z)) by z: ½ (softmax(z) − q), over the number of samples. A target that were not
    detached would add a term."""
    p, q = (torch.softmax(logits(5, 3, seed=s), -1) for s in (1, 2))
    return torch.stack([p - q, q - p]) / 2 / 5


def test_consistency_targets_are_detached() -> None:
    assert (gradient(peltc.consistency_loss) - closed_form()).abs().max() <= CLOSE


def test_consistency_gradient_is_that_of_finite_differences_with_the_target_held() -> None:
    first, second = logits(1, 3, seed=1), logits(1, 3, seed=2)
    target, step = torch.softmax(second, -1), 1e-6

    def half(z: torch.Tensor) -> float:
        return float(0.5 * (target * (target.log() - torch.log_softmax(z, -1))).sum())

    slopes = [(half(first + e) - half(first - e)) / (2 * step) for e in step * torch.eye(3, dtype=torch.float64)]
    moving = first.clone().requires_grad_()
    peltc.consistency_loss(moving, second).backward()
    assert moving.grad is not None
    assert (moving.grad[0] - torch.tensor(slopes)).abs().max() <= 1e-8


def test_consistency_of_equal_passes_is_zero() -> None:
    same = logits(5, 3).requires_grad_()
    loss = peltc.consistency_loss(same, same.clone())
    loss.backward()
    assert abs(float(loss)) <= 1e-12 and same.grad is not None and same.grad.abs().max() <= 1e-12


def groups_of(model: Any, **more: Any) -> dict[str, Any]:
    return {group["name"]: group for group in peltc.parameter_groups(model, 1e-3, **more)}


def test_every_trained_parameter_is_in_one_group(attached: Any) -> None:
    model = attached(*EVERY)
    model.classifier.requires_grad_(True)
    groups = peltc.parameter_groups(model, 1e-3)
    members = [id(p) for group in groups for p in group["params"]]
    assert len(members) == len(set(members))
    assert set(members) == {id(p) for p in model.parameters() if p.requires_grad}
    torch.optim.AdamW(groups)


def test_groups_are_by_part(attached: Any) -> None:
    model = attached(*EVERY)
    model.classifier.requires_grad_(True)
    name_of = {id(p): name.split("/")[-1] for name, p in model.named_parameters()}
    found = {name: {name_of[id(p)] for p in group["params"]} for name, group in groups_of(model).items()}
    assert found == {
        "modules": {"A", "B"},
        "modules, no decay": {"gain", "shift"},
        "gates, no decay": {"gate_weight", "gate_bias", "gate"},
        "masks, no decay": {"mask_down", "mask_up"},
        "base": {"classifier.weight"},
        "base, no decay": {"classifier.bias"},
    }


def test_groups_have_their_rates_and_decays(attached: Any) -> None:
    groups = groups_of(attached(*EVERY), rates={"gates": 2e-3, "masks": 5e-2}, weight_decay=0.3)
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "modules": (1e-3, 0.3),
        "modules, no decay": (1e-3, 0.0),
        "gates, no decay": (2e-3, 0.0),
        "masks, no decay": (5e-2, 0.0),
    }


def test_scores_of_prototypes_are_masks(attached: Any) -> None:
    groups = groups_of(attached({"recipe": "propetl", "reduction": 8}))
    assert set(groups) == {"masks, no decay", "modules", "modules, no decay"}
    assert len(groups["masks, no decay"]["params"]) == 4 and len(groups["modules"]["params"]) == 2


def test_a_rate_for_an_unknown_group_is_refused(attached: Any) -> None:
    with pytest.raises(PeltError, match=r"E213.*'gate'") as caught:
        peltc.parameter_groups(attached(*EVERY), 1e-3, {"gate": 1.0})
    assert "gates" in str(caught.value)


def test_groups_of_a_bare_model_are_refused(base: Any) -> None:
    with pytest.raises(PeltError, match="E209"):
        peltc.parameter_groups(base, 1e-3)


# Witness: this mistake must show.


def test_a_target_that_is_not_detached_shows() -> None:
    def attached_targets(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        p, q = (torch.log_softmax(z, -1) for z in (first, second))
        return (F.kl_div(p, q, reduction="batchmean", log_target=True)
                + F.kl_div(q, p, reduction="batchmean", log_target=True)) / 2  # fmt: skip

    assert (gradient(attached_targets) - closed_form()).abs().max() > 1e-2


def test_a_rate_for_one_attachment(attached: Any) -> None:
    """A head that is an attachment has a rate of its own, whatever group its values would be in."""
    model = attached({"recipe": "unipelt", "r": 2, "length": 2, "hidden": 4}, {"method": "replace", "at": "head"})
    groups = peltc.parameter_groups(model, 1e-3, {"replace": 5e-2, "gates": 1e-2})
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["replace"] == rates["replace, no decay"] == 5e-2
    assert rates["gates, no decay"] == 1e-2
    assert rates["modules"] == 1e-3
    counted = sum(p.numel() for group in groups for p in group["params"])
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)
