"""Tokens before the sequence, on a graph that reads embedded tokens.

    before the embedding   input_ids ─► lookup ─► concat(tokens, ·) ─► inputs_embeds ─► embedding ─► layers
    after it               input_ids ─► embedding ─► concat(tokens, ·) ─► layers
    attention_mask ─► concat(1, ·);  outputs over the sequence, or all that follows the layers, without the tokens

Such a graph derives positions and masks from the longer sequence itself, so both are right by construction. What is
embedded before the tokens join is taken from the graph that reads token ids, where positions are the text's own.
Where profiles bring the tokens, rows may have fewer of them than others: see `uneven`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from peltc.compiler.base.base import Base
from peltc.compiler.interpreters.emitter import Emitter, replace_uses
from peltc.compiler.interpreters.numeric import NumericInterpreter
from peltc.compiler.passes.uneven import Uneven
from peltc.compiler.plan.claims import Claim
from peltc.compiler.survey.anatomy import Site

Array = np.ndarray[Any, Any]


def prepend(
    model: ir.Model, claims: list[Claim], tensors: Mapping[str, Array], sites: Mapping[str, Site], base: Base
) -> None:
    """Put the claims' tokens before the sequence, in place. The first claim's tokens come first.

    Args:
        model: a graph that reads embedded tokens; `sites` are its own.
        base: the same model's graph on token ids.
    """
    graph = model.graph
    embedded = next(v for v in graph.inputs if v.name == "inputs_embeds")
    claim = claims[0]
    emitter = Emitter(graph, embedded.dtype or ir.DataType.FLOAT, f"pelt.{claim.attachment}", claim.marks)
    tokens = tokens_of(claims, tensors)
    length = len(tokens)

    shapes = [output.shape for output in graph.outputs]
    for node in graph:  # inside, the sequence is longer than the inputs' axis of that name
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape("positions" if str(size) == "sequence" else size for size in value.shape)

    ids = ir.Value(name="input_ids", shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))
    role = claim.site.role
    whole = next(s for s in sites.values() if s.role == "embedding" and s.stack == claim.site.stack)
    text = _embedded(graph, base, claim.site, ids, emitter) if role == "embedding" else _looked_up(
        graph, claim.site, ids, emitter)  # fmt: skip
    longer = in_front(text, emitter.constant(tokens[None], "tokens"), ids, [1, length, tokens.shape[1]], emitter)
    uneven = Uneven(emitter, length, ids) if claim.uneven else None
    if uneven is not None:
        longer = uneven.turned(longer)
    longer.shape = ir.Shape(["batch", "positions", tokens.shape[1]])
    own = set(emitter.added)
    if role == "embedding":
        start = next(v for v in _values(graph) if v.name == whole.values["y"])
        if start is not embedded:
            replace_uses(start, longer, own, graph)
    replace_uses(embedded, longer, own, graph)
    for value in list(graph.inputs):
        if value.name in ("attention_mask", "token_type_ids"):
            masks = value.name == "attention_mask"
            if uneven is not None and masks:
                fill = uneven.filled(value.dtype or ir.DataType.INT64)
            else:
                fill = emitter.constant(np.full((1, length), int(masks), np.int64), value.name)
            wide = in_front(value, fill, ids, [1, length], emitter)
            wide = wide if uneven is None else uneven.turned(wide)
            replace_uses(value, wide, own | emitter.added, graph)
    graph.inputs[graph.inputs.index(embedded)] = ids
    graph.sort()
    text_of = partial(without, length=length, emitter=emitter) if uneven is None else uneven.text_of
    leave(graph, text_of, "sequence", whole.values["end"] if claim.cut == "head" else "", shapes, emitter)
    graph.sort()
    RemoveUnusedNodesPass()(model)


def leave(
    graph: ir.Graph,
    text_of: Callable[[ir.Value], ir.Value],
    axis: str,
    end: str,
    shapes: Sequence[ir.Shape | None],
    emitter: Emitter,
) -> None:
    """Let the tokens before the text leave a graph, in place.

    Args:
        text_of: gives the text's part of a value.
        axis: what the outputs' axis of positions is called.
        end: the value behind the last layer, where they leave before the head; "" where they leave from the outputs.
        shapes: of the outputs, as they are without the tokens.
    """
    if end:
        last = next(v for v in _values(graph) if v.name == end)
        replace_uses(last, text_of(last), emitter.added, graph)
    for i, (output, before) in enumerate(zip(list(graph.outputs), shapes, strict=True)):
        if before is not None and len(before) > 1 and str(before[1]) == axis:
            if end:  # cut already
                output.shape = before
                continue
            cut = text_of(output)
            cut.name, output.name = output.name, f"{output.name}.whole"
            cut.shape, cut.type = before, output.type
            graph.outputs[i] = cut  # only what leaves the graph is cut; inside, everybody sees all positions


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


def _looked_up(graph: ir.Graph, site: Site, ids: ir.Value, emitter: Emitter) -> ir.Value:
    """The rows of the embedding table [B, S, D]."""
    table = site.parameters["weight"]
    parameter = next((v for v in graph.inputs if v.name == table), None)
    if parameter is None:
        shape = ir.Shape([site.sizes["vocab"], site.sizes["d"]])
        parameter = ir.Value(name=table, shape=shape, type=ir.TensorType(emitter.dtype))
        graph.inputs.append(parameter)
    return emitter.node("Gather", [parameter, ids], {"axis": 0})


def _embedded(graph: ir.Graph, base: Base, site: Site, ids: ir.Value, emitter: Emitter) -> ir.Value:
    """What leaves the embedding [B, S, D], as the graph on token ids computes it: its nodes are copied here."""
    other = base.load_graph().graph
    inputs = {v.name: v for v in graph.inputs}
    copies: dict[ir.Value, ir.Value] = {}

    def copy(value: ir.Value | None) -> ir.Value | None:
        if value is None or value in copies:
            return value if value is None else copies[value]
        node = value.producer()
        if node is None:
            copies[value] = ids if value.name == "input_ids" else _same_input(value, inputs, graph, emitter)
            return copies[value]
        clone = emitter.copy(node, [copy(v) for v in node.inputs])
        copies.update(zip(node.outputs, clone.outputs, strict=True))
        return copies[value]

    start = next(v for v in _values(other) if v.name == site.values["y"])
    result = copy(start)
    assert result is not None
    return result


def _same_input(
    value: ir.Value, inputs: dict[str | None, ir.Value], graph: ir.Graph, emitter: Emitter
) -> ir.Value:  # fmt: skip
    """The value that an input, a parameter or a constant of another graph is in this one."""
    if value.const_value is not None:
        return emitter.constant(value.const_value.numpy(), value.name or "constant", value.dtype)
    if value.name not in inputs:
        inputs[value.name] = ir.Value(name=value.name, shape=value.shape, type=value.type)
        graph.inputs.append(inputs[value.name])
    return inputs[value.name]


def without(value: ir.Value, length: int | ir.Value, emitter: Emitter) -> ir.Value:
    """A value [B, P + S, ...] from the text's first position on."""
    start = length if isinstance(length, ir.Value) else emitter.integers([length])
    cut = emitter.node("Slice", [value, start, *(emitter.integers([n]) for n in (2**62, 1))])
    cut.type = value.type
    return cut


