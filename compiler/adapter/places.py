"""Places of matrices among an adapter's tensors: a row and a column each, which the matrix has, none twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peltc.compiler.interpreters.numeric import NumericInterpreter
from peltc.compiler.plan.claims import Plan
from peltc.spec.method import initialiser

Array = np.ndarray[Any, Any]


def misplaced(plan: Plan, tensors: Mapping[str, Array]) -> list[str]:
    """The names of tensors that should be places, as their start values are, and are none."""
    found: dict[str, bool] = {}
    for claim in plan.claims:
        for tensor in claim.tensors.values():
            named = initialiser(tensor.init)
            if named is None or named[0] != "places" or tensor.name in found:
                continue
            rows, columns = (int(NumericInterpreter().evaluate(size, claim.constants)) for size in named[1])
            parts = tensors[tensor.name] if tensor.experts else tensors[tensor.name][None]
            found[tensor.name] = all(are_places(part, rows, columns) for part in parts)
    return [name for name, right in found.items() if not right]


def are_places(array: Array, rows: int, columns: int) -> bool:
    """Whether an array [n, 2] holds different places of a matrix."""
    with np.errstate(invalid="ignore"):
        whole = array.astype(np.int64)
    if (whole != array).any() or (whole < 0).any() or (whole >= (rows, columns)).any():
        return False
    return len(np.unique(whole[:, 0] * columns + whole[:, 1])) == len(whole)
