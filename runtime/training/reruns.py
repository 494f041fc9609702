"""Checkpointed layers, which run again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn


class Memory(Protocol):
    """What attached modules remember of a forward pass."""

    mask: Any
    decoder_mask: Any
    seen: dict[str, Any]


class Rerun:
    """A layer with gradient checkpointing, which runs again in the backward pass. It then sees the masks of its first
    run, whatever the model was called with in between; what it remembers during the second run is dropped at its end.
    """

    def __init__(self, checkpoint: Callable[..., Any], attached: Memory):
        self.checkpoint, self.attached = checkpoint, attached

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        own, first = self.attached, True
        masks = own.mask, own.decoder_mask

        def run(*inputs: Any, **more: Any) -> Any:
            nonlocal first
            if first:
                first = False
                return layer(*inputs, **more)
            before = own.mask, own.decoder_mask, own.seen
            own.mask, own.decoder_mask, own.seen = *masks, {}
            try:
                return layer(*inputs, **more)
            finally:
                own.mask, own.decoder_mask, own.seen = before

        return self.checkpoint(run, *args, **kwargs)


def remember_reruns(model: nn.Module, attached: Memory) -> None:
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            checkpoint: Any = getattr(layer, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not isinstance(checkpoint, Rerun):
                layer._gradient_checkpointing_func = Rerun(checkpoint, attached)  # type: ignore[assignment]


def forget_reruns(model: nn.Module) -> None:
    for layer in model.modules():
        checkpoint: Any = getattr(layer, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, Rerun):
            layer._gradient_checkpointing_func = checkpoint.checkpoint  # type: ignore[assignment]