def tokens_of(claims: Iterable[Claim], tensors: Mapping[str, Array]) -> Array:
    """The tokens that claims put before the sequence [P, D], the first claim's first."""
    numeric = NumericInterpreter()
    parts = []
    for claim in claims:
        scope = claim.scope({name: tensors[t.name] for name, t in claim.tensors.items()}, numeric)
        parts.append(np.asarray(numeric.evaluate(claim.effects["prepend"], scope), np.float32))
    return np.concatenate(parts)


def no_padding(config: Mapping[str, Any]) -> int:
    """An id that is not the padding's."""
    return int(config.get("pad_token_id") == 0)


def in_front(
    value: ir.Value,
    constant: ir.Value,
    ids: ir.Value,
    shape: list[int],
    emitter: Emitter,
    most: ir.Value | None = None,
) -> ir.Value:
    """A constant [1, P, ...], once per sequence of the batch, joined before a value [B, S, ...].

    Args:
        most: how many of the P are joined [1]; all where absent.
    """
    batch = emitter.node("Shape", [ids], {"start": 0, "end": 1})
    target = emitter.node("Concat", [batch, emitter.integers(shape[1:])], {"axis": 0})
    repeated = emitter.node("Expand", [constant, target])
    repeated.shape = ir.Shape([None, *shape[1:]])
    if most is not None:
        repeated = emitter.node("Slice", [repeated, emitter.integers([0]), most, emitter.integers([1])])
    joined = emitter.node("Concat", [repeated, value], {"axis": 1})
    joined.type = value.type
    return joined
