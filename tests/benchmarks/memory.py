"""What an open session takes: resident memory beside the bytes of its weights and its cache, and how long it takes to
open, each in a fresh process.

    python tests/benchmarks/memory.py FOLDER     FOLDER keeps the models and the artifacts

A row for each way in which weights are stored and computed. A process first loads all packages and generates with a
tiny artifact, so that what is counted is the session alone: what its memory grows by from before it is opened until
after a text has been generated, of the process's own (anonymous) and of files that it has mapped.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from decode import model_in

PROMPT, TOKENS, REPEATS = 64, 64, 3
CASES = (("float32", "checkpoint"), ("float16", "float16"), ("bfloat16", "checkpoint"), ("bfloat16", "float16"))
"""Types that weights are stored in, and precisions that are asked for."""


def resident() -> dict[str, int]:
    """Bytes of memory that this process has: in all, of its own, and of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {
        line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss") or line.startswith("VmRSS")
    }
    return {name: 1024 * int(found[key]) for name, key in (("all", "VmRSS"), ("own", "RssAnon"), ("file", "RssFile"))}


def opened(folder: Path) -> Any:
    """A session that has generated."""
    import torch

    import peltc

    session = peltc.Session(folder, ["CPUExecutionProvider"], threads=2)
    session.generate(torch.ones(1, PROMPT, dtype=torch.long), attention_mask=torch.ones(1, PROMPT, dtype=torch.long),
                     max_new_tokens=TOKENS, min_new_tokens=TOKENS)  # fmt: skip
    return session


def child(tiny: Path, folder: Path) -> None:
    """Measure, in a process of its own; prints figures."""
    import peltc

    opened(tiny).close()
    before = resident()
    start = time.perf_counter()
    session = peltc.Session(folder, ["CPUExecutionProvider"], threads=2)
    session.generator  # noqa: B018  # opens its graph
    seconds = time.perf_counter() - start
    session.close()
    del session
    kept = opened(folder)
    after = resident()
    kept.close()
    print(json.dumps({"seconds": seconds, **{name: after[name] - before[name] for name in after}}))


def stored(folder: Path, dtype: str) -> Path:
    """The model of 125 million parameters in another type."""
    out = folder / f"model-{dtype}"
    if not out.is_dir():
        import torch
        from transformers import AutoModelForCausalLM

        base = model_in(folder / "model")
        AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).save_pretrained(out)
    return out


def tiny_in(folder: Path) -> Path:
    """A model of a few thousand parameters."""
    if not folder.is_dir():
        from transformers import LlamaConfig, LlamaForCausalLM

        LlamaForCausalLM(
            LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, vocab_size=100, max_position_embeddings=256)
        ).save_pretrained(folder)  # fmt: skip
    return folder


def artifact(model: Path, out: Path, precision: str) -> Path:
    """An artifact of a model that generates, LoRA folded."""
    if not out.is_dir():
        import peltc

        lora = {"method": "lora", "at": ["attention.query", "attention.value"]}
        spec = {"pelt": 1, "attach": [lora], "deploy": {"generation": True, "precision": precision}}
        peltc.compile(spec, model, out, verify=False)
    return out


def bytes_of(out: Path) -> int:
    """The bytes of the weights that the graph which generates reads, and of its cache."""
    import onnx_ir as ir

    graph = ir.load(out / "decode.onnx").graph
    weights = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    room = -(-(PROMPT + TOKENS) // 64) * 64
    caches = [v for v in graph.inputs if "past_key_values." in (v.name or "") and v.shape is not None and v.dtype]
    kept = sum(room * int(v.shape[1]) * int(v.shape[3]) * v.dtype.itemsize for v in caches)  # type: ignore[union-attr, index, arg-type]
    return weights + int(kept)


def main(folder: Path) -> None:
    tiny = artifact(tiny_in(folder / "tiny"), folder / "tiny-out", "checkpoint")
    print("| stored | computed | opened, s | MB | of its own | of files | weights and cache, MB | ratio |")
    print(f"|---|---|{'--:|' * 6}")
    for dtype, precision in CASES:
        out = artifact(stored(folder, dtype), folder / f"out-{dtype}-{precision}", precision)
        command = [sys.executable, __file__, "--child", str(tiny), str(out)]
        runs = [json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
                for _ in range(REPEATS)]  # fmt: skip
        found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        computed = json.loads((out / "pelt.json").read_text())["base"]["precision"]
        ideal = bytes_of(out)
        print(f"| {dtype} | {computed} | {found['seconds']:.2f} | {found['all'] / 1e6:.0f} | {found['own'] / 1e6:.0f} |"
              f" {found['file'] / 1e6:.0f} | {ideal / 1e6:.0f} | {found['all'] / ideal:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]))
