"""`pelt serve` in a process of its own, and stores of random profiles for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import peltc
from peltc.compiler.linking.linker import Linker


def fill(folder: Path, names: Iterable[str]) -> None:
    """Put random profiles for the artifact `out` of a folder into a store in it, `store`."""
    linker, store = Linker(folder / "out"), peltc.ProfileStore(folder / "store", folder / "out")
    draw = np.random.default_rng(0)
    for name in names:
        tensors = {n: draw.normal(0, 0.3, t.shape).astype(np.float32) for n, t in linker.plan.tensors.items()}
        store.put(name, linker.link(tensors))
    store.close()


@contextmanager
def started(folder: Path, *options: str, store: str = "store") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of the artifact `out` of a folder, and the first line that it prints."""
    command = [sys.executable, "-m", "peltc", "serve", folder / "out", "--profiles", folder / store, "--port", "0"]
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
