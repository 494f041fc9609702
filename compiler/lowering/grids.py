"""A mask that is looked up at every text and every key: the mask itself.

    GatherND(m [B, T], (b, t) for every b and t)  =  m, as [B, 1, 1, T]

Exporters write a mask that is indexed with ranges so, in nine nodes. The ranges are told by their lengths, which are
the mask's own.
"""

from __future__ import annotations

import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter
from peltc.compiler.lowering.layout import rank
from peltc.compiler.lowering.replacing import put_in_place

LAYOUT = {"Expand", "Unsqueeze", "Reshape"}


def put_masks(graph: ir.Graph) -> None:
    """Replace look-ups by what they look up, in place; new nodes stand at the end, and what nobody reads stays."""
    for node in list(graph):
        if node.op_type == "GatherND" and (axes := _axes(node)) is not None:
            mask = node.inputs[0]
            assert mask is not None
            emitter = Emitter(graph, mask.dtype or ir.DataType.BOOL, "pelt.grid", node.metadata_props)
            whole = emitter.node("Unsqueeze", [mask, emitter.integers(axes)])
            put_in_place(whole, node.outputs[0])


def _axes(node: ir.Node) -> list[int] | None:
    """The axes of the result that the mask does not have, where it is looked up at all of its places in order."""
    mask, indices = node.inputs[:2]
    joined = None if indices is None else indices.producer()
    if mask is None or rank(mask) != 2 or node.attributes.get_int("batch_dims", 0) != 0:
        return None
    if joined is None or joined.op_type != "Concat" or len(joined.inputs) != 2:
        return None
    ranks = rank(node.outputs[0])
    places = [_range(part) for part in joined.inputs]
    if ranks is None or None in places:
        return None
    (first, rows), (second, columns) = places  # type: ignore[misc]
    sizes = [str(size) for size in mask.shape or ()]
    if "None" in sizes or [rows, columns] != sizes or not first < second == ranks - 1 or first != 0:
        return None
    return [axis for axis in range(ranks) if axis not in (first, second)]


def _range(part: ir.Value | None) -> tuple[int, str] | None:
    """The axis that a grid of indices counts along, and how far: whole numbers from zero, the same along the others.
    The last axis of the grid is that of the indices."""
    spread = None if part is None else part.producer()
    if part is None or spread is None or spread.op_type != "Unsqueeze" or (ranks := rank(part)) is None:
        return None
    current = spread.inputs[0]
    while current is not None and (node := current.producer()) is not None and node.op_type in LAYOUT:
        if rank(current) is not None and rank(current) != ranks - 1 and node.op_type == "Expand":
            return None
        if node.op_type == "Expand" and rank(node.inputs[0]) != ranks - 1:
            return None
        if node.op_type == "Unsqueeze" and current.shape is not None and len(current.shape) == ranks - 1:
            along = [axis for axis, size in enumerate(current.shape) if size != 1]
            return (along[0], _counted(current)) if len(along) == 1 and _counted(current) else None
        current = node.inputs[0]
    return None


def _counted(value: ir.Value) -> str:
    """The name of the length of the range that a value is, by added axes alone."""
    current: ir.Value | None = value
    while current is not None and (node := current.producer()) is not None:
        if node.op_type == "Range":
            start, _, step = (v.const_value if v is not None else None for v in node.inputs)
            whole = start is not None and step is not None and not start.numpy().any() and (step.numpy() == 1).all()
            size = current.shape[0] if current.shape is not None else None
            return str(size) if whole and size is not None and str(size) != "None" else ""
        if node.op_type != "Unsqueeze":
            return ""
        current = node.inputs[0]
    return ""
