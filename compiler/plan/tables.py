"""Methods at tables. A table is a linear map of one-hot vectors, which are told by ids: x Wᵀ is one of its rows.
Whatever a method makes of an id alone is a row too, so that all of them together are a new table."""

from __future__ import annotations

from typing import Any

import numpy as np

from peltc.compiler.interpreters.numeric import NumericInterpreter, OneHot
from peltc.compiler.plan.claims import Claim
from peltc.spec.formula.interpreter import EvaluationError

Array = np.ndarray[Any, Any]
TRIED = 3
"""How many ids a formula is tried on."""


def not_of_ids(claim: Claim) -> str:
    """Why a claim cannot act on a table, or nothing: its formulas are tried."""
    if more := claim.reads & {"h", "mask"}:
        return f"it reads '{min(more)}', and a table reads ids"
    if "input" in claim.effects:
        return "it changes what the map reads, and a table reads ids"
    try:
        _tried(claim, (TRIED,))
    except EvaluationError as error:
        return str(error)
    return ""


def depends_on_id_alone(claim: Claim) -> bool:
    """Whether what a claim at a table makes of an id is the same whatever stands beside it: tried, with ids in a
    sequence and without one."""
    try:
        flat, sequence = _tried(claim, (TRIED,)), _tried(claim, (1, TRIED))
    except EvaluationError:
        return False
    return all(np.shape(b) == (1, *np.shape(a)) and np.allclose(a, b[0], rtol=1e-4, atol=1e-6)
               for a, b in zip(flat, sequence, strict=True))  # fmt: skip


def _tried(claim: Claim, shape: tuple[int, ...]) -> list[Array]:
    """What a claim's output definitions make of a few ids, with random values that take no memory.

    Raises:
        EvaluationError: a formula needs more than rows of matrices.
    """
    random, numeric, sizes = np.random.default_rng(0), NumericInterpreter(), claim.site.sizes

    def some(*dims: int) -> Array:
        return np.broadcast_to(random.uniform(0.2, 0.8, dims[-1:]).astype(np.float32), dims)

    values: dict[str, Any] = {name: some(*tensor.shape) for name, tensor in sorted(claim.tensors.items())}
    ids = (np.arange(TRIED) % sizes["in"]).reshape(shape)
    values |= {"x": OneHot(ids, sizes["in"]), "W": some(sizes["out"], sizes["in"]), "b": np.zeros(sizes["out"])}
    values["y"] = random.uniform(0.2, 0.8, (TRIED, sizes["out"])).astype(np.float32).reshape(*shape, -1)
    scope = claim.scope(values, numeric)
    found = [numeric.evaluate(claim.effects[e], scope) for e in ("delta", "output") if e in claim.effects]
    return [np.broadcast_to(np.asarray(value), (*shape, sizes["out"])) for value in found]
