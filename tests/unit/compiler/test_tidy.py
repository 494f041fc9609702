"""What an exported graph keeps while it is tidied."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from peltc.compiler.export.tidy import clean


def sum_with(number: float, node: bool, kind: type) -> ir.Model:
    """sqrt(x + number), the number an initializer or a node."""
    dtype = ir.DataType.from_numpy(np.dtype(kind))
    x = ir.Value(name="x", shape=ir.Shape([2, 3]), type=ir.TensorType(dtype))
    tensor = ir.tensor(np.array(number, kind), name="c")
    made = ir.node("Constant", [], {"value": tensor}) if node else None
    constant = made.outputs[0] if made else ir.Value(name="c", const_value=tensor)
    constant.name, constant.type, constant.shape = "c", ir.TensorType(dtype), ir.Shape([])
    added = ir.node("Add", [x, constant])
    root = ir.node("Sqrt", [added.outputs[0]])
    for each in (added, root):
        each.outputs[0].name, each.outputs[0].type, each.outputs[0].shape = each.op_type, x.type, x.shape
    nodes = [made, added, root] if made else [added, root]
    graph = ir.Graph([x], [root.outputs[0]], nodes=nodes, initializers=[] if made else [constant],
                     opset_imports={"": 20}, name="graph")  # fmt: skip
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("node", [True, False])
@pytest.mark.parametrize("number", [1e-12, 1e-9, 1e-8, 1e-6])
def test_epsilons_are_no_zeros(number: float, node: bool) -> None:
    """The optimizer takes them for zeros; a norm of nothing would be no number then."""
    model = sum_with(number, node, np.float32)
    assert clean(model, set()) == {}
    assert [n.op_type for n in model.graph] == ["Add", "Sqrt"]
    (kept,) = model.graph.initializers.values()
    assert kept.const_value is not None and kept.const_value.numpy() == np.float32(number)
    assert [value.name for value in model.graph.inputs] == ["x"]


@pytest.mark.parametrize("node", [True, False])
def test_zeros_are_left_out(node: bool) -> None:
    model = sum_with(0.0, node, np.float32)
    clean(model, set())
    assert [n.op_type for n in model.graph] == ["Sqrt"] and not model.graph.initializers
