"""What `generate` calls a model with, seen on tensors without memory."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

Kwargs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Example sizes: all different, since they tell the axes apart, and at least 2, since torch takes an axis of size 1
    for a constant."""

    batch: int
    past: int
    query: int
    keep: int
    source: int

    def names(self) -> dict[int, str]:
        """What an axis of some size is called."""
        return {
            self.batch: "batch",
            self.past: "past",
            self.query: "query",
            self.past + 1: "total",
            self.past + self.query: "total",
            self.keep: "keep",
            self.source: "source",
        }


EXAMPLE, OTHER = Sizes(2, 11, 5, 3, 7), Sizes(4, 17, 9, 6, 13)
TOKEN = 3


def capture(model: Any, sizes: Sizes) -> tuple[Kwargs, Any]:
    """What `generate` calls `forward` with when several tokens follow those of a cache, and what it is answered.

    Args:
        model: the model.
        sizes: sizes of the example.
    """
    import torch
    from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig
    from transformers.exporters.exporter_onnx import use_experts_implementation

    encodes = bool(model.config.is_encoder_decoder)
    new = sizes.query
    tokens = torch.full((sizes.batch, sizes.past + new), TOKEN)
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0  # `generate` drops a mask that masks nothing
    options = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=1, decoder_start_token_id=TOKEN, bos_token_id=TOKEN, pad_token_id=0
    )
    common: Kwargs = {"generation_config": options}
    cache: Any = DynamicCache()  # of full layers: one that keeps a window alone is no tensor of a graph
    if encodes:
        cache = EncoderDecoderCache(cache, DynamicCache())
        source = torch.full((sizes.batch, sizes.source), TOKEN)
        common |= {"input_ids": source, "attention_mask": torch.ones_like(source)}
    with _faked(model) as calls, use_experts_implementation(model, "batched_mm"):  # others refuse fake tensors
        for start, end in ((0, sizes.past), (sizes.past, sizes.past + new)):
            if encodes:  # the new tokens alone: `generate` takes the encoder's mask for the decoder's length
                given = common | {"decoder_input_ids": tokens[:, start:end]}
            else:
                given = common | {"input_ids": tokens[:, :end], "attention_mask": mask[:, :end]}
            model.generate(**given, past_key_values=cache)
            cache = calls[-1][1].past_key_values
            cache.__dict__.pop("_is_user_defined", None)
    decode, answer = calls[-1]
    decode["past_key_values"].__dict__.pop("_is_user_defined", None)
    if "logits_to_keep" in decode:  # as positions, which a graph can take
        decode["logits_to_keep"] = torch.zeros(sizes.keep, dtype=torch.long)
    return decode, answer


@contextlib.contextmanager
def _faked(model: Any) -> Iterator[list[tuple[Kwargs, Any]]]:
    """Let `generate` run a model without its parameters: `forward` runs on fake tensors and gives logits that are all
    equal. Yields what it is called with, and what it returns."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_map_only

    def blank(tensor: Any) -> Any:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    def run(forward: Callable[..., Any], kwargs: Kwargs) -> Any:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            result = forward(**tree_map_only(torch.Tensor, fake.from_tensor, kwargs))
        return tree_map_only(torch.Tensor, blank, result)

    calls: list[tuple[Kwargs, Any]] = []
    decode = model.forward

    def decoded(**kwargs: Any) -> Any:
        given = tree_map_only(torch.Tensor, blank, kwargs)
        result = run(decode, kwargs)
        calls.append((given, result))
        result["logits"] = torch.zeros(result.logits.shape, dtype=result.logits.dtype)
        return result

    with contextlib.ExitStack() as stack:
        if model.config.is_encoder_decoder:
            encoder = model.get_encoder()
            encoded = encoder.forward
            stack.enter_context(forward(encoder, lambda **kwargs: run(encoded, kwargs)))
        stack.enter_context(forward(model, decoded))
        yield calls


@contextlib.contextmanager
def forward(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Another `forward`, for a while, which passes for the one it replaces."""
    replaced = module.forward
    if not hasattr(function, "__signature__"):
        function.__signature__ = inspect.signature(replaced)  # type: ignore[attr-defined]
    own = "forward" in vars(module)
    module.forward = function
    try:
        yield
    finally:
        if own:
            module.forward = replaced
        else:
            del module.forward
