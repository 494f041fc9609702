"""A linear map by its weight as it is stored: `FusedMatMul`, of ONNX Runtime.

    y = x Wᵀ

Checkpoints store weights [out, in], and a `Transpose` stands before each product, which ONNX Runtime computes once
when it opens the graph, into a copy. The operation reads the weight as it lies.
"""

from __future__ import annotations

import onnx_ir as ir

from peltc.compiler.lowering.replacing import put_in_place

OPERATION, DOMAIN = "FusedMatMul", "com.microsoft"


def put_maps(graph: ir.Graph) -> None:
    """Replace products by transposed weights, in place; what nobody reads any more stays."""
    for node in list(graph):
        if node.op_type != "MatMul" or (weight := _stored(node.inputs[1])) is None:
            continue
        new = ir.node(OPERATION, [node.inputs[0], weight], {"transB": 1}, domain=DOMAIN, name=node.name)
        new.metadata_props.update(node.metadata_props)
        put_in_place(new.outputs[0], node.outputs[0])
        graph.insert_before(node, new)
        graph.remove(node, safe=True)


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The weight that a value is the transposition of; casts of it included."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Transpose" or list(node.attributes.get_ints("perm", ())) != [1, 0]:
        return None
    weight = source = node.inputs[0]
    while source is not None and (maker := source.producer()) is not None and maker.op_type == "Cast":
        source = maker.inputs[0]
    return weight if source is not None and source.is_initializer() else None
