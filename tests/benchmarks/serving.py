"""A server with many profiles: requests of many callers in common batches, beside the same server that answers them one
by one, and what the way through HTTP costs one caller.

All servers run at once and are asked in turn.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from profiles import LORA, compiled, drawn

PROFILES, CALLERS, ASKED, ROUNDS = 64, 32, 20, 5


def measure(base: Path, folder: Path) -> list[tuple[str, str, str, str, str]]:
    """Rows of the table: what, ours, the alternative, the ratio, the goal."""
    import peltc
    from peltc.compiler.linking.linker import Linker

    out = compiled(folder / "out", base, LORA, "bank")
    (folder / "store").unlink(missing_ok=True)
    linker, store = Linker(out), peltc.ProfileStore(folder / "store", out)
    store.put_all({f"t/{i}": linker.link(drawn(linker, i)) for i in range(PROFILES)})
    draw = random.Random(0)
    texts = [[draw.randrange(1000, 20000) for _ in range(draw.randint(8, 64))] for _ in range(200)]
    rates: dict[str, list[float]] = {"joined": [], "alone": []}
    with ExitStack() as stack:
        ports = {
            "joined": started(stack, out, folder / "store"),
            "alone": started(stack, out, folder / "store", "--rows", "1"),
        }
        for turn in range(ROUNDS + 1):
            for name in list(ports)[:: 1 if turn % 2 else -1]:
                seconds = crowd(ports[name], texts)
                if turn:
                    rates[name].append(CALLERS * ASKED / seconds)
            print(f"round {turn} of {ROUNDS}", file=sys.stderr)
        session = peltc.Session(out, ["CPUExecutionProvider"], threads=2, spinning=False, store=store)
        direct, through = [], []
        connection = http.client.HTTPConnection("127.0.0.1", ports["alone"])
        for i in range(60):
            begun = time.perf_counter()
            session(input_ids=[texts[0]], profile=f"t/{i % 4}")
            direct.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            ask(connection, texts[0], f"t/{i % 4}")
            through.append(time.perf_counter() - begun)
    joined, alone = (statistics.median(rates[name]) for name in ("joined", "alone"))
    ratio = statistics.median(a / b for a, b in zip(rates["joined"], rates["alone"], strict=True))
    own, way = statistics.median(direct[10:]), statistics.median(through[10:])
    what = f"MiniLM served, {PROFILES} LoRA profiles"
    return [
        (f"{what}, {CALLERS} callers, 8 to 64 tokens", f"{joined:.0f} a second", f"one by one {alone:.0f} a second",
         f"{ratio:.2f} × the throughput", "≥ 1 ×"),
        (f"{what}, one caller, {len(texts[0])} tokens", f"{1000 * way:.1f} ms", f"a session's call {1000 * own:.1f} ms",
         f"{1000 * (way - own):+.1f} ms", "≤ 5 ms more"),
    ]  # fmt: skip


def started(stack: ExitStack, out: Path, store: Path, *options: str) -> int:
    """The port of a server that ends with the stack."""
    command = [sys.executable, "-m", "peltc", "serve", str(out), "--profiles", str(store), "--port", "0",
               "--threads", "2", *options]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    stack.callback(process.wait)
    stack.callback(process.terminate)
    assert process.stdout is not None
    return int(process.stdout.readline().split("/")[2].split(":")[1])


def crowd(port: int, texts: list[list[int]]) -> float:
    """Seconds until all callers have their answers."""

    def caller(seed: int) -> None:
        connection, draw = http.client.HTTPConnection("127.0.0.1", port), random.Random(seed)
        for _ in range(ASKED):
            ask(connection, draw.choice(texts), f"t/{draw.randrange(PROFILES)}")

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(CALLERS)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begun


def ask(connection: http.client.HTTPConnection, ids: list[int], profile: str) -> None:
    """One text's outputs, the pooled ones, which are small."""
    tensor = {"name": "input_ids", "shape": [1, len(ids)], "datatype": "INT64", "data": ids}
    said = {"inputs": [tensor], "parameters": {"profile": profile}, "outputs": [{"name": "pooler_output"}]}
    connection.request("POST", "/v2/models/first/infer", json.dumps(said))
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise RuntimeError(content.decode())
