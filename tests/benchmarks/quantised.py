"""What a quantised base saves: files and time per token of a language model, with LoRA beside it and without.

    python tests/benchmarks/quantised.py FOLDER

Random weights of a Llama of 12 layers, 12 heads over 4, 768 wide. Medians of interleaved runs in one process, on the
CPU; each token is a step of the artifact's own graph after 64 keys.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from peers import CPU, interleaved, ratio

PAST, ROUNDS = 64, 60
FORMS: dict[str, tuple[Any, bool]] = {
    "float32": (None, False),
    "float32, LoRA": (None, True),
    "int4": ("int4", False),
    "int4, LoRA": ("int4", True),
    "int4 with its head": ({"to": "int4", "except": "embedding.word"}, False),
    "int4, all": ({"to": "int4", "except": []}, False),
    "int4, all, LoRA": ({"to": "int4", "except": []}, True),
    "int4, all, blocks of 64": ({"to": "int4", "except": [], "block": 64}, False),
    "int4, float inputs": ({"to": "int4", "compute": "float"}, False),
    "int4, no zero points": ({"to": "int4", "zeros": False}, False),
    "int8": ("int8", False),
}


def checkpoint(folder: Path) -> Path:
    """The model in float16."""
    if not (folder / "config.json").is_file():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
                             num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048)  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    return folder


def artifact(model: Path, out: Path, quantise: Any, lora: bool) -> Path:
    """An artifact with its graphs for generation; LoRA of rank 8 at queries and values stays in the graph."""
    import peltc

    entry = {"method": "lora", "at": ["attention.query", "attention.value"], "r": 8}
    deploy = {"generation": True, "precision": "float32", "mode": "static" if lora else "fold"}
    spec = {"pelt": 1, "name": "x", "attach": [entry], "deploy": deploy | ({"quantise": quantise} if quantise else {})}
    random = np.random.default_rng(0)
    tensors = peltc.plan(spec, model).tensors
    peltc.compile(spec, model, out, {n: random.normal(0, 0.01, t.shape).astype(np.float32) for n, t in tensors.items()},
                  verify=False)  # fmt: skip
    return out


def step(out: Path) -> Callable[[], object]:
    """A token after `PAST` keys, by ONNX Runtime alone."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(out / "decode.onnx", options, providers=CPU)
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        sizes = {"batch": 1, "query": 1, "past": PAST, "total": PAST + 1}
        shape = [n if isinstance(n, int) else next((s for w, s in sizes.items() if w in n), 1) for n in value.shape]
        kind = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(bool)": np.bool_}[value.type]
        feeds[value.name] = np.full(shape, {"logits_to_keep": 0, "position_ids": PAST}.get(value.name, 1), kind)
    return lambda: session.run(None, feeds)


def main(folder: Path) -> None:
    model = checkpoint(folder / "model")
    half = (model / "model.safetensors").stat().st_size
    steps, sizes = dict[str, Callable[[], object]](), dict[str, int]()
    for name, (quantise, lora) in FORMS.items():
        out = folder / name.replace(" ", "-").replace(",", "")
        if not (out / "pelt.json").is_file():
            artifact(model, out, quantise, lora)
        files = [file for file in out.iterdir() if file.suffix in (".data", ".onnx", ".safetensors")]
        sizes[name] = sum(file.stat().st_size for file in files if file.name != "adapter.safetensors")
        steps[name] = step(out)
    times = interleaved(steps, ROUNDS)
    print("| form | files | of float16 | ms per token | of float32 |\n|---|---|---|---|---|")
    for name in FORMS:
        share, typical = ratio(times, name, "float32"), statistics.median(times[name])
        print(f"| {name} | {sizes[name] / 1e6:.1f} MB | {sizes[name] / half:.2f} | {1e3 * typical:.1f} | {share:.2f} |")
    for name in ("float32", "int4", "int4, all"):
        print(f"LoRA beside {name}: x {ratio(times, f'{name}, LoRA', name):.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
