"""Stored weights: what an artifact holds of the parameters that modules fold into, against what PyTorch makes of them.

The compiler folds by arithmetic on affine maps. Here nothing of that is used: the modules are attached to the torch
model as for training, and the map that results is read off the torch module, column by column, by giving it the columns
of the identity and a zero; in float64, where only the last digits of float32 arithmetic could be seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from peltc.compiler.base.base import Base
from peltc.compiler.passes.absorb import NEW_BIAS
from peltc.compiler.pipeline import map_site
from peltc.compiler.plan.claims import Claim, Plan
from peltc.compiler.survey.anatomy import Site
from peltc.runtime.training.attach import attach_plan
from peltc.runtime.training.attached import Attached
from peltc.runtime.training.evaluation import on_first
from peltc.runtime.training.places import leaf_of, owner_of
from peltc.spec.diagnostics import Place, fail

Tensor = torch.Tensor
Stored = Callable[[str], Tensor | None]

EPSILON = torch.finfo(torch.float32).eps
TYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}
CHUNK = 1 << 22
"""Elements of a map that are looked at together."""


def stored_parameters(folder: Path, folded: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The parameters with modules inside that an artifact's graph holds, by name, as they are stored.

    Args:
        folded: what the manifest says of them.

    Raises:
        PeltError: E705 the graph lacks one.
    """
    graph = ir.load(folder / "model.onnx").graph
    found: dict[str, Tensor] = {}
    for name in (str(entry["parameter"]) for entry in folded):
        value = graph.initializers.get(name)
        tensor = value.const_value if value is not None else None
        if not isinstance(tensor, ir.ExternalTensor):
            raise fail("E705", f"the graph lacks the parameter '{name}', which has modules inside by the manifest",
                       Place(str(folder)), hint="compile again")  # fmt: skip
        file = folder / Path(tensor.location).name
        content = np.fromfile(file, np.uint8, tensor.length or 0, offset=tensor.offset or 0)
        found[name] = torch.from_numpy(content).view(TYPES[tensor.dtype]).reshape(tensor.shape.numpy())
    return found


def put_in(model: Any, parameters: Mapping[str, Tensor]) -> None:
    """Put an artifact's parameters into a torch model, in place. A parameter that shared its tensor with another gets a
    tensor of its own; a bias that the model does not have is added to the map's output."""
    for name, tensor in parameters.items():
        if name.endswith(NEW_BIAS):
            owner = owner_of(model, name.removesuffix(NEW_BIAS))
            owner.register_buffer("pelt_bias", tensor, persistent=False)
            owner.register_forward_hook(on_first(lambda module, args, output: output + module.pelt_bias))
            continue
        owner, leaf = owner_of(model, name), name.rpartition(".")[2]
        before = owner.get_parameter(leaf)
        owner.register_parameter(leaf, nn.Parameter(tensor.to(before.dtype), requires_grad=False))


