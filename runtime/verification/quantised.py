"""Quantised maps: the weights that an artifact's blocks stand for, and what quantising them costs.

The function is held against PyTorch on the dequantised weights, which are read from the artifact's own bytes. What
deployment does beside, products of inputs rounded to eight bits, is no part of the function; its error is measured
together with that of the weights, against PyTorch on the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from peltc.compiler.base.base import Base
from peltc.compiler.lowering.written import LEVELS, OPERATION, blocks_in
from peltc.compiler.plan.claims import Plan
from peltc.runtime.running.session import Session
from peltc.runtime.training.attach import attach_plan
from peltc.runtime.training.places import owner_of
from peltc.runtime.verification import answers
from peltc.runtime.verification.answers import Answers
from peltc.runtime.verification.rewritten import Exposed, Rewritten, Widened
from peltc.spec.diagnostics import PeltError, Place, fail

STEPS = 1.0
"""How many scales a dequantised number may be off: half of one is rounding, and as much where the range ends."""


class Exact(Rewritten):
    """An artifact whose products by quantised weights read their inputs as they are."""

    def rewrite(self, model: Any) -> None:
        exact(model)


class ExactWidened(Widened):
    """The same in float32, of one in half precision."""

    def rewrite(self, model: Any) -> None:
        exact(model)
        super().rewrite(model)


class ExactExposed(Exposed):
    """The same in its own type, taking and giving float32."""

    def rewrite(self, model: Any) -> None:
        exact(model)
        super().rewrite(model)


def exact(model: ir.Model) -> None:
    """Make products by quantised weights compute in the graph's own type, in place."""
    for node in model.graph:
        if node.op_type == OPERATION:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", LEVELS["float"])


@dataclass(frozen=True)
class HeldBlocks:
    """Quantised weights of an artifact, held against PyTorch's.

    Attributes:
        parameters: what they stand for, by each name that a parameter has in the model.
        steps: the largest distance of a number, in steps.
    """

    parameters: Mapping[str, torch.Tensor]
    steps: float


def held_blocks(
    folder: Path,
    record: Mapping[str, Any],
    model: Any,
    plan: Plan,
    base: Base,
    tensors: Mapping[str, Any],
    place: Place,
) -> HeldBlocks:
    """Read an artifact's quantised weights, and hold them against PyTorch's.

    Args:
        record: what the manifest says of them.
        model: the base in torch and float32, without modules.

    Raises:
        PeltError: E705 the graph lacks one, or a number is too far away.
    """
    turned = turned_in(base)
    blocks = stored_blocks(folder, record, turned)
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(base.precision, 0.0)
    steps = check_blocks(model, blocks, plan, tensors, turned, place, unit)
    return HeldBlocks(everywhere(model, folder, blocks), steps)


def quantised_parameters(folder: Path, record: Mapping[str, Any], model: Any, base: Base) -> dict[str, torch.Tensor]:
    """What an artifact's quantised weights stand for, by each name that a parameter has in the model."""
    return everywhere(model, folder, stored_blocks(folder, record, turned_in(base)))


def turned_in(base: Base) -> set[str]:
    """The weights of maps that a model has as [in, out]."""
    return {site.parameters["weight"] for site in base.anatomy if site.transposed and site.kind == "linear"}


