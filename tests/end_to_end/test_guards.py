"""Failures that other tools let pass in silence, on our artifacts: each is refused or impossible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import peltc
from peltc.compiler.adapter.weights import start_tensors
from peltc.runtime.building.compile import plan_for
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

Folder = Callable[..., Path]
CPU = ["CPUExecutionProvider"]
IDS = [[5, 6, 7, 8], [4, 9, 7, 3]]
SPEC: dict[str, Any] = {
    "pelt": 1, "name": "first", "attach": [{"method": "lora", "at": ["attention.query", "attention.value"], "r": 4}],
}  # fmt: skip


@pytest.mark.parametrize("mode", ["swappable", "bank"])
def test_equal_and_zero_tensors_stay_apart(mode: str, model_folder: Folder, tmp_path: Path) -> None:
    """Modules whose tensors are all zeros, or all equal, are neither merged nor taken out: a profile with other values
    answers as an artifact of its own, and every input is there once."""
    base = model_folder("bert")
    plan, known = plan_for(load_spec(SPEC), base)
    starts = start_tensors(plan, known.array)
    draw = np.random.default_rng(0)
    own = {name: draw.normal(0, 0.2, array.shape).astype(np.float32) for name, array in starts.items()}
    peltc.compile(SPEC, base, tmp_path / "own", own, mode="static", verify=False)
    expected = peltc.Session(tmp_path / "own", CPU)(input_ids=IDS)["logits"]
    counts = []
    for name, fill in (("zero", 0.0), ("equal", 0.25)):
        weights = {name: np.full_like(array, fill) for name, array in starts.items()}
        peltc.compile(SPEC, base, tmp_path / name, weights, mode=mode, verify=False)
        session = peltc.Session(tmp_path / name, CPU)
        session.add_profile("own", peltc.link(tmp_path / name, own))
        found = session(profile="own", input_ids=IDS)["logits"]
        assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
        graph = onnx.load(tmp_path / name / "model.onnx", load_external_data=False).graph
        names = [value.name for value in graph.input]
        assert len(names) == len(set(names)) and set(session.manifest["profiles"]["inputs"]) <= set(names)
        counts.append(len(names))
    assert counts[0] == counts[1]


def test_a_profiles_tensor_is_no_input_of_a_call(model_folder: Folder, tmp_path: Path) -> None:
    """ONNX Runtime lets an adapter override what is given by the same name: a session takes it from a profile alone."""
    peltc.compile(SPEC, model_folder("bert"), tmp_path / "out", mode="swappable", verify=False)
    session = peltc.Session(tmp_path / "out", CPU)
    name, shape = next(iter(session.manifest["profiles"]["inputs"].items()))
    with pytest.raises(PeltError, match=r"E606 the model takes no input 'pelt\.lora"):
        session(input_ids=IDS, **{name: np.ones(shape, np.float32)})


def test_profiles_count_where_inputs_are_bound(model_folder: Folder, tmp_path: Path) -> None:
    """ONNX Runtime's own adapters are ignored there; ours are values, which are bound like the others."""
    base = model_folder("bert")
    plan, _ = plan_for(load_spec(SPEC), base)
    draw = np.random.default_rng(0)
    own = {name: draw.normal(0, 0.2, t.shape).astype(np.float32) for name, t in plan.tensors.items()}
    peltc.compile(SPEC, base, tmp_path / "out", own, mode="swappable", verify=False)
    arrays = peltc.link(tmp_path / "out", own)
    session = peltc.Session(tmp_path / "out", CPU)
    session.add_profile("own", arrays)
    feeds = {"input_ids": np.array(IDS), "attention_mask": np.ones((2, 4), np.int64),
             "token_type_ids": np.zeros((2, 4), np.int64)}  # fmt: skip
    binding = session.inference.io_binding()
    for name, array in {**feeds, **arrays}.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    binding.bind_output("logits")
    session.inference.run_with_iobinding(binding)
    assert np.array_equal(binding.copy_outputs_to_cpu()[0], session(profile="own", **feeds)["logits"])
    assert not np.array_equal(session(profile="own", **feeds)["logits"], session(**feeds)["logits"])
