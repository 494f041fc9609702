"""Profiles beside the bare base, on BERT-base's shape: linking one, and batches where each row has its own.

All latencies are medians of interleaved runs in one process, as ratios to the base compiled the same way.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TEXTS, TOKENS, ROUNDS, MANY, MILLION = 64, 128, 7, 1024, 1_000_000
LORA: list[dict[str, Any]] = [{"method": "lora", "at": ["attention.query", "attention.value"], "r": 8}]
ADAPTER: list[dict[str, Any]] = [{"method": "bottleneck", "at": "feed_forward.block", "reduction": 16}]


XPEFT: list[dict[str, Any]] = [{"recipe": "xpeft", "n": 100, "k": 50, "std": 0.5}]


def spec(attach: list[dict[str, Any]], mode: str) -> dict[str, Any]:
    return {"pelt": 1, "name": "first", "attach": attach, "deploy": {"mode": mode}}


def compiled(folder: Path, base: Path, attach: list[dict[str, Any]], mode: str) -> Path:
    """An artifact of the shape, not verified: the tests hold what it computes."""
    import peltc

    peltc.compile(spec(attach, mode), base, folder, verify=False)
    return folder


def drawn(linker: Any, seed: int) -> dict[str, Any]:
    """Values of a profile."""
    draw = np.random.default_rng(seed)
    return {n: draw.normal(0, 0.02, t.shape).astype(np.float32) for n, t in linker.plan.tensors.items() if not t.source}


def best_of(call: Callable[[], object], runs: int = 9) -> float:
    """The median seconds of a call."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(base: Path, folder: Path) -> list[tuple[str, str, str, str, str]]:
    """Rows of the table: what, ours, the alternative, the ratio, the goal."""
    import peltc
    from peltc.compiler.base.opening import open_base
    from peltc.compiler.linking.linker import Linker
    from peltc.compiler.pipeline import build
    from peltc.compiler.plan.claims import Plan
    from peltc.spec.specification import Spec

    cpu, rows = ["CPUExecutionProvider"], []
    opened = open_base(base)
    bare = folder / "bare"
    if not bare.exists():
        bare.mkdir(parents=True)
        build(Plan(Spec("base", ()), opened.fingerprint, ()), opened, {}, bare)
    swap, bank = (compiled(folder / mode, base, LORA, mode) for mode in ("swappable", "bank"))
    adapters, masks = (
        compiled(folder / name, base, a, "bank") for name, a in (("adapters", ADAPTER), ("masks", XPEFT))
    )

    linker = Linker(swap)
    tensors = drawn(linker, 0)
    linking = best_of(lambda: linker.link(tensors))
    rows.append(("BERT-base's shape, a LoRA profile on q and v linked, in a process", f"{1000 * linking:.0f} ms", "",
                 "", "≤ 50 ms"))  # fmt: skip
    draw = np.random.default_rng(0)
    ids = draw.integers(1000, 20000, (TEXTS, TOKENS))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    base_session = peltc.Session(bare, cpu, spinning=False)
    lora, bottleneck = (peltc.Session(out, cpu, spinning=False) for out in (bank, adapters))
    for held, artifact in ((lora, bank), (bottleneck, adapters)):
        maker = Linker(artifact)
        for i in range(TEXTS):
            held.add_profile(str(i), maker.link(drawn(maker, i)))
    each = [str(i) for i in range(TEXTS)]
    mixed = peltc.Session(masks, cpu, spinning=False)
    names, stacked = each, masks_of(mixed, TEXTS)
    mixed.add_profiles(names, stacked)
    calls: dict[str, Callable[[], object]] = {
        "base": lambda: base_session(**inputs),
        "bare rows": lambda: lora(**inputs),
        "one": lambda: lora(profile="0", **inputs),
        "each its own": lambda: lora(profile=each, **inputs),
        "each its own adapter": lambda: bottleneck(profile=each, **inputs),
        "each its own masks": lambda: mixed(profile=each, **inputs),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(ROUNDS + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if round_:
                times[name].append(time.perf_counter() - started)
        print(f"round {round_} of {ROUNDS}", file=sys.stderr)
    for name, what, goal in (
        ("bare rows", "a bank's graph, no row with a profile", "≤ 1.03"),
        ("one", "a bank's graph, one LoRA for all rows", "≤ 1.06"),
        ("each its own", f"{TEXTS} rows with {TEXTS} LoRA profiles", "≤ 1.12"),
        ("each its own adapter", f"{TEXTS} rows with {TEXTS} adapters", "≤ 1.25"),
        ("each its own masks", f"{TEXTS} rows with {TEXTS} profiles of X-PEFT, N = 100", "≤ 1.25"),
    ):
        ratio = statistics.median(a / b for a, b in zip(times[name], times["base"], strict=True))
        rows.append((f"BERT-base's shape, {TEXTS} × {TOKENS} tokens, {what}", f"{statistics.median(times[name]):.2f} s",
                     f"base {statistics.median(times['base']):.2f} s", f"{ratio:.3f} × the latency", goal))  # fmt: skip

    rows += million(mixed, inputs) + sharing(adapters, bare, inputs)
    maker, one = Linker(bank), None
    few = {name: array[:4, :32] for name, array in inputs.items()}
    before = best_of(lambda: lora(profile=each[:4], **few), 15)
    for i in range(TEXTS, MANY):
        one = one or maker.link(drawn(maker, 0))
        lora.add_profile(str(i), one)
    far = [str(i) for i in range(MANY - 4, MANY)]
    after = [(best_of(lambda: lora(profile=each[:4], **few), 5), best_of(lambda: lora(profile=far, **few), 5))
             for _ in range(7)]  # fmt: skip
    size = sum(array.nbytes for array in (one or {}).values())
    room = sum(array[:1].nbytes for array in lora.kept.arrays.values())  # type: ignore[attr-defined]
    rows.append((f"BERT-base's shape, 4 × 32 tokens, {MANY} profiles resident",
                 f"{1000 * statistics.median(b for _, b in after):.1f} ms", f"with {TEXTS}: {1000 * before:.1f} ms",
                 f"{before / statistics.median(b for _, b in after):.2f} × the throughput;"
                 f" a profile more takes {room / size:.2f} × its bytes", "≥ 0.95 ×, ≤ 1.05 ×"))  # fmt: skip
    return rows


def masks_of(session: Any, count: int) -> dict[str, Any]:
    """Random masks of so many profiles, [profiles, bytes] by input name."""
    draw, found = np.random.default_rng(0), {}
    for name, (size, ones) in session.manifest["profiles"]["masks"].items():
        kinds = np.stack([draw.permutation(size) < ones for _ in range(min(count, 1000))])
        bits = np.packbits(kinds, axis=-1, bitorder="little")
        found[name] = bits[draw.integers(len(bits), size=count)]
    return found


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def million(session: Any, inputs: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """A million profiles of X-PEFT in memory: how long they take to load, what they take, and what runs take then."""
    names = [str(i) for i in range(MILLION)]
    stacked = masks_of(session, MILLION)
    size = sum(array.nbytes for array in stacked.values())
    few = {name: array[:4, :32] for name, array in inputs.items()}
    draw = np.random.default_rng(0)
    before = best_of(lambda: session(profile=[str(i) for i in draw.integers(TEXTS, size=4)], **few), 25)
    held, started = resident(), time.perf_counter()
    session.add_profiles(names, stacked)
    loading, held = time.perf_counter() - started, resident() - held
    after = best_of(lambda: session(profile=[str(i) for i in draw.integers(MILLION, size=4)], **few), 25)
    return [
        (f"X-PEFT, N = 100, {MILLION:,} profiles of {size // MILLION} bytes loaded", f"{loading:.1f} s",
         f"{held / 2**20:.0f} MiB", f"{held / size:.2f} × their bytes, with their names", ""),
        ("BERT-base's shape, 4 × 32 tokens, any 4 of them", f"{1000 * after:.1f} ms",
         f"of {TEXTS}: {1000 * before:.1f} ms", f"{before / after:.2f} × the throughput", "≥ 0.95 ×"),
    ]  # fmt: skip


def sharing(first: Path, other: Path, inputs: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """What a further artifact on the same base takes of memory, and a run of time, where sessions share weights."""
    import peltc

    taken, sessions = [], []
    for shares in (False, True):
        peltc.Session(first, ["CPUExecutionProvider"], spinning=False, share_weights=shares)  # what is loaded once
        kept = peltc.Session(first, ["CPUExecutionProvider"], spinning=False, share_weights=shares)
        before = resident()
        sessions.append(peltc.Session(other, ["CPUExecutionProvider"], spinning=False, share_weights=shares))
        sessions[-1](**{name: array[:1, :8] for name, array in inputs.items()})
        taken.append((resident() - before) / 2**20)
        del kept
    ratios = []
    for length in (8, TOKENS):
        one = {name: array[:1, :length] for name, array in inputs.items()}
        pairs = [[best_of(lambda s=s, one=one: s(**one), 1) for s in sessions] for _ in range(25)]
        ratios.append(statistics.median(b / a for a, b in pairs))
    return [("BERT-base's shape, a further artifact on the base, `share_weights`", f"{taken[1]:.0f} MiB more",
             f"without: {taken[0]:.0f} MiB", f"{ratios[0]:.2f} × the latency at 1 × 8 tokens,"
             f" {ratios[1]:.2f} × at 1 × {TOKENS}", "")]  # fmt: skip
