"""What training needs beside attached modules: groups of parameters, and AdaMix's second loss. Trainers are others'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from peltc.spec.diagnostics import fail, nearest, one_of, wrong_type

Tensor = torch.Tensor

GROUPS = ("modules", "gates", "masks", "base")
"""The groups' names: a method's weights, gates, masks over banks and prototypes, and trained parameters of the base
(a head)."""
_OF_PART = {"gate": "gates", "mask": "masks"}


def parameter_groups(
    model: Any, lr: float, rates: Mapping[str, float] | None = None, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """An attached model's trained parameters in groups, as optimizers of torch take them.

    Args:
        model: with modules attached.
        lr: the learning rate.
        rates: other rates by group (`modules`, `gates`, `masks`, `base`), or by attachment, which goes first.
        weight_decay: of matrices; vectors, gates and masks have none.

    Returns:
        One group for each rate and decay that occurs, with the keys `name`, `params`, `lr`, `weight_decay`.

    Raises:
        PeltError: E209 the model has no modules attached; E213 a rate for a group that there is not.
    """
    attached = getattr(model, "pelt", None)
    if attached is None:
        raise fail("E209", "the model has no modules attached", hint="call peltc.attach(model, spec) first")
    rates = dict(rates or {})
    known = (*GROUPS, *dict.fromkeys(claim.attachment for claim in attached.plan.claims))
    for name in rates:
        if name not in known:
            raise fail("E213", f"there is no group '{name}' of parameters", expected=one_of(known),
                       hint=nearest(name, known))  # fmt: skip
    group_of = {
        id(attached.parameter(t.name)): claim.attachment if claim.attachment in rates and claim.attachment not in GROUPS
        else _OF_PART.get(t.part, "modules")
        for claim in attached.plan.claims
        for t in claim.tensors.values()
    }  # fmt: skip
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            group = group_of.get(id(parameter), "base")
            decays = group not in ("gates", "masks") and parameter.dim() > 1
            groups.setdefault((group, decays), []).append(parameter)
    return [
        {"name": group if decays else f"{group}, no decay", "params": members, "lr": rates.get(group, lr),
         "weight_decay": weight_decay if decays else 0.0}
        for (group, decays), members in groups.items()
    ]  # fmt: skip


def consistency_loss(first: Any, second: Any, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """How much two stochastic passes of one batch disagree; add it to the first pass's own loss (AdaMix).

        scale · ½ [KL(sg p₂ ‖ p₁) + KL(sg p₁ ‖ p₂)],   p = softmax(logits)

    The sum over classes, the mean over samples; sg lets no gradient through. The authors' code for generation takes
    the mean over unmasked tokens and a scale of 100.

    Args:
        first, second: logits [..., C], or a model's outputs that have some.
        mask: [...], the samples or tokens that count.

    Raises:
        PeltError: E216 neither.
    """
    first, second = _logits(first), _logits(second)
    first, second = (logits.flatten(0, -2) for logits in (first, second))
    if mask is not None:
        first, second = (logits[mask.flatten().bool()] for logits in (first, second))
    p, q = (F.log_softmax(logits, -1) for logits in (first, second))
    toward_second = F.kl_div(p, q.detach(), reduction="batchmean", log_target=True)
    toward_first = F.kl_div(q, p.detach(), reduction="batchmean", log_target=True)
    return 0.5 * scale * (toward_second + toward_first)


def _logits(given: Any) -> Tensor:
    """The logits [..., C] that are given, or that a model's outputs have."""
    found = given if isinstance(given, Tensor) else getattr(given, "logits", None)
    if not isinstance(found, Tensor):
        raise wrong_type("a pass", given, "logits [..., C], or outputs that have some")
    return found
