"""The functions that are exported of a model that generates: its encoder, and a step of its decoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def encode(model: Any) -> Callable[..., dict[str, Any]]:
    """The encoder with what the decoder's cross-attention makes of its states, as a function of ids and mask.

    The whole model runs for that, on tokens that do not matter: no key or value of the cross-attention depends on them.
    Outputs are named as the inputs of `decode` which take them.
    """
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.exporters.utils import get_leaf_tensors

    forward = model.forward

    def encoder(input_ids: Any, attention_mask: Any) -> dict[str, Any]:
        states = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        forward(
            encoder_outputs=states,
            attention_mask=attention_mask,
            decoder_input_ids=input_ids[:, :2],
            past_key_values=cache,
            use_cache=True,
        )
        crossed = get_leaf_tensors({"past_key_values": {"cross_attention_cache": cache.cross_attention_cache}})
        return {"last_hidden_state": states.last_hidden_state, **crossed}

    encoder.__signature__ = inspect.signature(encoder)  # type: ignore[attr-defined]
    return encoder


def step(model: Any) -> Callable[..., dict[str, Any]]:
    """The model's `forward` without the outputs that are inputs: the encoder's states, and what is made of them."""
    forward = model.forward

    def decoder(**kwargs: Any) -> dict[str, Any]:
        return reduced(forward(**kwargs))

    return decoder


def reduced(answer: Any) -> dict[str, Any]:
    """What is left of an encoder-decoder's answer in its `decode` graph."""
    grown = {"self_attention_cache": answer.past_key_values.self_attention_cache}
    return {"logits": answer.logits, "past_key_values": grown}
