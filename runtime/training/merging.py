"""Modules merged into the weights of the torch model that carries them, for those who go on without the modules."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from peltc.compiler.passes.absorb import MAX_LOSS, NEW_BIAS
from peltc.compiler.pipeline import folded
from peltc.compiler.plan.claims import Plan
from peltc.compiler.survey.anatomy import Anatomy
from peltc.spec.diagnostics import Place, fail


def merge(model: Any, plan: Plan, anatomy: Anatomy, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write what a plan's modules make of each weight into the model, in place: computed in float32, stored in the
    weight's own type. Where that type takes more than a tenth of a change by rounding, it is warned of.

    Args:
        model: the model without the modules' hooks.
        anatomy: its sites.
        tensors: the modules' tensors by name, float32.

    Raises:
        PeltError: E209 a module that does not fold, or that needs what the model has no room for. Nothing is changed.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    check_mergeable(plan)

    def read(name: str) -> np.ndarray[Any, Any]:
        return np.asarray(parameters[name].detach().float().cpu().numpy())

    entries = list(folded(plan, anatomy, read, tensors, lambda name: np.dtype(np.float32)))
    for entry in entries:
        if entry.name.endswith(NEW_BIAS):
            weight = entry.name.removesuffix(NEW_BIAS)
            raise _refused(plan, f"{entry.claims[0]} needs a bias, and the map of '{weight}' has none")
    with torch.no_grad():
        for entry in entries:
            parameter = parameters[entry.name]
            exact, before = torch.tensor(entry.array), parameter.detach().float().cpu()
            parameter.copy_(exact)
            change = float((exact - before).norm())
            taken = float((parameter.float().cpu() - exact).norm()) / change if change else 0.0
            if taken > MAX_LOSS:
                warnings.warn(f"storing '{entry.name}' in {parameter.dtype} takes {taken:.0%} of the change",
                              stacklevel=3)  # fmt: skip


def check_mergeable(plan: Plan) -> None:
    """Whether all of a plan's modules can go into weights where they are.

    Raises:
        PeltError: E209.
    """
    staying = [claim for claim in plan.claims if not claim.absorbed]
    if staying:
        first = staying[0]
        more = f", and {len(staying) - 1} more" if len(staying) > 1 else ""
        raise _refused(plan, f"'{first.attachment}' at {first.site.name}{more} does not fold: {first.reason}")
    mirrored = {(claim.attachment, claim.site.path) for claim in plan.claims if claim.mirrors is not None}
    for claim in plan.claims:
        for path in claim.site.ties if claim.mirrors is None else ():
            if (claim.attachment, path) not in mirrored:
                raise _refused(plan, f"'{claim.attachment}' changes {claim.site.name} and not {path}, which is the same"
                                     " tensor")  # fmt: skip


def _refused(plan: Plan, why: str) -> Exception:
    return fail(
        "E209",
        f"the modules cannot be merged: {why}",
        Place(plan.spec.path),
        "modules that all fold into weights the model has",
        "compile it: an artifact has room for all of it",
    )