def everywhere(
    model: Any, folder: Path, blocks: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Quantised weights by each name that they have in a model."""
    parameters = {name: weight for name, (weight, _) in blocks.items()}
    return parameters | {name: parameters[first] for name, first in tied(model, folder, blocks).items()}


def stored_blocks(
    folder: Path, record: Mapping[str, Any], transposed: set[str]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The weights that an artifact's blocks stand for, as the model's parameters are, and how large a step between two
    numbers is at each, by name.

    Args:
        record: what the manifest says of them.
        transposed: those of them that the model has as [in, out].

    Raises:
        PeltError: E705 the graph lacks one.
    """
    held = blocks_in(ir.load(folder / "model.onnx").graph)
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in record["weights"]:
        if name not in held:
            raise fail("E705", f"the graph lacks the blocks of '{name}', which is quantised by the manifest",
                       Place(str(folder)), hint="compile again")  # fmt: skip
        pair = (array.T if name in transposed else array for array in (held[name].weight(), held[name].steps()))
        weight, step = (torch.from_numpy(np.ascontiguousarray(array)) for array in pair)
        found[name] = weight, step
    return found


def tied(model: Any, folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The other names that quantised weights have in a model, each with the name that the artifact knows: those of one
    tensor, unless a fold told them apart.

    Args:
        names: of the quantised weights.
    """
    known, apart = set(names), set(ir.load(folder / "model.onnx").graph.initializers)
    whole = dict(model.named_parameters(remove_duplicate=False))
    first = {id(whole[name]): name for name in known}
    return {name: first[id(parameter)] for name, parameter in whole.items()
            if id(parameter) in first and name not in known | apart}  # fmt: skip


def check_blocks(
    model: Any, blocks: Mapping[str, tuple[torch.Tensor, torch.Tensor]], plan: Plan, tensors: Mapping[str, Any],
    transposed: set[str], place: Place, unit: float = 0.0,
) -> float:  # fmt: skip
    """Hold weights against PyTorch's own, what folds into them inside: no number is further away than a step. Modules
    of blocks that fold into a map are no part of its torch module; such a map is held by the outputs alone.

    Args:
        model: the base in torch, without modules; left as it was.
        unit: what one rounding changes of a number at most, as a share of it, in the type of the computation: what
            folds is rounded to that first, and so are numbers of the model.

    Returns:
        The largest distance beyond that, in steps.

    Raises:
        PeltError: E705 a number is further away.
    """
    worst, absorbed = 0.0, [claim for claim in plan.claims if claim.absorbed]
    inside = {claim.absorbed for claim in absorbed}
    unseen = {claim.absorbed for claim in absorbed if claim.site.kind != "linear"}
    whole = {name: model.get_parameter(name).detach() for name in blocks if name not in inside}
    if absorbed:
        attach_plan(model, replace(plan, claims=tuple(absorbed)), tensors).eval()
        try:
            for name in [name for name in blocks if name in inside - unseen]:
                whole[name] = weight_of(owner_of(model, name), blocks[name][0], name in transposed)
        finally:
            model.detach_adapter()
    for name, found in whole.items():
        weight, step = blocks[name]
        off = ((weight - found).abs() - unit * (weight.abs() + found.abs()) / 2).clamp(min=0)
        steps = float((off / step.clamp(min=torch.finfo(torch.float32).tiny)).max())
        if not steps <= STEPS * (1 + 1e-3):
            raise fail("E705", f"quantised weights: '{name}' is up to {steps:.2f} steps from the checkpoint's", place,
                       f"at most {STEPS:.0f}", "compile again; if the artifact is new, please report this")  # fmt: skip
        worst = max(worst, steps)
    return worst


@torch.no_grad()
def weight_of(module: Any, like: torch.Tensor, turned: bool) -> torch.Tensor:
    """The weight of a torch module with its hooks, by what it makes of the columns of the identity."""
    n_in = like.shape[0 if turned else 1]
    columns: torch.Tensor = module(torch.eye(n_in)[None]) - module(torch.zeros(1, n_in, n_in))
    return columns[0] if turned else columns[0].T


def deployed(folder: Path, base: Base, providers: Sequence[str]) -> tuple[str, Answers]:
    """What an artifact answers as it is deployed, and the type that it computes in here: float32, with inputs as they
    are, where these providers have no kernels for its own."""
    try:
        return base.precision, answers.of_session(Session(folder, providers, spinning=False), base)
    except PeltError as error:
        if error.diagnostics[0].code != "E618":
            raise
    return "float32", answers.of_session(ExactWidened(folder, providers, spinning=False), base)


def cost(found: tuple[str, Answers], expected: Answers, blocks: HeldBlocks, place: Place) -> dict[str, Any]:
    """What the manifest says of the cost: errors of what is deployed, by output, against the model as it was.

    Args:
        found: as by `deployed`.
    """
    outputs = answers.by_output(answers.differences(found[1], expected, place.path, hidden=False))
    return {
        "steps": blocks.steps,
        "computed": found[0],
        "outputs": outputs,
        "worst": max(outputs.values(), default=0.0),
    }