@dataclass
class Deviation:
    """How far stored values are from exact ones.

    Attributes:
        terms: how many terms each value is a sum of, where the compiler multiplies matrices to get it; else 0.
        units: the largest distance, less what float32 explains, in units in the last place; 0.5 is rounding.
        excess: by how much the largest distance exceeds what is allowed, without what `noise` allows.
        noise: the most that PyTorch's own float32 evaluation differs, beyond the sums.
        where: the element with the largest excess: its index, stored, and exact.
    """

    terms: int = 0
    units: float = 0.0
    excess: float = -np.inf
    noise: float = 0.0
    where: tuple[tuple[int, ...], float, float] = ((), 0.0, 0.0)

    @property
    def wrong(self) -> bool:
        return not self.excess <= 2 * self.noise

    def add(self, stored: Tensor, exact: Tensor, single: Tensor, base: Tensor, start: int = 0) -> None:
        """Take more elements in.

        A stored value is the exact one rounded to nearest: half a unit in the last place away at most. The compiler has
        computed it in float32, where three things are rounded:

        - The new value is the sum of the old one and of what the modules make, or the old one scaled. Summands and
          result are rounded by half an epsilon of themselves: `EPSILON * (|old| + |new|)` covers that twice.
        - Where modules change what a map reads or gives, the compiler multiplies two matrices, and adds up to `terms`
          numbers after the one that is nearly the old value. Each addition rounds by up to half an epsilon of that, one
          independent of the other: together by the square root of their number, as in a random walk.
          `EPSILON * sqrt(terms) * (|old| + |new|)` is more than six of its standard deviations.
        - What modules make is rounded within their formulas, by an amount that depends on these. PyTorch evaluates the
          same formulas in float32 as well; twice the largest error that it makes in any element of the parameter,
          beyond the above, is allowed.

        Args:
            stored: the values as stored.
            exact: what they should be, in float64.
            single: the same from float32 arithmetic.
            base: the values before.
            start: the number of the first row, for the message.
        """
        unit = last_place(exact, stored.dtype)
        sums = EPSILON * (1 + math.sqrt(self.terms)) * (base.double().abs() + exact.abs())
        distance = (stored.double() - exact).abs()
        excess = distance - unit / 2 - sums
        excess[~excess.isfinite()] = torch.inf
        self.noise = max(self.noise, float(((single.double() - exact).abs() - sums).max()))
        self.units = max(self.units, float(((distance - sums - 2 * self.noise) / unit).max()))
        if float(excess.max()) > self.excess:
            at = tuple(int(i) for i in np.unravel_index(int(excess.argmax()), excess.shape))
            self.excess = float(excess.max())
            self.where = (at[0] + start, *at[1:]), float(stored[at]), float(exact[at])


def last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of a type at values, float64."""
    info = torch.finfo(dtype)
    smallest = round(np.log2(info.tiny))
    _, exponent = torch.frexp(values)  # |value| in [2^(exponent - 1), 2^exponent)
    exponent[values == 0] = smallest
    return torch.ldexp(torch.full_like(values, info.eps), (exponent - 1).clamp(min=smallest))


def check_stored(
    stored: Mapping[str, Tensor], plan: Plan, base: Base, model: Any, tensors: Mapping[str, Any], place: Place,
    apart: Container[str] = (),
) -> dict[str, Any] | None:  # fmt: skip
    """Hold the parameters that have modules inside against PyTorch.

    Args:
        stored: those parameters, by name, as the artifact holds them.
        model: the base in torch, without modules; left as it was.
        place: for messages.
        apart: parameters with modules inside that are held otherwise, since they are quantised.

    Returns:
        For the manifest: how many parameters, and the largest distance in units in the last place; None without any.

    Raises:
        PeltError: E705 a value is not what PyTorch makes of it, rounded to nearest.
    """
    groups: dict[str, list[Claim]] = {}
    for claim in plan.claims:
        if claim.absorbed and not claim.follows:
            groups.setdefault(claim.absorbed, []).append(claim)
    if not groups:
        return None
    worst = 0.0
    inside = tuple(claim for claim in plan.claims if claim.absorbed)
    attach_plan(model, replace(plan, claims=inside), tensors).eval()
    try:
        with torch.no_grad():
            for weight, claims in groups.items():
                for name, found in _deviations(model, model.pelt, base, weight, claims, stored.get):
                    if name in apart:
                        continue
                    worst = max(worst, found.units if name in stored else 0)
                    if found.wrong:
                        raise _wrong(name, found, claims, base.precision, place)
    finally:
        model.detach_adapter()
    for claim in plan.claims:
        if claim.mirrors is not None and claim.absorbed and claim.absorbed not in apart:
            check_mirror(claim, claim.mirrors, stored, place)
    return {"parameters": len(stored), "worst": worst, "measure": "units in the last place"}


def check_mirror(claim: Claim, table: Site, stored: Mapping[str, Tensor], place: Place) -> None:
    """Whether what follows a table has the table's rows.

    Raises:
        PeltError: E705 it does not.
    """
    if not torch.equal(stored[claim.absorbed], stored[table.parameters["weight"]]):
        raise fail("E705", f"stored weights: '{claim.absorbed}' has not the rows of '{table.parameters['weight']}',"
                   " which it follows", place, hint="compile again")  # fmt: skip


def _wrong(name: str, found: Deviation, claims: list[Claim], precision: str, place: Place) -> Exception:
    index, stored, exact = found.where
    names = ", ".join(dict.fromkeys(f"'{claim.attachment}'" for claim in claims))
    return fail(
        "E705",
        f"stored weights: '{name}' {list(index)} is {stored:.9g}, and {exact:.9g} with {names} in PyTorch;"
        f" {found.units:.3f} units in the last place apart at most",
        place,
        f"the nearest {precision} number, 0.5 units in the last place away at most",
        "compile again; if the artifact is new, please report this: spec, model and versions",
    )


def _deviations(
    model: Any, attached: Attached, base: Base, weight: str, claims: list[Claim], stored: Stored
) -> Iterator[tuple[str, Deviation]]:
    """Of the parameters of one map or norm, each with its name."""
    site = claims[0].site
    if site.kind == "block":
        found = map_site(base.anatomy, weight)
        assert found is not None, weight
        site = found
    module = owner_of(model, weight)
    if site.kind == "norm":
        yield from _norm(attached, module, site, claims, base, stored)
        return
    if site.kind == "table":
        yield weight, _table(attached, module, site, claims, base, stored)
        return
    if site.kind == "experts":
        yield from _experts(attached, module, claims, base, stored)
        return
    blocks = [
        c for c in claims if c.site.kind == "block" and owner_of(model, c.site.anchors.get("y", "")) is not module
    ]

    def run(x: Tensor) -> Tensor:
        """What the map's module gives, and what blocks whose hooks lie elsewhere make of it."""
        found: Any = module(x)
        y: Tensor = found[0] if isinstance(found, tuple) else found
        for claim in blocks:
            y = attached.outputs(claim.site, [claim], y)
        return y[0]

    yield from _map(module, site, weight, run, base, stored, _terms(site, claims))


