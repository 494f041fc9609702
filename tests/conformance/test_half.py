"""Graphs in half precision are of one type wherever an operation asks for it, modules included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import cases
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from peltc.compiler.passes.as_wide import put_as_wide
from peltc.runtime.building.compile import compile, plan_for
from peltc.spec.specification import load_spec


def mixed(graph: ir.Graph) -> Iterator[str]:
    """Nodes whose values are of several types where ONNX asks for one."""
    for node in graph:
        if node.domain:
            continue
        types = dict[str, set[ir.DataType]]()
        schema = onnx.defs.get_schema(node.op_type, node.version or graph.opset_imports[""])
        for formal, values in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
            for i, value in enumerate(values):
                kind = formal[min(i, len(formal) - 1)]
                several = kind.option == onnx.defs.OpSchema.FormalParameterOption.Variadic and not kind.is_homogeneous
                if value is not None and value.dtype is not None and not several:
                    types.setdefault(kind.type_str, set()).add(value.dtype)
        if any(len(found) > 1 for found in types.values()):
            yield f"{node.op_type} {node.name}"


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["unipelt", "mam"])
def test_modules_meet_values_in_float32(
    case: str, precision: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Gemma's norms are in float32 before their last step, and the stream that is added to them is not."""
    folder = model_folder("gemma3", precision)
    spec = load_spec(cases.spec(case, "gemma3", "static", precision))
    plan, _ = plan_for(spec, folder)
    compile(spec, folder, tmp_path / "out", cases.tensors(plan), verify=False)
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    assert {value.dtype for node in graph for value in node.outputs} >= {
        ir.DataType.FLOAT,
        ir.DataType[precision.upper()],
    }
    assert not list(mixed(graph))


@pytest.mark.parametrize("mode", ["static", "fold"])
def test_what_a_model_keeps_in_float32_stays_so(mode: str, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """T5's last maps of its feed-forward networks are in float32 in float16, and the function is PyTorch's to 1e-5: a
    graph that rounds them is 3e-4 off. What folds into them is stored so."""
    folder = model_folder("t5")
    spec = load_spec(cases.spec("lora-everywhere", "t5", mode, "float16"))
    plan, base = plan_for(spec, folder)
    found = compile(spec, folder, tmp_path / "out", cases.tensors(plan), generation=mode == "static")["verification"]
    assert found["tolerance"] == 1e-5 and found["worst"] <= 1e-5 and found["arithmetic"]["status"] == "proven"
    wide = {name for name in base.parameters if base.parameters[name].wide}
    assert wide == {name for name in base.parameters if name.endswith(".wo.weight")} and len(wide) == 4
    for file in (tmp_path / "out").glob("*.onnx"):
        graph = ir.load(file).graph
        kinds = {value.dtype for name, value in graph.initializers.items() if name in wide}
        assert kinds == {ir.DataType.FLOAT}, file
        assert not list(mixed(graph))


def test_a_norm_of_what_is_wider_computes_as_wide() -> None:
    """ONNX Runtime opens it, which does not open it as it was, and what it gives is what the definition gives."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", 8]))
    random = np.random.default_rng(0)
    gain = random.standard_normal(8).astype(np.float16)
    g = ir.Value(name="g", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([8]), const_value=ir.tensor(gain))
    norm = ir.node("RMSNormalization", [x, g], {"axis": -1, "epsilon": 1e-6}, name="norm")
    y = norm.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT16), ir.Shape(["rows", 8])
    graph = ir.Graph([x], [y], nodes=[norm], initializers=[g], opset_imports={"": 23}, name="graph")
    model = ir.Model(graph, ir_version=10)
    with pytest.raises(Exception, match="Type"):
        ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    assert put_as_wide(graph) == 1 and put_as_wide(graph) == 0 and not list(mixed(graph))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    given = random.standard_normal((5, 8)).astype(np.float32) * 100
    exact = given.astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * gain.astype(np.float64)
    (found,) = session.run(None, {"x": given})
    assert found.dtype == np.float16
    assert (np.abs(found.astype(np.float64) - exact) <= 2.0**-11 * np.abs(exact) + 1e-6).all()
