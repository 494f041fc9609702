"""Samples: random inputs of several sizes, for verification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from peltc.compiler.base.base import Base
from peltc.compiler.senses.asked import Asked
from peltc.compiler.senses.examples import WORDS

Array = np.ndarray[Any, Any]

SHAPES = ((1, 7, 0), (3, 12, 5), (2, 19, 3))
"""Batch, length, and how many positions of the last sequence are padding."""

PARTS = ((1, 0.5, 0.0), (3, 0.8, 0.3), (2, 1.0, 0.2))
"""The same for a module with example inputs: batch, and shares of the examples' lengths."""


READ = (
    {"batch": 1, "text": 7, "target": 5, "sound": 80},
    {"batch": 3, "text": 12, "target": 9, "sound": 96},
    {"batch": 2, "text": 19, "target": 3, "sound": 64},
)
"""The same for a model that reads more than text: see `Sizes`."""


GENERATED = (3, 9, 4, 6)
"""Batch, length, padding of a prompt, and how many tokens follow it."""


def example(base: Base, batch: int, length: int, padding: int, seed: int) -> dict[str, Array]:
    """Random inputs: token ids that are no special tokens, a mask with padding, inputs of the decoder where it has
    some. Decoder-only models are padded on the left, as they are when they generate."""
    random = np.random.default_rng(seed)
    vocab = int(base.config.get("vocab_size", 100))
    low = min(10, vocab // 2)
    ids = random.integers(low, vocab, (batch, length))
    mask = np.ones((batch, length), np.int64)
    left = any(site.stack == "decoder" for site in base.anatomy) and not base.config.get("is_encoder_decoder")
    if padding:
        gone = slice(None, padding) if left else slice(length - padding, None)
        mask[-1, gone] = 0
        ids[-1, gone] = base.config.get("pad_token_id") or 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in base.export["kwargs"]:
        inputs["token_type_ids"] = (np.arange(length)[None] >= length // 2).astype(np.int64).repeat(batch, 0)
    if "decoder_input_ids" in base.export["kwargs"]:
        inputs["decoder_input_ids"] = random.integers(low, vocab, (batch, max(2, length - 3)))
    return {name: array for name, array in inputs.items() if name in base.export["kwargs"]}


def drawn(base: Base, batch: int, part: float, padding: float, seed: int) -> dict[str, Array]:
    """Random inputs that resemble the examples of a torch module which `transformers` does not have. No axis is longer
    than in the examples, since a table of positions may end there. An input whose values are 0 and 1 is taken for a
    mask, and ends in zeros.

    Args:
        part: the share of the examples' lengths.
        padding: the share of the last sequence that masks leave out.
    """
    random = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for name, like in (base.inputs or {}).items():
        rest = like["shape"][len(like["axes"]) :]
        shape = (batch, *(max(2, round(size * part)) for size in like["shape"][1 : len(like["axes"])]), *rest)
        low, high = like["low"], like["high"]
        array: Array
        if like["dtype"].startswith(("float", "bfloat")):
            array = random.uniform(low, high, shape) if low < high else random.normal(low, 1, shape)
        elif high == 1:
            array = np.ones(shape, np.int64)
            if len(shape) > 1 and padding:
                array[-1, shape[1] - max(1, int(shape[1] * padding)) :] = 0
        else:
            array = random.integers(low, high + 1, shape)
        found[name] = array.astype({"bfloat16": "float32"}.get(like["dtype"], like["dtype"]))
    return found


def made(base: Base, wanted: Mapping[str, int], seed: int) -> dict[str, Array]:
    """Random inputs of a model that reads more than text; sizes that its graph fixes are those of the example, and none
    is longer than its positions allow."""
    import transformers

    from peltc.compiler.export.torch_model import parse_config

    assert base.reading is not None
    cls = type(base.module) if base.module is not None else getattr(transformers, base.architecture)
    most = {size: base.limits["lengths"].get(WORDS[size], {}).get("most", length) for size, length in wanted.items()}
    sizes = base.reading.sizes(**{size: min(length, most[size]) for size, length in wanted.items()})
    inputs = base.reading.make(Asked.of(cls, parse_config(base.config)), sizes, seed)
    assert inputs is not None, base.reading
    return {name: tensor.numpy() for name, tensor in inputs.items() if name in base.export["kwargs"]}


def cases(base: Base) -> Iterator[tuple[int, int, int, dict[str, Array]]]:
    """What is compared: batch, length, padding, and inputs of this size."""
    if base.reading is not None:
        for seed, wanted in enumerate(READ):
            inputs = made(base, wanted, seed)
            yield len(next(iter(inputs.values()))), max(a.shape[1] for a in inputs.values() if a.ndim > 1), 0, inputs
        return
    if not base.inputs:
        for seed, (batch, length, padding) in enumerate(SHAPES):
            yield batch, length, padding, example(base, batch, length, padding, seed)
        return
    for seed, (batch, part, masked) in enumerate(PARTS):
        inputs = drawn(base, batch, part, masked, seed)
        lengths = [array.shape[1] for array in inputs.values() if array.ndim > 1]
        length = lengths[0] if lengths else 0
        yield batch, length, int(length * masked), inputs
