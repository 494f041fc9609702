"""Inputs that belong to no sense, by what they are called: each is made by one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peltc.compiler.senses.asked import Asked


def _at(asked: Asked) -> Any:
    import torch

    return torch.arange(asked.sizes.text).repeat(asked.sizes.batch, 1)


def _seen(asked: Asked, width: int) -> Any:
    return asked.floats(asked.sizes.batch, asked.sizes.text, width)


OTHERS: dict[str, Callable[[Asked], Any]] = {
    "states": lambda a: _seen(a, a.number("state_dim", default=17)),
    "actions": lambda a: _seen(a, a.number("act_dim", default=4)),
    "rewards": lambda a: _seen(a, 1),
    "returns_to_go": lambda a: _seen(a, 1),
    "timesteps": _at,
    "state": lambda a: a.floats(a.sizes.batch, a.number("max_state_dim", default=32)),
}
"""Inputs of models that act: [B, S, D], or [B, D]."""


def read(asked: Asked) -> dict[str, Any]:
    """Those of these inputs that a model takes, and a mask over their steps."""
    import torch

    found = {name: make(asked) for name, make in OTHERS.items() if name in asked.names}
    if "timesteps" in found and "attention_mask" in asked.names:
        found["attention_mask"] = torch.ones(asked.sizes.batch, asked.sizes.text, dtype=torch.long)
    return found
