"""What lowering costs while compiling, and what it brings to an encoder with UniPELT; ratios of interleaved runs.

    python tests/benchmarks/lowering.py FOLDER     FOLDER keeps the models and the artifacts

Compiled warm: the base is in the cache, nothing is verified. Runs of ONNX Runtime take turns in an order that goes
round, so that none finds the processor's cache as another left it; the ratios are of medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from decode import model_in

ROUNDS, COMPILED, THREADS, SHAPE = 24, 8, 2, (4, 128)


def medians(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, by name."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 2):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def encoder_in(folder: Path) -> Path:
    """An encoder of BERT-base's shape."""
    if not folder.is_dir():
        from transformers import BertConfig, BertForSequenceClassification

        BertForSequenceClassification(BertConfig()).save_pretrained(folder)
    return folder


def drawn(spec: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """Tensors of a spec that are not zero."""
    import peltc

    random = np.random.default_rng(0)
    return {name: random.normal(0, 0.02, tensor.shape).astype(np.float32)
            for name, tensor in peltc.plan(spec, model).tensors.items()}  # fmt: skip


def unipelt(folder: Path) -> None:
    """An encoder with UniPELT beside its base."""
    import peltc

    base = encoder_in(folder / "encoder")
    specs: dict[str, Any] = {
        "base": {"pelt": 1, "attach": [{"method": "bitfit", "at": "head"}]},
        "UniPELT": {"pelt": 1, "attach": [{"recipe": "unipelt"}]},
    }
    runs: dict[str, Callable[[], object]] = {}
    ids = np.random.default_rng(0).integers(1000, 20000, SHAPE)
    for name, spec in specs.items():
        out = folder / f"encoder-{name}"
        if not out.is_dir():
            peltc.compile(spec, base, out, drawn(spec, base), verify=False)
        session = peltc.Session(out, ["CPUExecutionProvider"], threads=THREADS)
        runs[name] = lambda session=session: session(input_ids=ids)  # type: ignore[misc]
    found = medians(runs, ROUNDS)
    print(f"BERT-base's shape, {SHAPE[0]} × {SHAPE[1]} tokens, UniPELT (APL): {found['UniPELT'] / found['base']:.3f} ×"
          " the base's latency", flush=True)  # fmt: skip


def compiling(folder: Path) -> None:
    """A warm compilation with lowering beside one without."""
    import peltc
    from peltc.compiler.lowering.lower import Lowering

    lora = {"method": "lora", "at": ["attention.query", "attention.value"]}
    for name, model, generation in (("a decoder that generates", model_in(folder / "model"), True),
                                    ("an encoder", encoder_in(folder / "encoder"), False)):  # fmt: skip
        spec = {"pelt": 1, "attach": [lora], "deploy": {"generation": generation, "mode": "static"}}
        tensors = drawn(spec, model)

        def compiled(spec: Any = spec, model: Path = model, tensors: Any = tensors) -> None:
            peltc.compile(spec, model, folder / "compiled", tensors, verify=False)

        def without(compiled: Callable[[], None] = compiled) -> None:
            left = Lowering((), 0, 0)
            with mock.patch("peltc.compiler.pipeline.lower", lambda graph, sites: left):
                compiled()

        found = medians({"lowered": compiled, "as it is": without}, COMPILED)
        print(f"compiled warm, {name}: {found['lowered']:.2f} s, {found['lowered'] / found['as it is']:.3f} × the time"
              " without lowering", flush=True)  # fmt: skip


if __name__ == "__main__":
    compiling(Path(sys.argv[1]))
    unipelt(Path(sys.argv[1]))
