"""Positions that begin behind a cache, counted from there: `Range`.

    range(a, b, s) + c = range(a + c, b + c, s)

exact for whole numbers. Sizes are in the machine's own memory, where `Range` reads its bounds; the sum with a size, of
which `c` is the number of tokens in the cache, reads it on the device, and a graph with a copy between the two is not
captured as a CUDA graph. A `c` that is data stays: `Range` would have to fetch it.
"""

from __future__ import annotations

import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter

WHOLE = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.INT16}
SHAPED = {"Unsqueeze", "Reshape"}
SIZES = {"Shape", "Size"}
STEPS = {
    "Squeeze",
    "Unsqueeze",
    "Reshape",
    "Gather",
    "Slice",
    "Concat",
    "Cast",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Max",
    "Min",
}
"""What a size is computed by, of other sizes and constants."""


def put_positions(graph: ir.Graph) -> None:
    """Count from where a sum with a size puts a range, in place; what nobody reads any more stays."""
    for node in list(graph):
        if node.op_type != "Add" or node.domain:
            continue
        for ranged, added in (node.inputs, tuple(reversed(node.inputs))):
            counting = _range(ranged)
            size = None if counting is None else _scalar(added)
            if counting is None or size is None or not _is_size(size) or size.dtype not in WHOLE:
                continue
            _count_from(graph, node, counting, ranged, size)
            break


def _count_from(graph: ir.Graph, node: ir.Node, counting: ir.Node, ranged: ir.Value | None, size: ir.Value) -> None:
    """Put a range from a size on in the place of a sum."""
    emitter = Emitter(graph, size.dtype or ir.DataType.INT64, "pelt.positions", node.metadata_props)
    start, limit, step = counting.inputs
    first = size if _is_zero(start) else emitter.node("Add", [start, size])
    last = emitter.node("Add", [limit, size])
    result = emitter.node("Range", [first, last, step])
    result.shape = counting.outputs[0].shape
    if ranged is not counting.outputs[0]:  # the axes that stand around the range
        around = ranged.producer() if ranged is not None else None
        assert around is not None
        result = emitter.node(around.op_type, [result, *around.inputs[1:]], dict(around.attributes))
    result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
    node.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)


def _range(value: ir.Value | None) -> ir.Node | None:
    """The range that a value is, apart from axes of size one around it."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Unsqueeze" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "Range" else None


def _scalar(value: ir.Value | None) -> ir.Value | None:
    """The value without axes that a value of one number is made of; a sum with either has the other operand's shape."""
    node = None if value is None else value.producer()
    if value is not None and value.shape is not None and value.shape.rank() == 1 and node is not None:
        value = node.inputs[0] if node.op_type in SHAPED else None
    return value if value is not None and value.shape is not None and value.shape.rank() == 0 else None


def _is_size(value: ir.Value, depth: int = 12) -> bool:
    """Whether a value is computed of sizes and constants, and of at least one size."""
    pending, found = [(value, depth)], False
    while pending:
        current, left = pending.pop()
        if current.is_initializer():
            continue
        node = current.producer()
        if node is None or not left:
            return False
        if node.op_type in SIZES:
            found = True
        elif node.op_type in STEPS:
            pending += [(v, left - 1) for v in node.inputs if v is not None]
        elif node.op_type != "Constant":
            return False
    return found


def _is_zero(value: ir.Value | None) -> bool:
    content = None if value is None else ir.convenience.get_const_tensor(value)
    return content is not None and content.size == 1 and not content.numpy().any()
