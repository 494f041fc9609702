"""A token after a text, by three engines: an artifact, PyTorch, and onnxruntime-genai where it is installed.

    python tests/benchmarks/decode.py FOLDER [GENAI]     FOLDER keeps the model and the artifact; GENAI is the folder
                                                         that `onnxruntime_genai.models.builder` made of FOLDER/model

Medians of interleaved steps in one process on two threads each, in an order that turns round by round, so that none
finds the processor's cache as another left it.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LENGTHS, ROUNDS, THREADS = (64, 512, 2048), 24, 2
Step = Callable[[], object]


def model_in(folder: Path) -> Path:
    """A Llama of 125 million parameters: 12 layers, 12 heads over 4."""
    if not (folder / "config.json").is_file():
        from transformers import LlamaConfig, LlamaForCausalLM

        LlamaForCausalLM(
            LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
                        num_key_value_heads=4, vocab_size=32000, max_position_embeddings=4096)
        ).save_pretrained(folder)  # fmt: skip
    return folder


def artifact(session: Any, length: int) -> Step:
    """A step of an artifact's generation."""
    import torch

    model, held = session.generator, {}
    model._own.room = length + ROUNDS + 2
    with torch.no_grad():
        first = model.run(torch.ones(1, length, dtype=torch.long), position_ids=torch.arange(length)[None])
    held["cache"], held["length"] = first.past_key_values, length

    def step() -> None:
        at = held["length"]
        with torch.no_grad():
            found = model.run(torch.ones(1, 1, dtype=torch.long), past_key_values=held["cache"],
                              attention_mask=torch.ones(1, at + 1, dtype=torch.long),
                              position_ids=torch.tensor([[at]]))  # fmt: skip
        held["cache"], held["length"] = found.past_key_values, at + 1

    return step


def eager(model: Any, length: int) -> Step:
    """A step of the model in PyTorch."""
    import torch

    with torch.inference_mode():
        cache = model(torch.ones(1, length, dtype=torch.long)).past_key_values

    def step() -> None:
        with torch.inference_mode():
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)

    return step


def genai(model: Any, length: int) -> Step:
    """A step of onnxruntime-genai."""
    import numpy as np
    import onnxruntime_genai as og

    options = og.GeneratorParams(model)
    options.set_search_options(max_length=length + ROUNDS + 4, do_sample=False, min_length=length + ROUNDS + 4)
    generator = og.Generator(model, options)
    generator.append_tokens(np.ones((1, length), np.int32))

    def step() -> None:
        generator.generate_next_token()

    return step


def main(folder: Path, built: Path | None) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import peltc

    torch.set_num_threads(THREADS)
    base, out = model_in(folder / "model"), folder / "out"
    if not out.is_dir():
        lora = {"method": "lora", "at": ["attention.query", "attention.value"]}
        peltc.compile({"pelt": 1, "attach": [lora], "deploy": {"generation": True}}, base, out, verify=False)
    session = peltc.Session(out, ["CPUExecutionProvider"], threads=THREADS)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    makers: dict[str, Callable[[int], Step]] = {
        "peltc": lambda length: artifact(session, length),
        "PyTorch": lambda length: eager(model, length),
    }
    if built is not None and importlib.util.find_spec("onnxruntime_genai"):
        import onnxruntime_genai as og

        opened = og.Model(str(built))
        makers["onnxruntime-genai"] = lambda length: genai(opened, length)
    print(f"| keys | {' | '.join(f'{name}, ms' for name in makers)} |\n|--:|{'--:|' * len(makers)}")
    for length in LENGTHS:
        steps = {name: make(length) for name, make in makers.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        names = list(steps)
        for turn in range(ROUNDS):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = time.perf_counter()
                steps[name]()
                times[name].append(time.perf_counter() - start)
        medians = [1e3 * statistics.median(times[name][3:]) for name in names]
        print(f"| {length} | {' | '.join(f'{median:.1f}' for median in medians)} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
