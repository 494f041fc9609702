"""Profiles on a CUDA device: their values lie there, and a mixed batch answers as on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from profiled import ATTACHED, CPU, Folder, drawn, given, spec_of

import peltc
from peltc.runtime.running.device import providers_of
from peltc.runtime.verification.verify import UNIT

CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        providers_of()[0] != CUDA[0], reason="no CUDA device on this machine: profiles on it are not tested"
    ),
]


@pytest.mark.parametrize("mode", ["swappable", "bank"])
@pytest.mark.parametrize("kind", ["deltas", "blocks", "gates", "banks"])
def test_as_on_the_cpu(kind: str, mode: str, model_folder: Folder, tmp_path: Path) -> None:
    base, spec = model_folder("bert"), spec_of(ATTACHED[kind])
    peltc.compile(spec, base, tmp_path / "out", mode=mode, verify=False)
    sessions = [peltc.Session(tmp_path / "out", providers) for providers in (CUDA, CPU)]
    for seed, name in enumerate(("one", "other")):
        linked = peltc.link(tmp_path / "out", drawn(spec, base, seed))
        for session in sessions:
            session.add_profile(name, linked)
    for chosen in ("one", "other") if mode == "swappable" else (["one", "other"], ["other", "one"]):
        on_device, on_cpu = (session(profile=chosen, **given("bert"))["logits"] for session in sessions)
        assert np.abs(on_device - on_cpu).max() <= 2 * UNIT["float16"] * np.abs(on_cpu).max()  # whose mantissa TF32 has
    with sessions[0].taken("one", 2) as taken:
        large = [value for value in taken(2).values() if value.data_type() == "tensor(float)"]
    assert large and all(value.device_name() == "cuda" for value in large)
