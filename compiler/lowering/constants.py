"""The numbers in constants. What a profile decides is none, though it has a value by default: it is an input. What lies
in the file of a checkpoint is none either."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.lowering.layout import rank

Array = np.ndarray[Any, Any]


def fixed(value: ir.Value | None, most: int = 64) -> Array | None:
    """The content of a constant of few numbers, casts looked through; None for anything else."""
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or node.op_type not in ("Cast", "Identity"):
            return None
        value = node.inputs[0]
    content = None if value is None or value.is_graph_input() else value.const_value
    if content is None or content.size > most or isinstance(content, ir.ExternalTensor):
        return None
    return np.asarray(content.numpy())


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant with one element."""
    array = fixed(value, 1)
    return None if array is None or array.size != 1 else float(array.reshape(()))


def integers(value: ir.Value | None) -> list[int] | None:
    """The whole numbers in a constant of few."""
    array = fixed(value)
    return None if array is None or array.dtype.kind not in "iu" else [int(n) for n in array.reshape(-1)]


def sizes(value: ir.Value | None) -> list[int | str] | None:
    """The sizes of a value, each a number or a name; None where one has neither."""
    if value is None or value.shape is None:
        return None
    found = [size if isinstance(size, int) else size.value for size in value.shape]
    return None if None in found else found  # type: ignore[return-value]


def span(node: ir.Node) -> tuple[int, int, int] | None:
    """Axis, first place and the place behind the last of a cut along one axis, whose size is known, step by step."""
    value = node.inputs[0]
    if node.op_type != "Slice" or value is None or value.shape is None:
        return None
    numbers = [integers(v) for v in node.inputs[1:]]
    numbers += [[0], [1]][len(numbers) - 2 :]
    if any(n is None or len(n) != 1 for n in numbers):
        return None
    start, stop, axis, step = (n[0] for n in numbers if n is not None)
    axis += (rank(value) or 0) if axis < 0 else 0
    size = value.shape[axis]
    if step != 1 or not isinstance(size, int):
        return None
    start, stop = (max(n + size, 0) if n < 0 else min(n, size) for n in (start, stop))
    return axis, start, stop
