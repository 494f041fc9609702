"""Nodes that hand on what they read, and are left out.

    x + 0,  x − 0,  x · 1,  x / 1,  x and true,  x or false
    what would change the type to what it is, the order of axes to what it is, the sizes to what they are
    a value that is not false cast to numbers, and back to what is not zero

Sizes are told by their numbers and by their names; of a cut, by its bounds, since a cache that a prefix lies in goes by
the name of the text's length.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from peltc.compiler.lowering.constants import fixed, integers, sizes

NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "And": True, "Or": False}
"""What leaves the other operand as it is."""
ONE_SIDED = {"Sub", "Div"}
WHOLE = 2**31 - 1
"""An end that is behind all others."""
SHAPING = {"Reshape", "Expand", "Tile", "Squeeze", "Unsqueeze"}
"""What gives the same result as its input where it gives it the same sizes."""


def leave_out(graph: ir.Graph) -> None:
    """Let readers of such a node read what it reads, in place; what nobody reads any more stays."""
    for node in list(graph):
        for check in CHECKS:
            source = check(node)
            if source is not None and source.dtype is not None and not node.outputs[0].is_graph_output():
                node.outputs[0].replace_all_uses_with(source)
                break


def _alike(node: ir.Node, source: ir.Value | None) -> ir.Value | None:
    """A value that a node reads, where the result has its sizes."""
    found = sizes(source)
    return source if found is not None and found == sizes(node.outputs[0]) else None


def _neutral(node: ir.Node) -> ir.Value | None:
    """The other operand of something neutral."""
    if node.domain or (number := NEUTRAL.get(node.op_type)) is None or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    for source, other in ((first, second), (second, first)):
        array = fixed(other)
        if array is not None and (array == number).all() and (source is first or node.op_type not in ONE_SIDED):
            return _alike(node, source)
    return None


def _same_type(node: ir.Node) -> ir.Value | None:
    """What is cast to the type that it has; or to truth, where it is truth already but for a cast to numbers."""
    source, result = node.inputs[0] if node.inputs else None, node.outputs[0]
    if node.op_type == "Identity":
        return source
    if node.op_type != "Cast" or source is None:
        return None
    to = ir.DataType(node.attributes["to"].as_int())
    if source.dtype == to:
        return source
    before = source.producer()
    if before is not None and before.op_type == "Cast" and result.dtype == to == ir.DataType.BOOL:
        earlier = before.inputs[0]
        return earlier if earlier is not None and earlier.dtype == ir.DataType.BOOL else None
    return None


def _same_sizes(node: ir.Node) -> ir.Value | None:
    """What is given the sizes that it has."""
    if node.op_type in SHAPING:
        return _alike(node, node.inputs[0])
    if node.op_type == "Slice" and 3 <= len(node.inputs) <= 5:
        starts, ends, *_ = bounds = [integers(v) for v in node.inputs[1:]]
        steps = bounds[3] if len(bounds) > 3 else [1]
        if starts is not None and ends is not None and steps is not None and set(steps) == {1} and not any(starts):
            return node.inputs[0] if min(ends) >= WHOLE else None
    return None


def _same_order(node: ir.Node) -> ir.Value | None:
    """What is given the order of axes that it has, at once or by two that undo each other."""
    if node.op_type != "Transpose" or node.inputs[0] is None:
        return None
    source, order = node.inputs[0], list(node.attributes.get_ints("perm", ()))
    if order == list(range(len(order))) and order:
        return source
    before = source.producer()
    if before is None or before.op_type != "Transpose":
        return None
    first = list(before.attributes.get_ints("perm", ()))
    both = [first[axis] for axis in order] if len(first) == len(order) else []
    return before.inputs[0] if both and both == list(range(len(both))) else None


CHECKS: tuple[Callable[[ir.Node], ir.Value | None], ...] = (_neutral, _same_type, _same_sizes, _same_order)