def _terms(site: Site, claims: list[Claim]) -> int:
    """How many terms the compiler sums for an element of a map with claims inside."""
    follows = any({"delta", "output"} & set(c.effects) and "y" in c.reads for c in claims)
    precedes = any("input" in c.effects for c in claims)
    return site.sizes["out"] * follows + site.sizes["in"] * precedes


def _map(
    module: nn.Module, site: Site, weight: str, run: Callable[[Tensor], Tensor], base: Base, stored: Stored, terms: int
) -> Iterator[tuple[str, Deviation]]:
    """Of a linear map's weight, and of its bias or the one that it has got."""
    leaf, bias = leaf_of(site, "weight"), site.parameters.get("bias")
    own = getattr(module, leaf).detach()
    outputs, inputs = (own.T if site.transposed else own).shape
    held = stored(weight)
    held = own if held is None else held
    held = held.T if site.transposed else held
    step = max(1, CHUNK // max(outputs, inputs))
    found = Deviation(terms)
    with _versions(module, weight.rpartition(".")[0], base) as version:
        for start in range(0, inputs, step):
            columns = slice(start, min(start + step, inputs))
            rows = {}
            for dtype in (torch.float32, torch.float64):
                version(dtype)
                rows[dtype], before = _columns(module, leaf, site.transposed, columns, inputs, dtype, run)
            found.add(held[:, columns].T, rows[torch.float64], rows[torch.float32], before, start)
        name = bias or f"{weight}{NEW_BIAS}"
        zeros, now = {}, stored(name)
        for dtype in (torch.float32, torch.float64):
            version(dtype)
            zeros[dtype] = run(torch.zeros((1, 1, inputs), dtype=dtype))[0]
        old = torch.zeros(outputs, dtype=own.dtype) if bias is None else getattr(module, leaf_of(site, "bias")).detach()
    index, value, exact = found.where
    found.where = index[::-1] if not site.transposed else index, value, exact
    yield weight, found
    found = Deviation(terms)
    now = old.to(own.dtype) if now is None else now
    found.add(now, zeros[torch.float64], zeros[torch.float32], old)
    yield name, found


def _columns(
    module: nn.Module, leaf: str, transposed: bool, columns: slice, inputs: int, dtype: torch.dtype,
    run: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Columns of the map that a module has become, one in each row [C, O], and those of the module's own weight.

    For columns of the identity the module's own product is known: columns of its weight. It is not computed, nor is its
    bias added, which would take digits from the difference to what zero gives. Where modules change what the map
    reads, the module itself runs.
    """
    count = columns.stop - columns.start
    unit = torch.zeros((1, count, inputs), dtype=dtype)
    unit[0, torch.arange(count), torch.arange(columns.start, columns.stop)] = 1
    zero = torch.zeros((1, 1, inputs), dtype=dtype)
    forward = module.forward

    def known(x: Tensor) -> Any:
        own: Tensor = getattr(module, leaf)
        full = own.T if transposed else own
        if x is unit:
            return full[:, columns].T[None]
        return full.new_zeros((1, 1, len(full))) if x is zero else forward(x)

    module.forward = known
    try:
        return run(unit) - run(zero), known(unit)[0]
    finally:
        del module.forward


def _table(
    attached: Attached, module: nn.Module, site: Site, claims: list[Claim], base: Base, stored: Stored
) -> Deviation:
    """Of a table's rows."""
    weight, found = site.parameters["weight"], Deviation()
    with _versions(module, weight.rpartition(".")[0], base) as version:
        rows, old = {}, torch.zeros(0)
        for dtype in (torch.float32, torch.float64):
            version(dtype)
            old = getattr(module, leaf_of(site, "weight")).detach().clone()
            rows[dtype] = attached.rows(claims, old)
    held = stored(weight)
    found.add(old if held is None else held, rows[torch.float64], rows[torch.float32], old)
    return found


def _norm(
    attached: Attached, module: nn.Module, site: Site, claims: list[Claim], base: Base, stored: Stored
) -> Iterator[tuple[str, Deviation]]:
    """Of a norm's gain and bias."""
    found: dict[torch.dtype, dict[str, Tensor]] = {}
    with _versions(module, site.parameters["weight"].rpartition(".")[0], base) as version:
        for dtype in (torch.float32, torch.float64):
            version(dtype)
            found[dtype] = attached.affinities(module, site, claims)
        old = {role: getattr(module, leaf_of(site, role)).detach().clone() for role in found[torch.float64]}
    for role, exact in found[torch.float64].items():
        name, deviation = site.parameters[role], Deviation()
        held = stored(name)
        held = getattr(module, leaf_of(site, role)).detach() if held is None else held
        deviation.add(held, exact, found[torch.float32][role], old[role])
        yield name, deviation


def _experts(
    attached: Attached, module: nn.Module, claims: list[Claim], base: Base, stored: Stored
) -> Iterator[tuple[str, Deviation]]:
    """Of experts' stacked weights and biases."""
    names = {leaf_of(claims[0].site, role): name for role, name in claims[0].site.parameters.items()}
    groups = {c.site.key: (c.site, [o for o in claims if o.site.key == c.site.key]) for c in claims}
    made: dict[torch.dtype, dict[str, Tensor]] = {}
    with _versions(module, claims[0].site.parameters["weight"].rpartition(".")[0], base) as version:
        for dtype in (torch.float32, torch.float64):
            version(dtype)
            old = {leaf: module.get_parameter(leaf).detach().clone() for leaf in names}
            made[dtype] = attached.after(module, groups.values())
    terms = max(_terms(site, own) for site, own in groups.values())
    for leaf, exact in made[torch.float64].items():
        held, found = stored(names[leaf]), Deviation(terms)
        held = module.get_parameter(leaf).detach() if held is None else held
        found.add(held, exact, made[torch.float32][leaf], old[leaf])
        yield names[leaf], found


@contextmanager
def _versions(module: nn.Module, prefix: str, base: Base) -> Iterator[Callable[[torch.dtype], None]]:
    """While it lasts, a module's own parameters may be had in other types, by the function that it gives.

    They are those of the checkpoint, which may have more digits than the type of the computation."""
    before = [(name, p, p.data) for name, p in module.named_parameters(recurse=False)]
    made: dict[torch.dtype, list[Tensor]] = {}

    def known(name: str, data: Tensor) -> Tensor:
        full = f"{prefix}.{name}"
        if full not in base.parameters:
            return data
        return torch.from_numpy(np.asarray(base.array(full), np.float64))

    def version(dtype: torch.dtype) -> None:
        if dtype not in made:
            made[dtype] = [known(name, data).to(dtype) for name, _, data in before]
        for (_, parameter, _), data in zip(before, made[dtype], strict=True):
            parameter.data = data

    try:
        yield version
    finally:
        for _, parameter, data in before:
            parameter.data = data
