"""Attachments of each kind that profiles bring, and random adapters for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from peltc.runtime.building.compile import plan_for
from peltc.spec.specification import load_spec

Folder = Callable[..., Path]
Array = np.ndarray[Any, Any]
CPU = ["CPUExecutionProvider"]
LORA = [{"method": "lora", "at": ["attention.query", "attention.value"], "r": 4}]
ATTACHED: dict[str, list[dict[str, Any]]] = {
    "deltas": LORA,
    "blocks": [{"method": "bottleneck", "at": "feed_forward.block"}],
    "outputs": [{"method": "ia3", "at": ["attention.key", "attention.value"]}],
    "weights": [{"method": "dora", "at": "attention.query"}],
    "keys": [{"method": "prefix", "at": "attention"}],
    "gates": [{"recipe": "unipelt"}],
    "mixtures": [{"recipe": "adamix"}],
    "banks": [{"method": "bottleneck", "at": "feed_forward.block", "bank": {"size": 8, "k": 4, "std": 0.5}}],
    "soft masks": [{**LORA[0], "bank": {"size": 5, "mask": "soft", "std": 0.5}}],
    "all chosen": [
        {
            "method": "bottleneck",
            "at": "attention.block",
            "inner_norm": "affine",
            "bank": {"size": 3, "k": 3, "normalise": "sum"},
        }
    ],
    "tables": [{"method": "lora", "at": "embedding.word"}],
    "norms": [{"method": "norm_tuning", "at": "*norm"}],
}


def spec_of(attach: list[dict[str, Any]], name: str = "first") -> Any:
    return load_spec({"pelt": 1, "name": name, "attach": attach})


def drawn(spec: Any, base: Path, seed: int) -> dict[str, Array]:
    """Random values of all that is trained; what is frozen has the values that the seed decides."""
    plan, _ = plan_for(spec, base)
    draw = np.random.default_rng(seed)
    return {name: draw.normal(0, 0.2, tensor.shape).astype(np.float32) for name, tensor in plan.tensors.items()
            if not tensor.source}  # fmt: skip


def given(family: str) -> dict[str, Any]:
    inputs = {"input_ids": [[5, 6, 7, 8], [4, 9, 7, 3]], "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0]]}
    return {**inputs, "decoder_input_ids": [[5, 6], [1, 2]]} if family == "t5" else inputs
