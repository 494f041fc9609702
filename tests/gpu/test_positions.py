"""Positions behind a cache, counted from there: the same numbers, and a decode graph that can be captured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cases
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import peltc
from peltc.compiler.lowering import positions
from peltc.runtime.building.compile import plan_for

CPU = ["CPUExecutionProvider"]
TEXT = """<ir_version: 10, opset_import: ["" : 23]>
sums (float[P] past, int64[B, Q] ids, int64 data) => (int64[Q] plain, int64[1, Q] around, int64[Q] far, int64[Q] moved)
<int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64 five = {5}, int64[1] axis = {0}, int64[1] single = {1}> {
  pasts = Shape(past)
  before = Squeeze(pasts)
  lengths = Shape<start = 1>(ids)
  length = Squeeze(lengths)
  count = Range(zero, length, one)
  plain = Add(count, before)
  wide = Unsqueeze(count, axis)
  around = Add(before, wide)
  end = Mul(length, two)
  last = Add(end, five)
  steps = Range(five, last, two)
  further = Reshape(before, single)
  far = Add(steps, further)
  moved = Add(count, data)
}
"""


def test_sums_become_ranges() -> None:
    """Whatever the bounds, the step, and the axes around; a number that is data is not fetched for it."""
    before, after = (ir.from_onnx_text(TEXT) for _ in range(2))
    for node in (n for model in (before, after) for n in model.graph):
        if node.op_type in ("Squeeze", "Mul") or node.outputs[0].name == "last":
            node.outputs[0].shape, node.outputs[0].type = ir.Shape([]), ir.TensorType(ir.DataType.INT64)
        if node.outputs[0].name == "further":
            node.outputs[0].shape, node.outputs[0].type = ir.Shape([1]), ir.TensorType(ir.DataType.INT64)
    positions.put_positions(after.graph)
    after.graph.sort()
    makers = {value.name: value.producer().op_type for value in after.graph.outputs if value.producer() is not None}
    assert sorted(makers.values()) == ["Add", "Range", "Range", "Unsqueeze"]
    sessions = [
        ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=CPU) for model in (before, after)
    ]
    for past, length in ((0, 1), (7, 1), (3, 4), (0, 0)):
        feeds = {"past": np.zeros(past, np.float32), "ids": np.zeros((2, length), np.int64), "data": np.array(9)}
        for ours, theirs in zip(*(session.run(None, feeds) for session in sessions), strict=True):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


SWEPT = ("gpt2", "t5", "phi3", "gemma2")


@pytest.mark.parametrize("family", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in SWEPT)])
def test_a_step_is_the_same_to_the_bit(
    family: str, model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with the sum as it was, the graph could not be captured."""
    folder, spec = model_folder(family), peltc.load_spec(cases.spec("lora", family, "static"))
    given = cases.tensors(plan_for(spec, folder)[0])
    found = {"new": peltc.compile(spec, folder, tmp_path / "new", given, generation=True, verify=False)}
    monkeypatch.setattr("peltc.compiler.lowering.lower.put_positions", lambda graph: None)
    found["old"] = peltc.compile(spec, folder, tmp_path / "old", given, generation=True, verify=False)
    assert all(graph["cuda_graph"] is True for graph in found["new"]["kernels"].values())
    assert "copied to the device" in found["old"]["kernels"]["decode"]["cuda_graph"]
    ids = np.random.default_rng(0).integers(3, 90, (2, 7))
    start = {"decoder_start_token_id": 0} if family == "t5" else {}
    texts = [peltc.Session(tmp_path / name, CPU).generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False,
             output_logits=True, return_dict_in_generate=True, **start) for name in found]  # fmt: skip
    assert np.array_equal(texts[0].sequences, texts[1].sequences)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(texts[0].logits, texts[1].logits, strict=True))
