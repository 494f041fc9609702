"""Failures that other tools let pass in silence, on our artifacts: each is refused or impossible.

Here: adapters are ignored where inputs are bound; of overlapping adapters the first wins; an adapter overrides what is
given by the same name; equal or zero adapters are merged; inputs with defaults are taken out, or are there twice; a
head of one profile answers for another in a mixed batch.

Elsewhere: DoRA read as LoRA, and patterns of ranks and alphas ignored (`tests/oracles/test_import.py`, against PEFT);
an adapter of another base whose shapes agree (`test_profiles.py`); an axis that is quietly fixed
(`tests/conformance/test_laws.py`); norms that overflow in half precision (there, `test_half_precision`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers

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


def drawn(spec: dict[str, Any], base: Path, seed: int) -> dict[str, Any]:
    plan, _ = plan_for(load_spec(spec), base)
    draw = np.random.default_rng(seed)
    return {name: draw.normal(0, 0.2, t.shape).astype(np.float32) for name, t in plan.tensors.items()}


def test_of_several_profiles_none_wins(model_folder: Folder, tmp_path: Path) -> None:
    """ONNX Runtime runs with the first of two adapters of one set of names, and says nothing."""
    base = model_folder("bert")
    peltc.compile(SPEC, base, tmp_path / "out", mode="swappable", verify=False)
    session = peltc.Session(tmp_path / "out", CPU)
    for name in ("one", "other"):
        session.add_profile(name, peltc.link(tmp_path / "out", drawn(SPEC, base, len(name))))
    with pytest.raises(PeltError, match="E216 the profile of a run is given as list"):
        session(profile=["one", "other"], input_ids=IDS)


def stripped(file: Path) -> None:
    """Takes out of a graph the inputs that have defaults, as optimisers do."""
    model = onnx.load(file, load_external_data=False)
    defaults = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in defaults]
    assert len(kept) < len(model.graph.input)
    del model.graph.input[:]
    model.graph.input.extend(kept)
    file.write_bytes(model.SerializeToString())


def test_inputs_that_are_gone_are_missed(model_folder: Folder, tmp_path: Path) -> None:
    base = model_folder("llama")
    peltc.compile(SPEC, base, tmp_path / "out", mode="swappable", generation=True, verify=False)
    for file in tmp_path.glob("out/*.onnx"):
        stripped(file)
    session = peltc.Session(tmp_path / "out", CPU)
    session.add_profile("own", peltc.link(tmp_path / "out", drawn(SPEC, base, 0)))
    with pytest.raises(PeltError, match=r"E612 .*Invalid input name: pelt\.lora"):
        session(profile="own", input_ids=IDS)
    with pytest.raises(PeltError, match=r"E605 no graph has the input pelt\.lora"):
        session.generate(IDS, profile="own", max_new_tokens=2)


def test_each_row_has_its_own_head(model_folder: Folder, tmp_path: Path) -> None:
    """A head that each profile trained as a whole, beside what all have."""
    base = model_folder("bert")
    spec = {**SPEC, "attach": [*SPEC["attach"], {"method": "replace", "at": "head"}]}
    own = [drawn(spec, base, seed) for seed in range(2)]
    peltc.compile(spec, base, tmp_path / "out", own[0], mode="bank", verify=False)
    session, expected = peltc.Session(tmp_path / "out", CPU), []
    for i, tensors in enumerate(own):
        session.add_profile(str(i), peltc.link(tmp_path / "out", tensors))
        peltc.compile(spec, base, tmp_path / str(i), tensors, mode="static", verify=False)
        expected.append(peltc.Session(tmp_path / str(i), CPU)(input_ids=IDS)["logits"])
    with torch.no_grad():
        bare = transformers.BertForSequenceClassification.from_pretrained(base).eval()(torch.tensor(IDS[:1])).logits
    found = session(profile=["0", "1", "1", None], input_ids=[*IDS, IDS[0], IDS[0]])["logits"]
    wanted = np.stack([expected[0][0], expected[1][1], expected[1][0], bare.numpy()[0]])
    assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()
