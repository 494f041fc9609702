"""Tokens before the text in graphs that generate: their keys and values are in the cache before the first token.

    decode     attention_mask ─► concat(1, ·),  position_ids ─► · + P: the text follows the tokens
    encoder    input_ids ─► lookup ─► concat(tokens, ·);  attention_mask ─► concat(1, ·)

A decoder that reads an encoder's states sees them by a mask that is longer too. What else an encoder derives from its
ids, lengths and positions, it derives from ids that are as many as all tokens and none of which is padding: as
`transformers` does for a text that comes embedded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from peltc.compiler.interpreters.emitter import Emitter, replace_uses
from peltc.compiler.passes.prepend import Array, in_front, tokens_of
from peltc.compiler.plan.claims import Claim
from peltc.compiler.survey.anatomy import Site

TEXT = "text"
"""What the axes of the text alone are called; inside, those of the text behind the tokens keep their names."""
LONGER = {"total", "source"}
"""Axes that are longer inside than an input of ids, or of their mask."""


def begin(
    model: ir.Model,
    stage: str,
    claims: Sequence[Claim],
    tensors: Mapping[str, Array],
    sites: Mapping[str, Site],
    config: Mapping[str, Any],
) -> None:
    """Let a graph that generates read a text behind tokens, in place.

    Args:
        stage: which graph it is, `decode` or `encoder`.
        claims: those that put tokens before the sequence.
        sites: the graph's own.
        config: the model's.
    """
    graph, tokens = model.graph, tokens_of(claims, tensors)
    ids = next((v for v in graph.inputs if v.name == "input_ids"), None)
    if stage == "encoder" and ids is not None:
        emitter = Emitter(graph, ir.DataType.FLOAT, f"pelt.{claims[0].attachment}", claims[0].marks)
        _embed(graph, tokens, sites[claims[0].site.key], ids, config, emitter)
    follow(model, len(tokens), claims[0], own=stage == "decode" and ids is not None)


def follow(model: ir.Model, length: int, claim: Claim, own: bool = True) -> None:
    """Let the text of a graph that generates follow others, which the cache begins with or an encoder has read, in
    place.

    Args:
        length: how many.
        claim: what they are of.
        own: whether they stand before the text that the graph reads; otherwise, before an encoder's.
    """
    graph = model.graph
    inputs = {v.name: v for v in graph.inputs}
    emitter = Emitter(graph, ir.DataType.FLOAT, f"pelt.{claim.attachment}", claim.marks)
    behind = own and "decoder_input_ids" in inputs
    mask, positions = inputs.get("decoder_attention_mask" if behind else "attention_mask"), inputs.get("position_ids")
    if positions is not None and own:
        shifted = emitter.node("Add", [positions, emitter.constant(np.int64(length), "positions", ir.DataType.INT64)])
        shifted.type = positions.type
        replace_uses(positions, shifted, emitter.added, graph)
    if mask is not None:
        _rename(mask)
        dtype = mask.dtype or ir.DataType.INT64
        ones = emitter.constant(np.ones((1, length), dtype.numpy()), "attention_mask", dtype)
        wide = in_front(mask, ones, mask, [1, length], emitter)
        replace_uses(mask, wide, emitter.added, graph)
    graph.sort()
    RemoveUnusedNodesPass()(model)


def _embed(
    graph: ir.Graph, tokens: Array, site: Site, ids: ir.Value, config: Mapping[str, Any], emitter: Emitter
) -> None:
    """Put tokens before embedded ids."""
    _rename(ids)
    looked_up = next(v for node in graph for v in node.outputs if v.name == site.values["y"])
    emitter.dtype = looked_up.dtype or ir.DataType.FLOAT
    table = next(v for v in graph.inputs if v.name == site.parameters["weight"])
    rows = emitter.node("Gather", [table, ids], {"axis": 0})
    joined = in_front(rows, emitter.constant(tokens[None], "tokens"), ids, [1, *tokens.shape], emitter)
    # Ids of no meaning: one that is no padding, as often as there are tokens.
    some = np.full((1, 1), no_padding(config), np.int64)
    sizes = emitter.node("Add", [emitter.node("Shape", [ids]), emitter.integers([0, len(tokens)])])
    all_ids = emitter.node("Expand", [emitter.constant(some, "ids", ir.DataType.INT64), sizes])
    all_ids.type = ids.type
    replace_uses(ids, all_ids, emitter.added, graph)
    replace_uses(looked_up, joined, emitter.added, graph)


def no_padding(config: Mapping[str, Any]) -> int:
    """An id that is not the padding's."""
    return int(config.get("pad_token_id") == 0)


def _rename(value: ir.Value) -> None:
    """Call an input's axes after the text alone."""
    value.shape = ir.Shape(TEXT if str(size) in LONGER else size for size in value.shape or ())
