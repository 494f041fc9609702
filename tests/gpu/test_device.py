"""Artifacts on a CUDA device: they compute what the CPU does, on the device, and as a CUDA graph that is replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import onnxruntime as ort
import pytest
from driverless import numbered
from profiled import CPU, given

import peltc
from peltc.compiler.lowering.kernels import DEVICE, place
from peltc.runtime.building.compile import plan_for
from peltc.runtime.running.device import providers_of
from peltc.runtime.verification.verify import UNIT

CUDA = "CUDAExecutionProvider"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(providers_of()[0] != CUDA, reason="no CUDA device on this machine: graphs on it are not tested"),
]
Folder = Callable[..., Path]


def compiled(family: str, case: str, folder: Path, out: Path) -> dict[str, Any]:
    spec = peltc.load_spec(cases.spec(case, family, "static"))
    values = cases.tensors(plan_for(spec, folder)[0])
    return peltc.compile(spec, folder, out, values, provider="cuda", verify=False)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("case", cases.CASES)
def test_as_on_the_cpu(family: str, case: str, model_folder: Folder, tmp_path: Path) -> None:
    """Within the rounding of TF32; and no node is on the CPU but those that compute sizes."""
    said = compiled(family, case, model_folder(family), tmp_path / "out")["kernels"]["model"]
    feeds = given(family)
    on_device, on_cpu = (peltc.Session(tmp_path / "out", p)(**feeds)["logits"] for p in ([CUDA, *CPU], CPU))
    assert np.abs(on_device - on_cpu).max() <= 2 * UNIT["float16"] * np.abs(on_cpu).max()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # each node as it is
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    where = place(numbered(tmp_path / "out/model.onnx")).where
    session = ort.InferenceSession(str(tmp_path / "out/model.numbered"), options, [CUDA, *CPU])
    parts = session.get_provider_graph_assignment_info()
    off = {node.name for part in parts if part.ep_name != CUDA for node in part.get_nodes()}
    assert said["lacking"] == [] and not off & {node.name for node, kind in where.items() if kind == DEVICE}


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("case", ["lora", "unipelt"])
def test_a_graph_is_captured_and_replayed(family: str, case: str, model_folder: Folder, tmp_path: Path) -> None:
    """With other values in the same memory, a replay answers for these."""
    assert compiled(family, case, model_folder(family), tmp_path / "out")["kernels"]["model"]["cuda_graph"] is True
    file = str(tmp_path / "out/model.onnx")
    session = ort.InferenceSession(file, providers=[(CUDA, {"enable_cuda_graph": "1"}), *CPU])
    exact = ort.InferenceSession(file, providers=CPU)
    known, zeros = given(family), np.zeros((2, 4))
    feeds = {one.name: np.array(known.get(one.name, zeros), np.int64) for one in exact.get_inputs()}
    others = {
        name: np.ascontiguousarray(value[:, ::-1]) if name == "input_ids" else value for name, value in feeds.items()
    }
    shape = exact.run(["logits"], feeds)[0].shape
    lying = {name: ort.OrtValue.ortvalue_from_numpy(value, "cuda", 0) for name, value in feeds.items()}
    result = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cuda", 0)
    binding = session.io_binding()
    for name, value in lying.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("logits", result)
    for values in (feeds, feeds, others):  # the first run captures
        for name, value in values.items():
            lying[name].update_inplace(value)
        session.run_with_iobinding(binding)
        expected = exact.run(["logits"], values)[0]
        assert np.abs(result.numpy() - expected).max() <= 2 * UNIT["float16"] * np.abs(expected).max()
