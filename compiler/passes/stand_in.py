"""Tokens before the text whose keys and values others take the place of, in a graph that reads a whole sequence.

    input_ids ─► concat(id, ·);  attention_mask ─► concat(1, ·);  outputs over the sequence without them

So everything that the graph derives from lengths, ids and masks, positions and distances above all, is that of a longer
text. What the tokens themselves are is of no effect: nobody sees more of them than keys and values. Where profiles
bring these, they stand at the tokens' places, and rows may have fewer than others: see `uneven`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter, replace_uses
from peltc.compiler.passes.prepend import in_front, leave, no_padding, without
from peltc.compiler.passes.uneven import Uneven
from peltc.compiler.plan.claims import Claim
from peltc.compiler.survey.anatomy import Site


def ids_of(claim: Claim, inputs: Collection[str]) -> tuple[str, str]:
    """The input that has the ids of the text a claim's site reads, and the axis that they run along."""
    if claim.site.stack == "decoder" and "decoder_input_ids" in inputs:
        return "decoder_input_ids", "target"
    return "input_ids", "sequence"


def stand_in(model: ir.Model, claim: Claim, sites: Mapping[str, Site], config: Mapping[str, Any]) -> None:
    """Put as many tokens before the text as a claim takes positions, in place.

    Args:
        sites: the graph's own.
        config: the model's.
    """
    graph, length = model.graph, claim.takes
    inputs = {v.name or "": v for v in graph.inputs}
    name, axis = ids_of(claim, inputs)
    shapes = [output.shape for output in graph.outputs]
    for node in graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape("positions" if str(size) == axis else size for size in value.shape)
    emitter = Emitter(graph, ir.DataType.FLOAT, f"pelt.{claim.attachment}", claim.marks)
    mask = "decoder_attention_mask" if axis == "target" else "attention_mask"
    known = graph.initializers.get(f"pelt.{claim.attachment}.shown")  # rows have as many as their profiles bring
    uneven = None if known is None else Uneven(emitter, length, inputs[name], known=known)
    fills = {name: no_padding(config), mask: 1} | ({} if axis == "target" else {"token_type_ids": 0})
    for given, fill in fills.items():
        if (text := inputs.get(given)) is not None:
            dtype = text.dtype or ir.DataType.INT64
            if uneven is not None and given == mask:
                some = uneven.filled(dtype)
            else:
                some = emitter.constant(np.full((1, length), fill, dtype.numpy()), given, dtype)
            wide = in_front(text, some, text, [1, length], emitter)
            wide = wide if uneven is None else uneven.turned(wide)
            replace_uses(text, wide, emitter.added, graph)
    graph.sort()
    # A head reads the first token of what an encoder makes of a text, and the last of a decoder's.
    end = ""
    if claim.site.stack == "encoder" and claim.text is not None:
        end = sites[claim.text.key].values["end"]
    text_of = partial(without, length=length, emitter=emitter) if uneven is None else uneven.text_of
    leave(graph, text_of, axis, end, shapes, emitter)
    graph.sort()
