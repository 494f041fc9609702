"""Tokens before the text in graphs that generate: their keys and values are in the cache before the first token.

    decode     attention_mask ─► concat(1, ·),  position_ids ─► · + P: the text follows the tokens
    encoder    input_ids ─► lookup ─► concat(tokens, ·);  attention_mask ─► concat(1, ·)

A decoder that reads an encoder's states sees them by a mask that is longer too. What else an encoder derives from its
ids, lengths and positions, it derives from ids that are as many as all tokens and none of which is padding: as
`transformers` does for a text that comes embedded. Where profiles bring anything, a decoder's graph reads the tokens
itself, see `read_first`, and rows of an encoder's may have fewer than others, see `uneven`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from peltc.compiler.interpreters.emitter import Emitter, replace_uses
from peltc.compiler.passes.prepend import Array, in_front, no_padding, tokens_of
from peltc.compiler.passes.read_first import read_first
from peltc.compiler.passes.uneven import INTEGER, Uneven
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
    exchange: bool = False,
) -> None:
    """Let a graph that generates read a text behind tokens, in place.

    Args:
        stage: which graph it is, `decode` or `encoder`.
        claims: those that put tokens before the sequence.
        sites: the graph's own.
        config: the model's.
        exchange: whether profiles bring anything.

    Raises:
        PeltError: E208 as `read_first`.
    """
    graph, tokens = model.graph, tokens_of(claims, tensors)
    ids = next((v for v in graph.inputs if v.name == "input_ids"), None)
    own = stage == "decode" and ids is not None
    if own and exchange:
        read_first(model, claims[0], tokens, sites, config)
        return
    emitter = Emitter(graph, ir.DataType.FLOAT, f"pelt.{claims[0].attachment}", claims[0].marks)
    begun = emitter.constant(tokens[None], "tokens") if stage == "encoder" else None
    uneven = None
    if claims[0].uneven:
        text = next(v for v in graph.inputs if v.name == "attention_mask") if ids is None else ids
        uneven = Uneven(emitter, len(tokens), text)
    if ids is not None and begun is not None:
        _embed(graph, begun, uneven, sites[claims[0].site.key], ids, config, emitter)
    follow(model, len(tokens), claims[0], own, uneven)


def follow(model: ir.Model, length: int, claim: Claim, own: bool = True, uneven: Uneven | None = None) -> None:
    """Let the text of a graph that generates follow others, which the cache begins with or an encoder has read, in
    place.

    Args:
        length: how many.
        claim: what they are of.
        own: whether they stand before the text that the graph reads; otherwise, before an encoder's.
        uneven: where rows have different numbers of them, which an encoder has turned.
    """
    graph = model.graph
    inputs = {v.name: v for v in graph.inputs}
    emitter = Emitter(graph, ir.DataType.FLOAT, f"pelt.{claim.attachment}", claim.marks)
    behind = own and "decoder_input_ids" in inputs
    mask, positions = inputs.get("decoder_attention_mask" if behind else "attention_mask"), inputs.get("position_ids")
    if own and claim.takes and claim.uneven and mask is not None:
        uneven = Uneven(emitter, length, inputs["decoder_input_ids" if behind else "input_ids"])
    if positions is not None and own:
        counted = emitter.constant(np.int64(length), "positions", INTEGER) if uneven is None else uneven.count
        shifted = emitter.node("Add", [positions, counted])
        shifted.type = positions.type
        replace_uses(positions, shifted, emitter.added, graph)
    if mask is not None:
        _rename(mask)
        dtype = mask.dtype or ir.DataType.INT64
        if uneven is None:
            ones = emitter.constant(np.ones((1, length), dtype.numpy()), "attention_mask", dtype)
            wide = in_front(mask, ones, mask, [1, length], emitter)
            kept = emitter.added
        else:
            wide = in_front(mask, uneven.filled(dtype), mask, [1, length], uneven.emitter)
            wide = wide if own else uneven.turned(wide)
            kept = uneven.emitter.added
        replace_uses(mask, wide, kept, graph)
    graph.sort()
    RemoveUnusedNodesPass()(model)


def _embed(
    graph: ir.Graph,
    tokens: ir.Value,
    uneven: Uneven | None,
    site: Site,
    ids: ir.Value,
    config: Mapping[str, Any],
    emitter: Emitter,
) -> None:
    """Put tokens [1, P, D] before embedded ids."""
    _rename(ids)
    assert tokens.shape is not None
    sizes = [int(size) for size in tokens.shape]  # type: ignore[arg-type]
    looked_up = next(v for node in graph for v in node.outputs if v.name == site.values["y"])
    table = next(v for v in graph.inputs if v.name == site.parameters["weight"])
    rows = emitter.node("Gather", [table, ids], {"axis": 0})
    joined = in_front(rows, tokens, ids, sizes, emitter)
    joined = joined if uneven is None else uneven.turned(joined)
    joined.shape = ir.Shape(["batch", "source", sizes[2]])
    # Ids of no meaning: one that is no padding, as often as there are tokens.
    some = np.full((1, 1), no_padding(config), np.int64)
    whole = emitter.node("Add", [emitter.node("Shape", [ids]), emitter.integers([0, sizes[1]])])
    all_ids = emitter.node("Expand", [emitter.constant(some, "ids", ir.DataType.INT64), whole])
    all_ids.type = ids.type
    replace_uses(ids, all_ids, emitter.added, graph)
    replace_uses(looked_up, joined, emitter.added, graph)


def _rename(value: ir.Value) -> None:
    """Call an input's axes after the text alone."""
    value.shape = ir.Shape(TEXT if str(size) in LONGER else size for size in value.shape or ())
