"""Graphs in half precision are of one type wherever an operation asks for it, modules included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import cases
import onnx
import onnx_ir as ir
import pytest

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
