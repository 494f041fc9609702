"""What is attached in the conformance suite: every shipped method, in every variant that takes another path."""

from __future__ import annotations

from typing import Any

import numpy as np

QV = ["attention.query", "attention.value"]
BLOCK = "feed_forward.block"

CASES: dict[str, list[dict[str, Any]]] = {
    "lora": [{"method": "lora", "at": QV, "r": 4}],
    "lora-everywhere": [{"method": "lora", "at": ["*attention.*", "feed_forward.*", "head"], "r": 2}],
    "lora-rank-stabilised": [{"method": "lora", "at": QV, "r": 4, "rank_stabilised": True}],
    "dora": [{"method": "dora", "at": QV, "r": 4}],
    "adalora": [{"method": "adalora", "at": QV, "r": 4}],
    "loha": [{"method": "loha", "at": QV, "r": 4}],
    "lokr": [{"method": "lokr", "at": [*QV, "feed_forward.up"], "r": 2}],
    "lokr-full": [{"method": "lokr", "at": QV, "r": 0}],
    "vera": [{"method": "vera", "at": QV, "r": 16}],
    "ia3": [
        {"method": "ia3", "at": ["attention.key", "attention.value"]},
        {"method": "ia3", "name": "ia3_ff", "at": "feed_forward.down", "position": "input"},
    ],
    "bitfit": [{"method": "bitfit", "at": ["*attention.*", "feed_forward.*"]}],
    "norm_tuning": [{"method": "norm_tuning", "at": "*norm"}],
    "bottleneck": [{"method": "bottleneck", "at": ["*attention.block", BLOCK], "reduction": 4}],
    "bottleneck-sum": [{"method": "bottleneck", "at": BLOCK, "reads": "sum", "size": 6, "activation": "gelu"}],
    "bottleneck-normed": [{"method": "bottleneck", "at": BLOCK, "reads": "normed", "reduction": 4}],
    "bottleneck-layer": [{"method": "bottleneck", "at": "layer", "reduction": 4, "activation": "silu"}],
    "bottleneck-linear": [{"method": "bottleneck", "at": BLOCK, "reduction": 4, "activation": "identity"}],
    "parallel_adapter": [{"method": "parallel_adapter", "at": BLOCK, "reduction": 4}],
    "parallel_adapter-residual": [{"method": "parallel_adapter", "at": BLOCK, "reduction": 4, "reads": "residual"}],
    "compacter": [{"method": "compacter", "at": ["*attention.block", BLOCK], "reduction": 4, "n": 2}],
    "linear_adapter": [{"method": "linear_adapter", "at": ["attention.output", "feed_forward.down"], "size": 4}],
    "prefix": [{"method": "prefix", "at": "*attention", "length": 3, "hidden": 8}],
    "prefix-flat": [{"method": "prefix", "at": "attention", "length": 3, "reparameterise": False, "layers": [1]}],
    "prompt": [{"method": "prompt", "at": "embedding.word", "length": 3}],
    "oft": [{"method": "oft", "at": QV, "block": 8}],
    "oft-exact": [{"method": "oft", "at": QV, "block": 8, "neumann": False}],
    "several": [
        {"method": "lora", "at": ["attention.*", "feed_forward.*"], "r": 2},
        {"method": "bottleneck", "at": BLOCK, "reduction": 4},
        {"method": "prefix", "at": "attention", "length": 2, "reparameterise": False},
        {"method": "norm_tuning", "at": "*norm"},
    ],
    "outer-before-inner": [
        {"method": "bottleneck", "at": BLOCK, "reduction": 4},
        {"method": "lora", "at": "feed_forward.down", "r": 2},
    ],
    "several-at-one-site": [
        {"method": "lora", "at": QV, "r": 2},
        {"method": "lora", "name": "second", "at": "attention.query", "r": 3},
        {"method": "ia3", "at": "attention.query", "after": ["lora", "second"]},
        {"method": "ia3", "name": "values", "at": "attention.value", "after": "lora"},
    ],
    "bottleneck-inner-norm": [{"method": "bottleneck", "at": BLOCK, "size": 6, "inner_norm": "affine"}],
    "tiny_attention": [{"method": "tiny_attention", "at": BLOCK, "size": 4}],
    "tiny_attention-early": [{"method": "tiny_attention", "at": "attention.block"}],
    "lorahub": [{"method": "lorahub", "at": QV, "modules": 3, "r": 2}],
    "lorahub-delta": [{"method": "lorahub", "at": QV, "modules": 3, "r": 2, "rule": "delta_linear"}],
    "mole": [{"method": "mole", "at": QV, "experts_count": 3, "r": 2}],
    "replace": [{"method": "replace", "at": ["feed_forward.up", "attention.query"]}],
    "replace-table": [{"method": "replace", "at": "*embedding.word"}],
    "lora-tables": [{"method": "lora", "at": "*embedding.*", "r": 2}],
    "rows": [{"method": "trainable_tokens", "at": "*embedding.word", "rows": [3, "10-12"]}],
    "gate-lora": [{"method": "lora", "at": QV, "r": 2, "gate": True}],
    "gate-lora-masked": [{"method": "lora", "at": QV, "r": 2, "gate": {"mask_padding": True, "replaces_scale": False}}],
    "gate-block-masked": [
        {"method": "bottleneck", "at": "attention.block", "reduction": 4, "gate": {"mask_padding": True}}
    ],
    "gate-constant": [{"method": "lora", "at": QV, "r": 2, "gate": {"constant": True}}],
    "gate-prefix": [
        {"method": "prefix", "at": "attention", "length": 2, "hidden": 8, "gate": True},
    ],
    "gate-adapter": [{"method": "bottleneck", "at": BLOCK, "reads": "normed", "reduction": 4, "gate": True}],
    "gate-central": [{"recipe": "unipelt_central", "r": 2, "length": 3, "hidden": 8, "reduction": 4}],
    "gate-ia3": [
        {"method": "ia3", "at": ["attention.key", "feed_forward.up"], "gate": {"scales": "result"}},
        {"method": "ia3", "name": "values", "at": "attention.value", "gate": True},
    ],
    "experts-adapter": [{"method": "bottleneck", "at": BLOCK, "reduction": 4, "experts": {"share": "up"}}],
    "experts-lora": [{"method": "lora", "at": QV, "r": 2, "experts": {"count": 3, "share": "B"}}],
    "experts-prefix": [{"method": "prefix", "at": "attention", "length": 2, "hidden": 4, "experts": True}],
    "bank-hard": [{"method": "bottleneck", "at": BLOCK, "reduction": 4, "bank": {"size": 9, "k": 4}}],
    "bank-soft": [{"method": "bottleneck", "at": BLOCK, "reduction": 4, "bank": {"size": 9, "mask": "soft"}}],
    "bank-lora": [{"method": "lora", "at": QV, "r": 2, "bank": {"size": 5, "k": 2, "normalise": "sum"}}],
    "generate": [
        {
            "method": "bottleneck",
            "at": ["attention.block", BLOCK],
            "size": 4,
            "generate": {"tasks": 3, "task": 1, "size": 4, "hidden": 6},
        }
    ],
    "generate-ia3": [
        {"method": "ia3", "at": ["attention.query", "attention.output"], "generate": {"size": 4, "hidden": 6}}
    ],
    "prototype": [{"method": "bottleneck", "at": BLOCK, "size": 4, "prototype": {"keep": 0.3}}],
    "bank-of-experts-gated": [
        {
            "method": "bottleneck",
            "at": BLOCK,
            "size": 4,
            "bank": {"size": 5, "k": 2},
            "experts": {"count": 2},
            "gate": True,
        }
    ],
    "unipelt": [{"recipe": "unipelt", "r": 2, "length": 3, "hidden": 8, "reduction": 4}],
    "unipelt_ia3": [{"recipe": "unipelt_ia3", "length": 3, "hidden": 8, "reduction": 4}],
    "mam": [{"recipe": "mam", "length": 3, "hidden": 8, "reduction": 4}],
    "hyperpelt": [{"recipe": "hyperpelt", "size": 4, "hidden": 6, "reduction": 8, "length": 2}],
    "own-nonlinear": [{"method": "bend", "at": QV, "s": 0.5}],
    "own-affine": [{"method": "shear", "at": QV}],
}

