"""What the tests of attached modules share: inputs of a tiny model, random weights, its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def batch(padding: int = 4) -> dict[str, torch.Tensor]:
    """Three sequences of nine tokens, the last of them padded."""
    ids = torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padding:
        ids[-1, -padding:], mask[-1, -padding:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def shake(module: nn.Module, std: float = 0.2, seed: int = 0) -> None:
    """Add noise to everything trained, so that nothing is neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))


def answer(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits
    return logits
