"""A graph with a cache, made to write new keys and values into the memory that the old ones lie in.

    before   Attention(q, k, v, m, past keys, past values)         → y, past and new keys, past and new values
    after    GroupQueryAttention(q, k, v, buffers, lengths, m)     → y, the same buffers

Past and present are one buffer [B, K, C, Dh] with room for C positions, of which `cache_length` are filled, so that a
step copies nothing. How long the past is, which a graph reads from the shape of its cache, it is told instead. The
operation has no causality of its own here: the mask says what is seen, as before.

It applies to graphs in float32 and float16 whose every growing cache is read by one attention with a mask and by
nothing else but shapes; and where texts are several, to one new token each: ONNX Runtime refuses more behind a past.
"""

from __future__ import annotations

import onnx_ir as ir

from peltc.compiler.files.manifest import LENGTH
from peltc.compiler.interpreters.emitter import Emitter
from peltc.compiler.lowering.attention import OPERATION
from peltc.compiler.lowering.maps import DOMAIN
from peltc.compiler.lowering.replacing import put_in_place

TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""Those that the operation has CPU kernels for."""


class Unshared(Exception):
    """A graph cannot share its cache; says why."""


def share_cache(model: ir.Model) -> tuple[str, ...]:
    """Let a graph share its cache between past and present, in place.

    Returns:
        The outputs that are written into the buffers of inputs, in the order of `model.graph.outputs`.

    Raises:
        Unshared: it does not apply; the graph is as it was.
    """
    graph = model.graph
    cores = [node for node in graph if node.op_type == OPERATION and len(node.outputs) == 3]
    if not cores:
        raise Unshared("no attention of the graph keeps its own past and present")
    for node in cores:
        if why := _hinders(node):
            raise Unshared(f"an attention, '{node.name}', {why}")
    pasts = {value for node in cores for value in node.inputs[4:6] if value is not None}
    shapes = [use.node for value in pasts for use in value.uses() if use.node.op_type == "Shape"]
    for value in pasts:
        for use in value.uses():
            if use.node not in cores and use.node not in shapes:
                raise Unshared(f"'{value.name}' is read by '{use.node.op_type}' too")
    emitter = Emitter(graph, ir.DataType.INT64, "pelt.cache", {})
    length = ir.Value(name=LENGTH, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(length)
    for node in shapes:
        _tell(node, length, emitter)
    query = cores[0].inputs[0]
    assert query is not None
    texts = emitter.node("Shape", [query], {"start": 0, "end": 1})
    new = emitter.node("Shape", [query], {"start": 1, "end": 2})
    total = emitter.node("Add", [length, new])
    last = emitter.node("Sub", [total, emitter.integers([1])])
    narrow = {"to": ir.DataType.INT32.value}
    lasts = emitter.node("Cast", [emitter.node("Expand", [last, texts])], narrow)
    whole = emitter.node("Squeeze", [emitter.node("Cast", [total], narrow)])
    whole.shape = ir.Shape([])
    for node in cores:
        _share(node, lasts, whole, graph)
    graph.sort()
    graph.opset_imports[DOMAIN] = 1
    grown = {value for node in graph if node.op_type == "GroupQueryAttention" for value in node.outputs[1:]}
    return tuple(value.name or "" for value in graph.outputs if value in grown)


def _hinders(node: ir.Node) -> str:
    """Why an attention does not read a cache that is its own, and a mask of numbers; empty where it does."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None or node.inputs[0] is None or mask.dtype != node.inputs[0].dtype:
        return "has no mask of numbers"
    if node.inputs[0].dtype not in TYPES:
        return f"computes in {node.inputs[0].dtype}, for which the operation has no kernel"
    keys, values = node.inputs[4:6] if len(node.inputs) == 6 else (None, None)
    if keys is None or values is None or keys.shape is None or values.shape is None:
        return "is told lengths beside its cache"
    if not all(value.is_graph_input() for value in (keys, values)):
        return "reads a past that is computed"
    if not all(value.is_graph_output() and not tuple(value.uses()) for value in node.outputs[1:]):
        return "gives keys that something else reads"
    if keys.shape[3] != values.shape[3]:
        return "has keys and values of different widths"
    return "" if "q_num_heads" in node.attributes else "has its heads on an axis of their own"


def _tell(node: ir.Node, length: ir.Value, emitter: Emitter) -> None:
    """Replace a shape of a cache by one that says how much of the buffer is filled."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 4)
    start, end = (n + 4 if n < 0 else min(n, 4) for n in (start, end))
    parts = [length if axis == 2 else emitter.node("Shape", [node.inputs[0]], {"start": axis, "end": axis + 1})
             for axis in range(start, end)]  # fmt: skip
    told = parts[0] if len(parts) == 1 else emitter.node("Concat", list(parts), {"axis": 0})
    node.outputs[0].replace_all_uses_with(told)


def _share(node: ir.Node, lasts: ir.Value, whole: ir.Value, graph: ir.Graph) -> None:
    """Put the operation that writes into its past in the place of one that copies it."""
    query, key, value, mask, keys, values = node.inputs
    attributes = {
        "num_heads": node.attributes["q_num_heads"].as_int(),
        "kv_num_heads": node.attributes["kv_num_heads"].as_int(),
        "scale": node.attributes["scale"].as_float(),
        "softcap": node.attributes.get_float("softcap", 0.0),
        "causal": 0,
    }
    inputs = [query, key, value, keys, values, lasts, whole, None, None, None, mask]
    shared = ir.node("GroupQueryAttention", inputs, attributes, domain=DOMAIN, num_outputs=3, name=node.name)
    for before, after in zip(node.outputs, shared.outputs, strict=True):
        put_in_place(after, before)
        if after is not shared.outputs[0] and after.shape is not None:
            after.shape = ir.Shape([*after.shape[:2], None, after.shape[3]])
    graph.insert_before(node, shared)
    graph.remove(node, safe=True)