OWN: dict[str, Any] = {
    "bend": {
        "title": "A user's own, which stays in the graph",
        "source": "these tests",
        "site": "linear",
        "options": {"s": {"type": "number", "default": 1.0}},
        "parameters": {"A": {"shape": ["out", "in"], "init": "zeros"}},
        "delta": "s * tanh(linear(x, A))",
    },
    "shear": {
        "title": "A user's own, which folds by itself",
        "source": "these tests",
        "site": "linear",
        "parameters": {"u": {"shape": ["out"], "init": "zeros"}, "A": {"shape": ["out", "in"], "init": "zeros"}},
        "output": "y * (1 + u) - 2 * linear(x, A) + u",
    },
}

WRAPS = ("gate", "experts", "bank", "generate", "prototype")
COMBINED = {name for name in CASES if name.partition("-")[0] in WRAPS} | {
    "unipelt", "unipelt_ia3", "mam", "hyperpelt", "lorahub-delta", "tiny_attention-early",
}  # fmt: skip
"""Cases of combinators and recipes: the same formulas as in other cases, combined."""

SAMPLE = ("bert", "llama", "t5")
"""Families that every case runs on: an encoder, a decoder with grouped heads, both at once."""

FOLDS = {
    "lorahub", "lorahub-delta", "replace", "replace-table", "lora-tables", "rows", "gate-constant", "experts-lora",
    "bank-lora", "generate-ia3",
    "lora", "lora-everywhere", "lora-rank-stabilised", "dora", "adalora", "loha", "lokr", "lokr-full", "vera", "ia3",
    "norm_tuning", "oft", "oft-exact", "several-at-one-site", "own-affine", "bottleneck-linear",
    "linear_adapter", "bitfit",
}  # fmt: skip
"""Cases whose effect is affine: nothing of them stays in the graph."""

NEED_BIAS = {"bitfit", "linear_adapter", "bottleneck-linear", "own-affine"}
"""Of these, cases that change biases: a map without one gets one, in one more addition."""


def spec(case: str, family: str, mode: str = "fold", precision: str = "checkpoint") -> dict[str, Any]:
    """The content of a spec."""
    entries = [dict(entry) for entry in CASES[case]]
    for entry in entries:
        if entry.get("method") == "prompt" and family == "t5":
            entry["at"] = "encoder.embedding.word"
        if family == "minilm" and "head" in entry.get("at", ()):
            entry["at"] = [at for at in entry["at"] if at != "head"] + ["pooler"]
    own = {entry.get("method") for entry in entries} & set(OWN)
    methods = {"methods": {name: OWN[name] for name in sorted(own)}} if own else {}
    return {"pelt": 1, "attach": entries, **methods, "deploy": {"mode": mode, "precision": precision}}


def tensors(plan: Any, scale: float = 0.1, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors for a plan: none is zero, and those that multiply lie around one."""
    random = np.random.default_rng(seed)
    found = {}
    for name, tensor in plan.tensors.items():
        around = 1.0 if name.rsplit(".", 1)[1] in ("l", "m", "gain") else 0.0
        found[name] = random.normal(around, scale, tensor.shape).astype(np.float32)
    return found
