"""Two compilations of one spec write the same bytes: from a new cache and from a known base, whatever hashes strings
are given and whichever thread is done first."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peltc.compiler import pipeline
from peltc.runtime.building.compile import compile

SPEC = """\
pelt: 1
name: both
attach:
  - method: lora
    at: [attention.query, attention.value, feed_forward.up, feed_forward.down]
    r: 2
  - method: bottleneck
    at: feed_forward.block
    reduction: 4
"""
"""Folded into many weights, and a module that stays in the graph."""

SLOW = pytest.mark.slow
COMPILE = "import sys; from peltc.runtime.commands.cli import run; sys.exit(run(sys.argv[1:]))"


def digests(folder: Path) -> dict[str, str]:
    """Every file of an artifact but the manifest, whose base is recorded with its inode."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir() if f.name != "pelt.json"}


def compiled(model: Path, folder: Path, name: str, seed: int, generation: bool) -> dict[str, str]:
    """The digests of what a process of its own compiles, with a cache of its own by that name."""
    env = {**os.environ, "PYTHONHASHSEED": str(seed), "PELTC_CACHE": str(folder / name)}
    (folder / "spec.yaml").write_text(SPEC)
    out = folder / f"{name}-{seed}"
    options = ["--no-verify", "-q", "-o", str(out), *(["--generation"] if generation else [])]
    command = [sys.executable, "-c", COMPILE, "compile", str(folder / "spec.yaml"), str(model), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return digests(out)


@pytest.mark.parametrize(
    ("family", "generation"),
    [("llama", True), pytest.param("bert", False, marks=SLOW), pytest.param("t5", True, marks=SLOW)],
)
def test_new_caches_and_other_hashes(
    family: str, generation: bool, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = model_folder(family)
    first = compiled(model, tmp_path, "one", 1, generation)
    assert "model.onnx" in first and ("decode.onnx" in first) == generation
    assert compiled(model, tmp_path, "other", 2, generation) == first, "exported anew"
    assert compiled(model, tmp_path, "one", 3, generation) == first, "from the cache"
    bases = [sorted(hashlib.sha256(f.read_bytes()).hexdigest() for f in (tmp_path / name / "bases").rglob("*.*"))
             for name in ("one", "other")]  # fmt: skip
    assert bases[0] == bases[1], "the bases are the same as well"


def test_threads(model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are folded in threads; the first may be the last to be done."""
    absorb = pipeline.absorb
    found = []
    for slow in (None, 0, 1):
        calls: list[int] = []

        def timed(*arguments: Any, slow: int | None = slow, calls: list[int] = calls) -> Any:
            calls.append(len(calls))
            if slow is not None and len(calls) % 2 == slow:
                time.sleep(0.1)
            return absorb(*arguments)

        monkeypatch.setattr(pipeline, "absorb", timed)
        out = tmp_path / f"out-{slow}"
        (tmp_path / "spec.yaml").write_text(SPEC)
        compile(tmp_path / "spec.yaml", model_folder("llama"), out, verify=False)
        assert len(calls) >= 8
        found.append((digests(out), json.loads((out / "pelt.json").read_text())))
    assert found[0] == found[1] == found[2]
