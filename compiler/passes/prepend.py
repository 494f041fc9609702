"""Tokens before the sequence, on a graph that reads embedded tokens.

    input_ids ─► lookup ─► concat(tokens, ·) ─► inputs_embeds      attention_mask ─► concat(1, ·)
    outputs over the sequence ─► without the first P positions

Such a graph derives positions and masks from the longer sequence itself, so both are right by construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.emit import Emitter, replace_uses
from peltc.compiler.numeric import NumericInterpreter
from peltc.compiler.plan import Claim

Array = np.ndarray[Any, Any]


def prepend(model: ir.Model, claims: list[Claim], tensors: Mapping[str, Array]) -> None:
    """Put the claims' tokens before the sequence, in place. The first claim's tokens come first."""
    graph = model.graph
    embedded = next(v for v in graph.inputs if v.name == "inputs_embeds")
    claim = claims[0]
    marks = {"pelt.attachment": claim.attachment, "pelt.method": claim.method.name, "pelt.site": claim.site.name}
    emitter = Emitter(graph, embedded.dtype or ir.DataType.FLOAT, f"pelt.{claim.attachment}", marks)
    numeric = NumericInterpreter()
    parts = []
    for c in claims:
        scope = c.scope({name: tensors[t.name] for name, t in c.tensors.items()}, numeric)
        parts.append(np.asarray(numeric.evaluate(c.effects["prepend"], scope), np.float32))
    tokens = np.concatenate(parts)
    length = len(tokens)

    shapes = [output.shape for output in graph.outputs]
    for node in graph:  # inside, the sequence is longer than the inputs' axis of that name
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape("positions" if str(size) == "sequence" else size for size in value.shape)

    table = claim.site.parameters["weight"]
    ids = ir.Value(name="input_ids", shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))
    parameter = next((v for v in graph.inputs if v.name == table), None)
    if parameter is None:
        shape = ir.Shape([claim.site.sizes["vocab"], claim.site.sizes["d"]])
        parameter = ir.Value(name=table, shape=shape, type=ir.TensorType(emitter.dtype))
        graph.inputs.append(parameter)
    looked_up = emitter.node("Gather", [parameter, ids], {"axis": 0})
    longer = _before(looked_up, emitter.constant(tokens[None], "tokens"), ids, [1, length, tokens.shape[1]], emitter)
    replace_uses(embedded, longer, set(), graph)
    for value in list(graph.inputs):
        if value.name in ("attention_mask", "token_type_ids"):
            fill = np.full((1, length), int(value.name == "attention_mask"), np.int64)
            wide = _before(value, emitter.constant(fill, value.name), ids, [1, length], emitter)
            replace_uses(value, wide, emitter.added, graph)
    graph.inputs[graph.inputs.index(embedded)] = ids
    for i, (output, before) in enumerate(zip(list(graph.outputs), shapes, strict=True)):
        if before is not None and len(before) > 1 and str(before[1]) == "sequence":
            cut = emitter.node("Slice", [output, *(emitter.integers([n]) for n in (length, 2**62, 1))])
            cut.name, output.name = output.name, f"{output.name}.whole"
            cut.shape, cut.type = before, output.type
            graph.outputs[i] = cut  # only what leaves the graph is cut; inside, everybody sees all positions
    graph.sort()


def _before(value: ir.Value, constant: ir.Value, ids: ir.Value, shape: list[int], emitter: Emitter) -> ir.Value:
    """A constant [1, P, ...], once per sequence of the batch, joined before a value [B, S, ...]."""
    batch = emitter.node("Shape", [ids], {"start": 0, "end": 1})
    target = emitter.node("Concat", [batch, emitter.integers(shape[1:])], {"axis": 0})
    repeated = emitter.node("Expand", [constant, target])
    joined = emitter.node("Concat", [repeated, value], {"axis": 1})
    joined.type = value.type
    return joined
