"""A store of profiles beside files in folders: a million small records, LoRA profiles of 1.2 MB, and a session with a
store beside one to which its profiles were added.

Latencies are medians of interleaved runs in one process.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from profiles import LORA, compiled, drawn

MILLION, PART, TENANTS, FILES = 1_000_000, 20_000, 1000, 100_000
SMALL, LARGE = 312, 1_200_000
ABOUT = {"fingerprint": "ab" * 32}
OPEN = f"""
import json, resource, sys, time
from peltc.runtime.running.records import Records
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
records = Records(sys.argv[1], None)
assert len(records.get(sys.argv[2])) == {SMALL}
first = time.perf_counter() - started
for i in range(20000):
    records.get(f"t{{i * 7919 % {TENANTS}}}/{{i * 7919 % {MILLION}}}")
print(json.dumps([first, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


def name_of(number: int) -> str:
    return f"t{number % TENANTS}/{number}"


def interleaved(calls: dict[str, Callable[[int], object]], rounds: int, each: int) -> dict[str, float]:
    """Median seconds of a call, in rounds of so many, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            for i in range(each):
                calls[name](turn * each + i)
            if turn:
                times[name].append((time.perf_counter() - started) / each)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(base: Path, folder: Path) -> list[tuple[str, str, str, str, str]]:
    """Rows of the table: what, ours, the alternative, the ratio, the goal."""
    shutil.rmtree(folder / "records", ignore_errors=True)
    (folder / "records").mkdir(parents=True)
    return [*small(folder / "records"), *large(folder / "records"), *sessions(base, folder)]


def small(folder: Path) -> list[tuple[str, str, str, str, str]]:
    from peltc.runtime.running.records import Records

    draw = random.Random(0)
    contents = [draw.randbytes(SMALL) for _ in range(1000)]
    records, started = Records(folder / "million", ABOUT), time.perf_counter()
    for begin in range(0, MILLION, PART):
        records.put((name_of(i), contents[i % 1000]) for i in range(begin, begin + PART))
        print(f"{begin + PART:,} of {MILLION:,}", file=sys.stderr)
    put = time.perf_counter() - started
    size = records.stats()
    started = time.perf_counter()
    for i in range(FILES):
        file = folder / "files" / f"t{i % TENANTS}" / str(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents[i % 1000])
    files = time.perf_counter() - started
    found = subprocess.run([sys.executable, "-c", OPEN, folder / "million", name_of(MILLION // 2)], check=True,
                           capture_output=True, text=True)  # fmt: skip
    first, memory = json.loads(found.stdout)
    order = [draw.randrange(MILLION) for _ in range(50_000)]
    calls: dict[str, Callable[[int], object]] = {
        "store": lambda i: records.get(name_of(order[i])),
        "files": lambda i: (folder / "files" / f"t{order[i] % FILES % TENANTS}" / str(order[i] % FILES)).read_bytes(),
    }
    times = interleaved(calls, 9, 5000)
    started = time.perf_counter()
    assert not records.check()
    checked = time.perf_counter() - started
    what = f"a store of {MILLION:,} records of {SMALL} bytes"
    return [
        (f"{what}, put in parts of {PART:,}", f"{put:.0f} s, {size['file'] / size['profiles']:.0f} bytes each",
         f"{FILES:,} files {files:.1f} s, not synced", f"{put / MILLION / (files / FILES):.2f} × the time each",
         "≤ 120 s, ≤ 600 bytes"),
        (f"{what}, opened and one read; memory after 20,000 more", f"{1000 * first:.1f} ms, {memory:.0f} MB", "", "",
         "≤ 10 ms, ≤ 10 MB"),
        (f"{what}, one read at random, checksum included", f"{1 / times['store']:,.0f} a second",
         f"of {FILES:,} files, no checksum {1 / times['files']:,.0f}",
         f"{times['store'] / times['files']:.2f} × the time", "≥ 10,000"),
        (f"{what}, all checked", f"{checked:.0f} s", "", "", "≤ 120 s"),
    ]  # fmt: skip


def large(folder: Path) -> list[tuple[str, str, str, str, str]]:
    import os

    from peltc.runtime.running.records import Records, StoreLimits

    contents = [random.Random(i).randbytes(LARGE) for i in range(8)]
    records = Records(folder / "large", ABOUT, StoreLimits(records=10**6, total=10**12))
    (folder / "bytes").mkdir()

    def write(i: int) -> None:
        with (folder / "bytes" / str(i)).open("wb") as stream:
            stream.write(contents[i % 8])
            stream.flush()
            os.fsync(stream.fileno())

    putting = interleaved({"store": lambda i: records.put([(f"t/{i}", contents[i % 8])]), "files": write}, 9, 10)
    reading = interleaved({"store": lambda i: records.get(f"t/{i % 100}"),
                           "files": lambda i: (folder / "bytes" / str(i % 100)).read_bytes()}, 9, 50)  # fmt: skip
    what = f"a profile of {LARGE:,} bytes"
    return [
        (f"{what} {verb}", f"{1000 * times['store']:.1f} ms", f"{other} {1000 * times['files']:.1f} ms",
         f"{times['store'] / times['files']:.2f} × the time", goal)
        for verb, times, other, goal in (("put, on the disk", putting, "a file, synced", "≤ 50 ms"),
                                         ("read, checksum included", reading, "a file, no checksum", "≤ 5 ms"))
    ]  # fmt: skip


def sessions(base: Path, folder: Path) -> list[tuple[str, str, str, str, str]]:
    import peltc
    from peltc.compiler.linking.linker import Linker

    out, cpu, count = compiled(folder / "bank", base, LORA, "bank"), ["CPUExecutionProvider"], 96
    linker = Linker(out)
    (folder / "store").unlink(missing_ok=True)
    store = peltc.ProfileStore(folder / "store", out)
    added = peltc.Session(out, cpu, spinning=False)
    for i in range(count):
        arrays = linker.link(drawn(linker, i))
        store.put(f"t/{i}", arrays)
        if i < 4:
            added.add_profile(f"t/{i}", arrays)
    held, evicting = (peltc.Session(out, cpu, spinning=False, store=store, resident=n) for n in (8, 4))
    ids = np.random.default_rng(0).integers(1000, 20000, (4, 32))
    given: dict[str, Any] = {"input_ids": ids}
    same = [f"t/{i}" for i in range(4)]
    calls: dict[str, Callable[[int], object]] = {
        "added": lambda i: added(profile=same, **given),
        "held": lambda i: held(profile=same, **given),
        "evicting": lambda i: evicting(profile=[f"t/{(4 * i + j) % count}" for j in range(4)], **given),
    }
    times = interleaved(calls, 15, 3)
    what = "BERT-base's shape, 4 × 32 tokens, four LoRA profiles of a store"
    other = f"added to the session {1000 * times['added']:.1f} ms"
    return [
        (f"{what}, in memory", f"{1000 * times['held']:.1f} ms", other,
         f"{times['held'] / times['added']:.3f} × the latency", "≤ 1.02"),
        (f"{what}, brought in at each run", f"{1000 * times['evicting']:.1f} ms", other,
         f"{1000 * (times['evicting'] - times['added']) / 4:.1f} ms a profile", "≤ 10 ms"),
    ]  # fmt: skip
