"""Which features of a linear map reach an operand: those that a site owns of a fused one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from peltc.compiler.graphs.flow import CUTS, LAYOUT, NONLINEAR, Flow, Linear
from peltc.compiler.survey.probe import SIZES, Probe, Unprobed


def nearest_linear(flow: Flow, value: ir.Value) -> Linear | None:
    """The nearest linear map behind a value whose features reach it."""
    table = flow.linear_of
    return next((table[v] for v in flow.behind(value, lambda v: v in table) if v in table), None)


def bends(flow: Flow, value: ir.Value, linear: Linear | None = None) -> bool:
    """Whether a non-linearity stands between a value and the linear map behind it, the nearest or a given one."""
    table, source = flow.linear_of, linear.y if linear is not None else None
    for v in flow.behind(value, lambda v: v in table) if value not in table else ():
        node = v.producer()
        nonlinear = v not in table and node is not None and node.op_type in NONLINEAR
        if nonlinear and (source is None or flow.depends(v, source)):
            return True
    return False


def seed(linear: Linear) -> Probe:
    """A probe that knows a map's result by the numbers of its features.

    Raises:
        Unprobed: the result has no known shape.
    """
    rank = len(linear.y.shape) if linear.y.shape is not None else 3
    leading = Probe({}).shape(linear.y)[:-1] if rank else (SIZES["batch"], SIZES["sequence"])
    indices = np.broadcast_to(np.arange(linear.outputs), (*leading, linear.outputs))
    return Probe({linear.y: np.array(indices)})


def owned_features(flow: Flow, linear: Linear, operand: ir.Value) -> np.ndarray | None:
    """The features of a map that reach a value, sorted; None where that cannot be followed."""
    try:
        arrived = seed(linear).track(operand)
    except Unprobed:
        return None
    if arrived is None:
        return np.zeros(0, np.int64)
    return np.unique(arrived[arrived >= 0])


def holder(flow: Flow, linear: Linear, operand: ir.Value, owned: np.ndarray) -> ir.Value:
    """The value, on the way from a map to what reads it, that holds just some of the map's features, in order and
    unchanged. Where there is none, it is the map's own result."""
    probe = seed(linear)
    probe.track(operand)
    leading = Probe({}).shape(linear.y)[:-1]
    moved, pending = {linear.y}, [linear.y]
    while pending:
        for reader in flow.readers(pending.pop()):
            if reader.op_type in (*LAYOUT, *CUTS) and reader.inputs[0] in moved:
                fresh = [v for v in reader.outputs if v not in moved]
                moved.update(fresh)
                pending.extend(fresh)
    for value in sorted(moved, key=flow.index):
        array = probe.known.get(value)
        if array is not None and array.ndim > len(leading) and array.shape[: len(leading)] == leading:
            token = array[(0,) * len(leading)].reshape(-1)
            if len(token) == len(owned) and (token == owned).all():
                return value
    return linear.y
