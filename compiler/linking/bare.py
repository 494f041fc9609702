"""Whether modules leave the base as it is at their start values: it is tried, on random values at each kind of site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from peltc.compiler.adapter.weights import Read, parameters_of
from peltc.compiler.interpreters.numeric import NumericInterpreter
from peltc.compiler.linking.uneven import before
from peltc.compiler.plan.claims import Claim
from peltc.spec.interpreters.check import site_shapes
from peltc.spec.method import IDENTITY

Array = np.ndarray[Any, Any]
SIZES = {"B": 2, "S": 3, "T": 3}
"""A batch of texts, for values that are random anyway."""
CLOSE = 1e-5
"""How far apart two computations of the same may be, as a share of the largest value."""


def disturbance(claims: Iterable[Claim], starts: Mapping[str, Array], read: Read, hidden: bool = False) -> str:
    """Why modules change the base at their start values; empty where they do not. Layers are alike, and so are
    experts: one module of each attachment and role tells.

    Args:
        starts: the start values by tensor name.
        read: base parameters by name, as stored.
        hidden: whether what stands before the text is hidden where there is no profile.
    """
    first = {(claim.attachment, claim.site.role, claim.site.kind): claim for claim in claims}
    for claim in first.values():
        absent = hidden and before(claim)
        if claim.method.start and not absent:
            return claim.method.start
        effects = [effect for effect in claim.effects if not (absent and effect == "prepend")]
        if any(not _leaves(claim, effect, starts, read, absent) for effect in effects):
            return f"'{claim.attachment}' changes it at {claim.site.name} from the start"
    return ""


def _leaves(claim: Claim, effect: str, starts: Mapping[str, Array], read: Read, absent: bool) -> bool:
    """Whether a definition gives what it stands for, or adds nothing to it; what it puts before the text set aside,
    where that is absent."""
    site, values = claim.site, drawn(claim, np.random.default_rng(0))
    values |= parameters_of(site, read, 0 if site.kind == "experts" else ...)
    if "bias" not in site.parameters:
        values["b"] = np.zeros(site.sizes.get("out", site.sizes.get("d", 0)), np.float32)
    values |= {name: starts[t.name][0] if t.experts else starts[t.name] for name, t in claim.tensors.items()}
    interpreter = NumericInterpreter()
    found = np.asarray(interpreter.evaluate(claim.effects[effect], claim.scope(values, interpreter)))
    if effect == "delta":
        return not found.any()
    if absent and effect in ("keys", "values"):
        found = found[..., claim.added(effect)[0] :, :]
    expected = values.get(IDENTITY.get(effect, ""))
    expected = expected() if callable(expected) else expected
    if expected is None or found.shape != np.shape(expected):
        return False
    return bool(np.abs(found - expected).max() <= CLOSE * np.abs(expected).max())


def drawn(claim: Claim, draw: np.random.Generator) -> dict[str, Any]:
    """Random values of what formulas read at a site while the model runs."""
    shapes, _ = site_shapes(claim.site.kind, claim.site.sizes, claim.site.name, claim.width)
    values: dict[str, Any] = {
        name: draw.normal(size=[_number(size) for size in shape.dims]).astype(np.float32)
        for name, shape in shapes.items() if name not in ("W", "b")
    }  # fmt: skip
    return {**values, "mask": np.ones([SIZES["B"], SIZES["S"]], np.float32), "norm": _same}


def _same(z: Array) -> Array:
    return z


def _number(size: Any) -> int:
    return size if isinstance(size, int) else SIZES.get(str(size), 3)
