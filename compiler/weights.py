"""The adapter's tensors: from a safetensors file, or their start values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.checkpoint import is_float, read_header
from peltc.compiler.numeric import start_value
from peltc.compiler.plan import Claim, Plan, Tensor
from peltc.spec.diagnostics import Diagnostic, PeltError, Place, fail, nearest
from peltc.spec.dims import shape_text
from peltc.spec.formula import Deferred, EvaluationError

Array = np.ndarray[Any, Any]
Read = Callable[[str], Array]


def load_tensors(plan: Plan, file: Path) -> dict[str, Array]:
    """The tensors that a plan asks for, float32.

    Raises:
        PeltError: E401 no safetensors file; E402 missing, E403 left-over, E404 misshapen tensors, all of them.
    """
    stored = read_header(file)
    findings, place = [], Place(str(file))
    for name, tensor in plan.tensors.items():
        if name not in stored:
            findings.append(Diagnostic("E402", f"the tensor '{name}' is missing", place, shape_text(tensor.shape),
                                       nearest(name, stored)))  # fmt: skip
        elif stored[name].shape != tensor.shape:
            found = shape_text(stored[name].shape)
            findings.append(Diagnostic("E404", f"the tensor '{name}' is {found}", place, shape_text(tensor.shape)))
        elif not is_float(stored[name].dtype):
            findings.append(
                Diagnostic("E404", f"the tensor '{name}' holds {stored[name].dtype}", place, "a float type")
            )
    for name in stored:
        if name not in plan.tensors:
            findings.append(Diagnostic("E403", f"no module of the spec takes the tensor '{name}'", place,
                                       hint=nearest(name, plan.tensors)))  # fmt: skip
    if findings:
        raise PeltError(findings)
    return {name: np.array(stored[name].array(), np.float32) for name in plan.tensors}


def start_tensors(plan: Plan, read: Read) -> dict[str, Array]:
    """Every tensor's start value, float32.

    Args:
        read: base parameters by name, [O, I] or as stored; formulas of start values may read them.

    Raises:
        PeltError: E405 a start value that cannot be computed.
    """
    values: dict[str, Array] = {}
    for claim in plan.claims:
        for tensor in claim.tensors.values():
            if tensor.name not in values:
                values[tensor.name] = _start(claim, tensor, read, plan.spec.seed)
    return values


def _start(claim: Claim, tensor: Tensor, read: Read, seed: int) -> Array:
    site = claim.site

    def weight() -> Array:
        array = np.asarray(read(site.parameters["weight"]), np.float32)
        array = array.T if site.transposed else array
        return np.asarray(array[_index(claim)])

    def bias() -> Array:
        return np.asarray(np.asarray(read(site.parameters["bias"]), np.float32)[_index(claim)])

    scope = {**claim.constants, "W": Deferred(weight), "b": Deferred(bias)}
    try:
        return start_value(tensor.name, tensor.shape, tensor.init, scope, seed)
    except (EvaluationError, ValueError, KeyError) as error:
        raise PeltError(
            Diagnostic("E405", f"the start value of '{tensor.name}' cannot be computed: {error}", claim.method.place)
        ) from None


def _index(claim: Claim) -> Any:
    rows = claim.site.rows
    return slice(None) if rows is None else np.concatenate([np.arange(a, b) for a, b in rows])


def inside(folder: Path, name: str, spec: str) -> Path:
    """A file that a spec names, which must lie in or under the spec's folder.

    Raises:
        PeltError: E406 the path leads out.
    """
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise fail("E406", f"the weights '{name}' lie outside the spec's folder", Place(spec, key="weights"),
                   "a path inside it", "give the file by --weights")  # fmt: skip
    return file
