"""Many adapters on one model beside others: Hugging Face PEFT's rows with adapters of their own, ONNX Runtime's
`LoraAdapter` one request at a time; and switching and decoding with profiles, finely measured.

Medians of interleaved runs in one process, on the CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from profiles import LORA, drawn

ROWS, TOKENS, PAST, RANK = 16, 32, 64, 8
CPU = ["CPUExecutionProvider"]
Told = tuple[str, str, str, str, str]


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, but the first."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def ratio(times: Mapping[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def spec(mode: str, **deploy: Any) -> dict[str, Any]:
    return {"pelt": 1, "name": "first", "attach": LORA, "deploy": {"mode": mode, **deploy}}


def small(folder: Path) -> Path:
    """A BERT of twelve narrow layers: as many tensors for a profile as BERT-base has, and little else to compute."""
    if not (folder / "config.json").is_file():
        from transformers import BertConfig, BertForSequenceClassification

        BertForSequenceClassification(
            BertConfig(hidden_size=64, intermediate_size=64, num_attention_heads=4, vocab_size=100)
        ).save_pretrained(folder)
    return folder


def switching(folder: Path) -> list[Told]:
    """What another profile than before costs a run."""
    import onnxruntime as ort

    import peltc
    from peltc.compiler.linking.linker import Linker
    from peltc.runtime.running.form import write_profile

    base, rows = small(folder / "small"), []
    ids = np.ones((1, 1), np.int64)
    short = {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids}
    for mode in ("swappable", "bank"):
        out = folder / f"small-{mode}"
        peltc.compile(spec(mode), base, out, verify=False)
        session, linker = peltc.Session(out, CPU, threads=1), Linker(out)
        adapters = []
        for i in range(2):
            tensors = linker.link(drawn(linker, i))
            session.add_profile(str(i), tensors)
            if mode == "swappable":
                write_profile(folder / f"{i}.onnx_adapter", tensors, linker.record["fingerprint"])
                adapter, options = ort.LoraAdapter(), ort.RunOptions()
                adapter.Load(str(folder / f"{i}.onnx_adapter"))
                options.add_active_adapter(adapter)
                adapters.append((adapter, options))

        def choose(name: str, session: Any = session) -> None:
            with session.taken(name, 1) as taken:
                taken(1)

        turn = iter(range(10**9))
        calls: dict[str, Callable[[], object]] = {
            "same": lambda s=session: s(profile="0", **short),
            "first": lambda s=session: s(profile="1", **short),  # so that the next one is another
            "other": lambda s=session: s(profile="0", **short),
        }
        if adapters:
            calls["theirs"] = lambda s=session, a=adapters, t=turn: s.inference.run(None, short, a[next(t) % 2][1])
        times = interleaved(calls, 1500)
        started = time.perf_counter()
        for i in range(20000):
            choose(str(i % 2))
        chosen = (time.perf_counter() - started) / 20000
        gap = statistics.median(a - b for a, b in zip(times["other"], times["same"], strict=True))
        theirs = f"a run by LoraAdapter {1e6 * statistics.median(times['theirs']):.0f} µs" if adapters else ""
        rows.append((f"A narrow BERT of 12 layers, LoRA on q and v, `{mode}`: another profile than the run before",
                     f"{1e6 * gap:+.1f} µs on {1e6 * statistics.median(times['same']):.0f} µs;"
                     f" choosing one takes {1e6 * chosen:.1f} µs", theirs, "", "≤ 10 µs"))  # fmt: skip
    return rows


def decoding(folder: Path) -> list[Told]:
    """A step of 16 texts, each with a LoRA of its own, on a Llama of 125 million parameters."""
    import peltc
    from peltc.compiler.linking.linker import Linker

    base = folder / "llama"
    if not (base / "config.json").is_file():
        from transformers import LlamaConfig, LlamaForCausalLM

        LlamaForCausalLM(
            LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
                        num_key_value_heads=4, vocab_size=32000)
        ).save_pretrained(base)  # fmt: skip
    bare, bank = folder / "llama-bare", folder / "llama-bank"
    zero = {"pelt": 1, "name": "bare", "attach": [{"method": "lora", "at": "attention.query", "r": 1}]}
    peltc.compile({**zero, "deploy": {"generation": True}}, base, bare, verify=False)  # folded: the base's own graph
    peltc.compile(spec("bank", generation=True), base, bank, verify=False)
    plain, mixed = peltc.Session(bare, CPU), peltc.Session(bank, CPU)
    linker = Linker(bank)
    for i in range(ROWS):
        mixed.add_profile(str(i), linker.link(drawn(linker, i)))
    names = [str(i) for i in range(ROWS)]
    graphs = {"base": plain.open("decode.onnx"), "profiles": mixed.open("decode.onnx")}

    def feeds(graph: Any) -> dict[str, Any]:
        """One more token after a past of 64."""
        found = {}
        for value in graph.get_inputs():
            if value.name == "input_ids":
                found[value.name] = np.ones((ROWS, 1), np.int64)
            elif value.name == "attention_mask":
                found[value.name] = np.ones((ROWS, PAST + 1), np.int64)
            elif value.name == "position_ids":
                found[value.name] = np.full((ROWS, 1), PAST)
            elif value.name == "logits_to_keep":
                found[value.name] = np.zeros(1, np.int64)
            elif len(value.shape) == 4:
                _, heads, _, width = value.shape
                found[value.name] = np.random.default_rng(0).normal(size=(ROWS, heads, PAST, width)).astype(np.float32)
        return found

    import onnxruntime as ort

    given = {n: ort.OrtValue.ortvalue_from_numpy(a) for n, a in feeds(graphs["base"]).items()}

    def run(which: Any) -> Callable[[], object]:
        def step() -> object:
            if which is None:
                return graphs["base"].run_with_ort_values(None, given)
            with mixed.taken(which, ROWS) as taken:
                return graphs["profiles"].run_with_ort_values(None, {**given, **taken(ROWS)})

        return step

    # The base runs between the two, so that neither finds weights in the processor's cache that the other has read.
    times = interleaved({"base": run(None), "each": run(names), "between": run(None), "one": run("0")}, 60)
    return [
        (f"Llama of 125 M, a step of {ROWS} texts after {PAST} tokens, {what}",
         f"{1e3 * statistics.median(times[name]):.1f} ms", f"base {1e3 * statistics.median(times['base']):.1f} ms",
         f"{ratio(times, name, 'base'):.3f} × the latency", "≤ 1.15")
        for name, what in (("each", f"{ROWS} LoRA profiles"), ("one", "one LoRA profile for all"))
    ]  # fmt: skip


def beside(base: Path, folder: Path) -> list[Told]:
    """Rows with adapters of their own, in PEFT's eager model and by ONNX Runtime's own adapters one at a time."""
    import onnxruntime as ort
    import peft
    import torch
    import transformers

    import peltc
    from peltc.compiler.linking.linker import Linker
    from peltc.runtime.running.form import write_profile

    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    config = peft.LoraConfig(task_type=None, target_modules=["query", "value"], r=RANK, init_lora_weights=False)
    live = peft.get_peft_model(model, config, adapter_name="0").eval()
    for i in range(1, ROWS):
        live.add_adapter(str(i), config)
    swap, bank = folder / "peer-swappable", folder / "peer-bank"
    peltc.compile(spec("swappable"), base, swap, verify=False)
    peltc.compile(spec("bank"), base, bank, verify=False)
    session, one, linker, single = peltc.Session(bank, CPU), peltc.Session(swap, CPU), Linker(bank), Linker(swap)
    options, kept = [], []
    for i in range(ROWS):
        tensors = drawn(linker, i)
        session.add_profile(str(i), linker.link(tensors))
        write_profile(folder / "peer.onnx_adapter", single.link(tensors), single.record["fingerprint"])
        kept.append(ort.LoraAdapter())
        kept[-1].Load(str(folder / "peer.onnx_adapter"))
        options.append(ort.RunOptions())
        options[-1].add_active_adapter(kept[-1])
    names = [str(i) for i in range(ROWS)]
    ids = np.random.default_rng(0).integers(1000, 20000, (ROWS, TOKENS))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    theirs = {name: torch.tensor(array) for name, array in inputs.items()}

    def eager() -> None:
        with torch.no_grad():
            live(**theirs, adapter_names=names)

    def in_turn() -> None:
        for i, option in enumerate(options):
            one.inference.run(None, {name: array[i : i + 1] for name, array in inputs.items()}, option)

    times = interleaved({"ours": lambda: session(profile=names, **inputs), "eager": eager, "turn": in_turn}, 15)
    return [
        (f"BERT-base's shape, {ROWS} × {TOKENS} tokens, {ROWS} LoRA profiles",
         f"{1e3 * statistics.median(times['ours']):.0f} ms", f"{what} {1e3 * statistics.median(times[name]):.0f} ms",
         f"{ratio(times, 'ours', name):.2f} × the latency", "< 1")
        for name, what in (("eager", "PEFT in PyTorch, `adapter_names`"),
                           ("turn", "ONNX Runtime's `LoraAdapter`, text after text"))
    ]  # fmt: skip


def measure(base: Path, folder: Path) -> list[Told]:
    """Rows of the table: what, ours, the alternative, the ratio, the goal."""
    folder.mkdir(parents=True, exist_ok=True)
    return [*switching(folder), *decoding(folder), *beside(base, folder)]
