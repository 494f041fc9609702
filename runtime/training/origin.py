"""What the folder that a live model was loaded from says of the model: which of its parameters were never trained, and
whether trained modules were left behind there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peltc.compiler.adapter.mismatch import names
from peltc.compiler.files.checkpoint import MODULES, open_checkpoint, spellings
from peltc.compiler.plan.claims import Plan
from peltc.compiler.survey.anatomy import Anatomy
from peltc.runtime.training.saving import own_parameters, replaced
from peltc.spec.diagnostics import PeltError


def warn_of_origin(model: Any, plan: Plan, anatomy: Anatomy, given: bool, level: int) -> None:
    """Warn of a head or pooler that the model's own checkpoint lacks, so that its values are random, and that no module
    takes the place of; and of trained modules in that checkpoint. A model that no folder at hand holds is taken as it
    is.

    Args:
        given: whether the modules' tensors come from somewhere else.
        level: how far up the caller is whose line the warnings show.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not isinstance(name, str) or not name or not Path(name).is_dir():
        return
    try:
        held = set(open_checkpoint(Path(name)).tensors)
    except (PeltError, OSError):  # of another format: nothing is known then
        return
    if not given and any(tensor.startswith(MODULES) for tensor in held):
        warnings.warn(f"'{name}' holds trained modules, and this model's are new: to go on with them, train with"
                      " `resume_from_checkpoint`, or call `model.load_adapter` with the file that `save_adapter` wrote",
                      stacklevel=level + 1)  # fmt: skip
    fresh = untrained(model, plan, anatomy, held)
    if fresh:
        warnings.warn(f"'{name}' does not hold {names(fresh)}: the values are random and stay so, since the spec's"
                      " modules alone are trained; attach `method: replace, at: head` (or `at: pooler`) to train them",
                      stacklevel=level + 1)  # fmt: skip


def untrained(model: Any, plan: Plan, anatomy: Anatomy, held: set[str]) -> list[str]:
    """The parameters of heads and poolers that a checkpoint does not hold and that no module takes the place of; a head
    that is the same tensor as a table is none of them."""
    stem = getattr(model, "base_model_prefix", "")
    poolers = {name for site in anatomy if site.role == "pooler" for name in site.parameters.values()}
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    taken = replaced(model, plan)
    return [
        name
        for name, parameter in own_parameters(model)
        if uses[id(parameter)] == 1
        and name not in taken
        and (name in poolers or not name.startswith(f"{stem}."))
        and held.isdisjoint(spellings(name, stem))
    ]
