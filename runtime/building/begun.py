"""What the cache of an artifact begins with where tokens stand before every text: the graph that generates reads them
once, as if they were embedded words, and what is in the cache then is there before any text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from peltc.compiler.base.base import Base
from peltc.compiler.files.manifest import CACHE, GIVEN, GROWN
from peltc.compiler.files.talk import Talk
from peltc.compiler.graphs.wide import HALF, widen
from peltc.compiler.passes.prepend import tokens_of
from peltc.compiler.plan.claims import Plan
from peltc.runtime.verification.quantised import exact
from peltc.runtime.verification.rewritten import Rewritten

Array = np.ndarray[Any, Any]
GIVEN_CACHE, GROWN_CACHE = f"{GIVEN}past_key_values.", f"{GROWN}past_key_values."
TOKENS = "pelt.tokens"
"""What the input is called through which tokens come embedded."""


def begin(folder: Path, plan: Plan, tensors: Mapping[str, Array], decode: Base, talk: Talk) -> int:
    """Read the plan's tokens, where they stand before the text of a decoder, into the start of an artifact's cache.

    Args:
        folder: of the artifact, whose graphs are written.
        tensors: the adapter's.
        decode: the base of the graph with a cache.

    Returns:
        How many tokens stand before a text.
    """
    claims = [claim for claim in plan.claims if "prepend" in claim.effects]
    tokens = tokens_of(claims, tensors)
    if claims[0].site.stack == "encoder" or plan.exchange:  # which the graph reads itself
        return len(tokens)
    talk(f"reading the {len(tokens)} tokens before the text into the cache")
    site = next(s for s in decode.anatomy if s.kind == "embedding" and s.role == claims[0].site.role)
    starts = load_file(folder / CACHE) if (folder / CACHE).is_file() else {}
    with Beginning(folder, site.values["y"]) as session:
        opened = session.open("decode.onnx")
        names = [value.name for value in opened.get_outputs() if value.name.startswith(GROWN_CACHE)]
        grown = opened.run(names, {value.name: fed(value, tokens, starts) for value in opened.get_inputs()})
    found = {GIVEN_CACHE + name.removeprefix(GROWN_CACHE): array for name, array in zip(names, grown, strict=True)}
    save_file({name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}, folder / CACHE)
    return len(tokens)


class Beginning(Rewritten):
    """An artifact's graph with a cache that reads embedded tokens, in float32, by quantised weights too.

    Args:
        embedded: the name of the value that embedded words are.
    """

    def __init__(self, folder: Path, embedded: str):
        super().__init__(folder, ["CPUExecutionProvider"], spinning=False)
        self.embedded = embedded

    def computes(self) -> str:
        return "float32"

    def rewrite(self, model: Any) -> None:
        import onnx_ir as ir

        exact(model)  # what every text begins with is not rounded
        if any(value.dtype in HALF for value in model.graph.inputs):
            widen(model)
        words = next(value for node in model.graph for value in node.outputs if value.name == self.embedded)
        tokens = ir.Value(name=TOKENS, shape=words.shape, type=ir.TensorType(ir.DataType.FLOAT))
        words.replace_all_uses_with(tokens)
        model.graph.inputs.append(tokens)


def fed(value: Any, tokens: Array, starts: Mapping[str, Array]) -> Array:
    """What an input is while the tokens are read: the text is empty, and positions are counted from its first."""
    if value.name == TOKENS:
        return tokens[None]
    if value.name in starts:
        return starts[value.name]
    if value.name == "position_ids":
        return np.arange(-len(tokens), 0)[None]
    known = {"batch": 1, "query": len(tokens), "keep": 1}
    shape = [size if isinstance(size, int) else known.get(size, 0) for size in value.shape]
    return np.zeros(shape, np.float32 if value.type == "tensor(float)" else np.int64)
