"""An Einsum of two operands as a product of matrices, so that what is around it is read.

    '...i c, ...j c -> ...i j'  =  MatMul(a, bᵀ)

It applies where both operands have the same leading axes, one axis of their own, and one that is summed over. ONNX
Runtime computes it so itself.
"""

from __future__ import annotations

import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter
from peltc.compiler.lowering.layout import rank
from peltc.compiler.lowering.replacing import put_in_place


def put_products(graph: ir.Graph) -> None:
    """Replace every Einsum that is a product of matrices, in place; new nodes stand at the end."""
    for node in list(graph):
        if node.op_type == "Einsum" and (found := _read(node)) is not None:
            orders, back = found
            result = node.outputs[0]
            kind = result.dtype or ir.DataType.FLOAT
            emitter = Emitter(graph, kind, "pelt.product", node.metadata_props)
            operands = [_ordered(v, order, emitter) for v, order in zip(node.inputs, orders, strict=True)]
            product = emitter.node("MatMul", operands)
            if result.shape is not None:
                inverse = sorted(range(len(back)), key=back.__getitem__)
                product.shape = ir.Shape([result.shape[i] for i in inverse])
            put_in_place(_ordered(product, back, emitter), result)


def _ordered(value: ir.Value | None, order: list[int], emitter: Emitter) -> ir.Value:
    """A value with its axes in another order."""
    assert value is not None
    if order == list(range(len(order))):
        return value
    turned = emitter.node("Transpose", [value], {"perm": order})
    turned.shape = None if value.shape is None else ir.Shape([value.shape[axis] for axis in order])
    return turned


def _read(node: ir.Node) -> tuple[list[list[int]], list[int]] | None:
    """The orders of axes in which the operands are multiplied, and that of the product's in the result."""
    if len(node.inputs) != 2 or any(v is None or v.is_initializer() for v in node.inputs):
        return None
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    if "." in equation or "->" not in equation:
        return None
    operands, out = equation.split("->")
    first, second = operands.split(",")
    if [rank(v) for v in node.inputs] != [len(first), len(second)] or not len(first) == len(second) == len(out) == 4:
        return None
    if any(len(set(term)) != len(term) for term in (first, second, out)):
        return None
    lead = [axis for axis in out if axis in first and axis in second]
    rows, columns = ([a for a in term if a not in lead and a in out] for term in (first, second))
    summed = [axis for axis in first if axis in second and axis not in out]
    if (len(lead), len(rows), len(columns), len(summed)) != (2, 1, 1, 1):
        return None
    orders = [[first.index(a) for a in lead + rows + summed], [second.index(a) for a in lead + summed + columns]]
    return orders, [(lead + rows + columns).index(axis) for axis in out]
