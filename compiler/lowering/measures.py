"""Sizes that are read once: each from the first input of the graph that has it, by its name, or a constant.

Shape(some value [batch, sequence, 64])[1]  =  Shape(input_ids [batch, sequence])[1]
"""

from __future__ import annotations

import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter
from peltc.compiler.lowering.layout import rank
from peltc.compiler.lowering.replacing import put_in_place


def read_once(graph: ir.Graph) -> None:
    """Read sizes from inputs, in place; new nodes stand at the end, and what nobody reads stays."""
    given: dict[str, tuple[ir.Value, int]] = {}
    cached = {str(value.shape[2]) for value in (*graph.inputs, *graph.outputs) if rank(value) == 4 and value.shape}
    for held in graph.inputs:
        for axis, size in enumerate(held.shape or ()):
            if not isinstance(size, int) and size.value is not None and str(size.value) not in cached:
                given.setdefault(str(size.value), (held, axis))
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "Shape" else None
        if value is None or value.shape is None or node.outputs[0].is_graph_output():
            continue
        length = len(value.shape)
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", length)
        start, end = (n + length if n < 0 else min(n, length) for n in (start, end))
        read, emitter = value.shape[start:end], Emitter(graph, ir.DataType.INT64, "pelt.size", node.metadata_props)
        if all(isinstance(size, int) for size in read):
            node.outputs[0].replace_all_uses_with(emitter.integers([int(size) for size in read]))  # type: ignore[arg-type]
        elif len(read) == 1 and (found := given.get(str(read[0]))) is not None and found != (value, start):
            source, axis = found
            put_in_place(emitter.node("Shape", [source], {"start": axis, "end": axis + 1}), node.outputs[0])
