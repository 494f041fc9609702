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


def bends(flow: Flow, value: ir.Value, linear: Linear | None = None, but: str = "") -> bool:
    """Whether a non-linearity stands between a value and the linear map behind it, the nearest or a given one; one
    operator may be left out of account."""
    table, source = flow.linear_of, linear.y if linear is not None else None
    for v in flow.behind(value, lambda v: v in table) if value not in table else ():
        node = v.producer()
        nonlinear = v not in table and node is not None and node.op_type in NONLINEAR and node.op_type != but
        if nonlinear and (source is None or flow.depends(v, source)):
            return True
    return False


def seed(linear: Linear, tokens: int | None = None) -> Probe:
    """A probe that knows a map's result by the numbers of its features.

    Args:
        tokens: how many tokens stand in one row, where the graph does not say so.

    Raises:
        Unprobed: the result has no known shape.
    """
    rank = len(linear.y.shape) if linear.y.shape is not None else 3
    leading: tuple[int, ...] = (SIZES["batch"], SIZES["sequence"])
    if tokens is not None:
        leading = (tokens,)
    elif rank:
        leading = Probe({}).shape(linear.y)[:-1]
    indices = np.broadcast_to(np.arange(linear.outputs), (*leading, linear.outputs))
    return Probe({linear.y: np.array(indices)})


def owned_features(flow: Flow, linear: Linear, operand: ir.Value, tokens: int | None = None) -> np.ndarray | None:
    """The features of a map that reach a value, sorted; None where that cannot be followed. `tokens` as in `seed`."""
    try:
        arrived = seed(linear, tokens).track(operand)
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


Side = tuple[Linear, ir.Value]


def gated(flow: Flow, value: ir.Value, tokens: int | None = None, but: str = "") -> tuple[Side, Side] | None:
    """The gate and the up side of the product behind a value: the map behind the non-linearity, and the one beside it,
    each with the side of the product that it makes. `tokens` as in `seed`, `but` as in `bends`."""
    table = flow.linear_of
    for v in flow.behind(value, lambda v: v in table):
        node = v.producer()
        if node is None or node.op_type != "Mul" or v in table:
            continue
        sides = [side for side in node.inputs if side is not None and side in flow.hidden]
        if len(sides) != 2:
            continue
        (first, bent), (second, straight) = [(nearest_linear(flow, side), bends(flow, side, but=but)) for side in sides]
        if first is None or second is None or bent == straight:
            continue
        if first is second and not _disjoint(flow, first, sides, tokens):
            continue  # x * sigmoid(x), and the like: one side's activation
        pairs = list(zip((first, second), sides, strict=True))
        return (pairs[0], pairs[1]) if bent else (pairs[1], pairs[0])
    return None


def _disjoint(flow: Flow, linear: Linear, sides: list[ir.Value], tokens: int | None) -> bool:
    owned = [owned_features(flow, linear, side, tokens) for side in sides]
    if any(o is None or not len(o) for o in owned):
        return False
    first, second = (set(o.tolist()) for o in owned if o is not None)
    return not first & second
