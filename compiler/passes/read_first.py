"""Tokens before the text that a graph with a cache reads itself, together with the first of the text: what profiles
bring, or what is read by modules that profiles bring.

    input_ids ─► lookup ─► concat(tokens, ·)     while nothing is in the cache; nothing is joined ever after
    position_ids ─► concat(0 ... P - 1, · + P)   likewise, from each row's own first token on
    attention_mask ─► concat(shown, ·)
    logits_to_keep ─► · + P                      likewise

The cache then holds what all modules of the row's profile make of its tokens, and no step reads them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter, replace_uses
from peltc.compiler.passes.prepend import Array, in_front, no_padding, without
from peltc.compiler.passes.uneven import INTEGER, Uneven
from peltc.compiler.plan.claims import Claim
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import fail

TEXT = {"query": "new", "total": "text"}
"""What the axes of inputs are called that are shorter than within the graph."""


def read_first(
    model: ir.Model, claim: Claim, tokens: Array, sites: Mapping[str, Site], config: Mapping[str, Any]
) -> None:
    """Let a decoder's graph with a cache read tokens before the text, in place.

    Args:
        claim: the first of those that put them there.
        tokens: theirs [P, D].
        sites: the graph's own.
        config: the model's.

    Raises:
        PeltError: E208 the graph has no mask, by which it could tell whether a text begins.
    """
    graph, length = model.graph, len(tokens)
    inputs = {v.name: v for v in graph.inputs}
    ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is None:
        raise fail("E208", f"the tokens of '{claim.attachment}' are read with the first of a text, and this model's"
                           " graph with a cache takes no mask to tell it by",
                   expected="mode: static for all attachments, or a graph without generation")  # fmt: skip
    shapes = {value: value.shape for value in (ids, mask, positions) if value is not None}
    for value, shape in shapes.items():
        value.shape = ir.Shape(TEXT.get(str(size), size) for size in shape or ())
    site = sites[claim.site.key]
    looked_up = next(v for node in graph for v in node.outputs if v.name == site.values["y"])
    emitter = Emitter(graph, looked_up.dtype or ir.DataType.FLOAT, f"pelt.{claim.attachment}", claim.marks)
    begin = emitter.constant(tokens[None], "tokens")
    uneven = Uneven(emitter, length, ids, brought=claim.uneven)
    now = _now(length, ids, mask, emitter)

    table = next(v for v in graph.inputs if v.name == site.parameters["weight"])
    rows = emitter.node("Gather", [table, ids], {"axis": 0})
    joined = in_front(rows, begin, ids, [1, *tokens.shape], emitter, now)
    joined.shape = ir.Shape(["batch", "query", tokens.shape[1]])
    some = emitter.constant(np.full((1, 1), no_padding(config), np.int64), "ids", INTEGER)
    nothing = emitter.node("Concat", [emitter.integers([0]), now], {"axis": 0})
    sizes = emitter.node("Add", [emitter.node("Shape", [ids]), nothing])
    all_ids = emitter.node("Expand", [some, sizes])
    all_ids.type, all_ids.shape = ids.type, shapes[ids]
    if positions is not None:
        own = in_front(_moved(positions, uneven), _from_first(length, uneven), ids, [1, length], emitter, now)
        own.type, own.shape = positions.type, shapes[positions]
        replace_uses(positions, own, set(emitter.added), graph)
    wide = in_front(mask, uneven.filled(mask.dtype or INTEGER), ids, [1, length], emitter)
    wide.shape = shapes[mask]
    replace_uses(mask, wide, set(emitter.added), graph)
    if (keep := inputs.get("logits_to_keep")) is not None:
        shifted = emitter.node("Add", [keep, now])
        shifted.type, shifted.shape = keep.type, keep.shape
        replace_uses(keep, shifted, set(emitter.added), graph)
    replace_uses(ids, all_ids, set(emitter.added), graph)
    replace_uses(looked_up, joined, set(emitter.added), graph)
    if keep is None:
        i, logits = next((i, v) for i, v in enumerate(graph.outputs) if v.name == "logits")
        cut = without(logits, now, emitter)
        cut.name, logits.name, cut.shape = logits.name, "logits.whole", logits.shape
        graph.outputs[i] = cut
    graph.sort()


def _now(length: int, ids: ir.Value, mask: ir.Value, emitter: Emitter) -> ir.Value:
    """How many tokens a run reads before the text [1]: all, where the text is as long as what is seen, or none."""
    sizes = [emitter.node("Shape", [value], {"start": 1, "end": 2}) for value in (ids, mask)]
    first = emitter.node("Cast", [emitter.node("Equal", sizes)], {"to": INTEGER.value})
    return emitter.node("Mul", [first, emitter.integers([length])])


def _moved(positions: ir.Value, uneven: Uneven) -> ir.Value:
    """The text's positions [B, S] behind those of each row's tokens."""
    moved = uneven.emitter.node("Add", [positions, uneven.count])
    moved.type, moved.shape = positions.type, positions.shape
    return moved


def _from_first(length: int, uneven: Uneven) -> ir.Value:
    """The tokens' positions [B, P], counted from each row's first; of empty places 0."""
    emitter = uneven.emitter
    places = emitter.constant(np.arange(length, dtype=np.int64)[None], "places", INTEGER)
    own = emitter.node("Sub", [places, uneven.lacking])
    own = emitter.node("Max", [uneven.typed(own), emitter.integers([0])])
    return uneven.typed(own, [None, length])
