"""Attention through the interface of `transformers`, with keys and values that modules change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peltc.runtime.training.evaluation import Tensor
from peltc.spec.diagnostics import fail

INTERFACE = "peltc"


def route(model: Any) -> Callable[[], None]:
    """Send the model's attention through this module; returns how to undo it."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask

    def masks(*args: Any, **kwargs: Any) -> Any:
        # A mask that is left out because it is plainly causal could not be made longer.
        kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(*args, **kwargs)

    if INTERFACE not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
        AttentionInterface.register(INTERFACE, _attention)
        AttentionMaskInterface.register(INTERFACE, masks)
    before = model.config._attn_implementation
    if before == INTERFACE:
        return lambda: None
    if before != "sdpa":
        raise fail("E209", f"the model's attention is '{before}'", expected="attn_implementation='sdpa'",
                   hint="load the model with attn_implementation='sdpa'")  # fmt: skip
    model.set_attn_implementation(INTERFACE)
    return lambda: model.set_attn_implementation(before)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """`sdpa` attention over the keys and values that the modules define."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    change = getattr(module, "_pelt_change", None)
    if change is not None:
        key, value, before, behind = change(query, key, value)
        if before or behind:
            if attention_mask is not None:
                attention_mask = longer(attention_mask, before, behind, attention_mask.dtype == torch.bool)
            if kwargs.get("position_bias") is not None:
                kwargs["position_bias"] = longer(kwargs["position_bias"], before, behind, False)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def longer(mask: Tensor, before: int, behind: int, fill: bool) -> Tensor:
    """A mask [..., T] that shows the positions before and behind the text's too."""
    return nn.functional.pad(mask, (before, behind), value=fill)
