"""Blocks of small whole numbers against their definition, number by number, and against ONNX Runtime's own kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from peltc.compiler.artifact import DataFile
from peltc.compiler.lowering.quantise import OPERATION, Quantiser, dequantised, readers
from peltc.compiler.plan.quantising import Quantised
from peltc.runtime.building.blocks import blocks_of
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.quantising import Quantise

Array = np.ndarray[Any, Any]
PRODUCT = "t = Transpose <perm=[1,0]> (w)  p = MatMul (x, t)"
KINDS = [
    Quantise(to, block, zeros, "float") for to in ("int4", "int8") for block in (16, 64) for zeros in (True, False)
]


def drawn(*shape: int) -> Array:
    return np.random.default_rng([*shape]).standard_normal(shape).astype(np.float32)


def by_definition(packed: Array, scales: Array, zeros: Array | None, how: Quantise, n_in: int) -> Array:
    """(q - zero) · scale, one number at a time."""

    def number(row: Array, at: int) -> int:
        if how.bits == 8:
            return int(row[at])
        return int(row[at // 2]) >> (4 * (at % 2)) & 15

    found = np.empty((len(packed), n_in), np.float64)
    for o in range(len(packed)):
        for i in range(n_in):
            block, at = divmod(i, how.block)
            zero = 2 ** (how.bits - 1) if zeros is None else number(zeros[o], block)
            found[o, i] = (number(packed[o, block], at) - zero) * np.float64(scales[o, block])
    return found


@pytest.mark.parametrize("how", KINDS, ids=str)
def test_blocks_stand_for_the_weight(how: Quantise) -> None:
    """Also where the last block is not full, and where the number of zero points is odd."""
    weight = drawn(72, 5)
    packed = blocks_of(weight, how)
    wanted = by_definition(*packed, how, 72)
    found = dequantised(*packed, how.bits, 72)
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    steps = np.abs(wanted - weight.T) / np.repeat(np.abs(packed[1]), how.block, 1)[:, :72]
    assert steps.max() <= (0.501 if how.zeros else 1.001)
    assert steps.max() >= 0.4  # they are quantised


GRAPHS = {
    "MatMul": (False, "turned = Transpose <perm=[1,0]> (w)  y = MatMul (x, turned)"),
    "MatMul, [in, out]": (True, "y = MatMul (x, w)"),
    "Gemm": (False, "y = Gemm <transB=1> (x, w, b)"),
    "Gemm, [in, out]": (True, "y = Gemm (x, w, b)"),
}


def graph_of(body: str, weight: Array) -> ir.Model:
    head = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>'
    inputs = "float[n, 72] x, float[?, ?] w, float[5] b"
    model = ir.from_proto(onnx.parser.parse_model(f"{head} g ({inputs}) => (float[n, 5] y) {{ {body} }}"))
    for name, array in (("w", weight), ("b", drawn(5))):
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        value.shape = ir.Shape(array.shape)
        model.graph.register_initializer(value)
    return model


@pytest.mark.parametrize("how", KINDS[::3], ids=str)
@pytest.mark.parametrize("form", GRAPHS)
def test_products_become_the_operation(form: str, how: Quantise, tmp_path: Any) -> None:
    turned, body = GRAPHS[form]
    weight = drawn(72, 5)  # [in, out]
    model = graph_of(body, weight if turned else weight.T.copy())
    quantiser = Quantiser(Quantised(how, ("w",)), DataFile(tmp_path / "model.onnx.data"), blocks_of)
    quantiser.run(model.graph)
    assert OPERATION in [node.op_type for node in model.graph]
    assert set(quantiser.errors) == {"w"} and not quantiser.left
    ir.save(model, tmp_path / "model.onnx")
    x = drawn(3, 72)
    (found,) = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"x": x})
    wanted = x @ by_definition(*blocks_of(weight, how), how, 72).T + (drawn(5) if "Gemm" in form else 0)
    assert np.abs(found - wanted).max() <= TOLERANCE["float32"] * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{PRODUCT}  s = ReduceSum (w)  y = Add (p, s)", "ReduceSum reads it as well"),
        ("y = Gemm <transB=1, alpha=2.0> (x, w, b)", "Gemm reads it as well"),
        (f"{PRODUCT}  q = MatMul (p, w)  y = MatMul (q, t)", "it is read in two directions"),
    ],
)  # fmt: skip
def test_weights_that_something_else_reads_stay(body: str, reason: str, tmp_path: Any) -> None:
    model = graph_of(body, drawn(5, 72))
    quantiser = Quantiser(Quantised(Quantise("int4"), ("w",)), DataFile(tmp_path / "model.onnx.data"), blocks_of)
    quantiser.run(model.graph)
    assert quantiser.left == {"w": reason} and readers(model.graph.initializers["w"]) == reason
    assert OPERATION not in [node.op_type for node in model.graph]
