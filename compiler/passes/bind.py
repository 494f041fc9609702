"""Binding: parameters become initializers that point at the checkpoint's own bytes, or at folded values.

    before   parameter as a graph input
    after    initializer in the checkpoint file (offset, length) [─► Concat, where it has more rows than the file]

A weight that is stored in another type than it is computed in is converted once, into the artifact's own data; where
that is not wanted, a Cast stands behind it, which is done whenever a session opens.

Names that share one stored tensor become one initializer, unless a fold told them apart. Rows that the checkpoint
lacks are zeros: modules have been shown to give them their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.base.base import Base
from peltc.compiler.files.checkpoint import StoredTensor
from peltc.compiler.files.packed import QUANTISED
from peltc.compiler.graphs.wide import ROUNDED
from peltc.compiler.interpreters.emitter import replace_uses

Convert = Callable[[StoredTensor, ir.DataType, str], ir.ExternalTensor]
"""Puts a weight in another type somewhere, and says where; it is given a name."""


def elsewhere(stored: StoredTensor, kind: ir.DataType, name: str) -> ir.ExternalTensor:
    """A weight as if it lay in its file in another type: for graphs that nobody runs."""
    return ir.ExternalTensor(stored.file.name, stored.offset, stored.length, kind, shape=ir.Shape(stored.shape),
                             name=name, base_dir=stored.file.parent)  # fmt: skip


def unpacked(stored: StoredTensor, name: str) -> ir.LazyTensor:
    """A weight that is stored as small whole numbers: what its blocks stand for, once somebody reads it."""
    return ir.LazyTensor(lambda: ir.tensor(stored.array(), name=name), ir.DataType.FLOAT, ir.Shape(stored.shape),
                         name=name)  # fmt: skip


def bind(
    model: ir.Model,
    base: Base,
    folded: Mapping[str, ir.TensorProtocol],
    table: Base | None = None,
    convert: Convert | None = None,
) -> None:
    """Give every parameter of the graph its values, in place.

    Args:
        folded: the values of parameters with claims inside, by name.
        table: the base that knows parameters which this one does not.
        convert: what converts weights; where there is none, the graph casts them.
    """
    graph = model.graph
    bound: dict[tuple[str, int, int], ir.Value] = {}
    front: list[ir.Node] = []

    def node(kind: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any], name: str) -> ir.Value:
        """A node that computes a parameter, in front of all others."""
        front.append(ir.node(kind, inputs, attributes=attributes, name=name))
        front[-1].outputs[0].name = name
        return front[-1].outputs[0]

    for value in list(graph.inputs):
        name = value.name or ""
        source = base if name in base.parameters else table
        if source is None or name not in source.parameters:
            continue
        graph.inputs.remove(value)
        lacking = source.lacks(name) if name not in folded else range(0)
        if lacking and not value.uses():
            continue  # a module stands in its place
        stored = source.checkpoint.tensors.get(source.parameters[name].stored)
        if name in folded:
            tensor: ir.TensorProtocol = folded[name]
        elif stored is None:  # what a module replaces by parts: its own values are read by nobody
            tensor = ir.tensor(np.zeros(1, (value.dtype or ir.DataType.FLOAT).numpy()), name=name)
        else:
            key = (str(stored.file), stored.offset, stored.length)
            if key in bound:
                value.replace_all_uses_with(bound[key])
                continue
            dtype = ir.DataType.from_numpy(stored.dtype)
            if isinstance(stored, QUANTISED):
                tensor = unpacked(stored, name)
            elif convert is not None and value.dtype is not None and value.dtype != dtype:
                tensor = convert(stored, value.dtype, name)
            else:
                tensor = elsewhere(stored, dtype, name)
            bound[key] = value
        computed = value.dtype or tensor.dtype
        # The cast stays where a fold made it a formality, so that a folded graph has the base's own nodes.
        if name not in folded and isinstance(stored, QUANTISED):
            cast = tensor.dtype != computed
        else:
            cast = stored is not None and stored.dtype != computed.numpy() and convert is None
        if not cast and not lacking:
            value.const_value = tensor
            value.type = ir.TensorType(tensor.dtype)
            graph.register_initializer(value)
            continue
        held = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(held)
        whole = held
        if cast:
            whole = node("Cast", [held], {"to": computed.value}, f"{name}.computed")
            front[-1].metadata_props[ROUNDED] = name
        if lacking and stored is None:
            sizes = _constant(graph, np.array(source.parameters[name].shape, np.int64), f"{name}.shape")
            whole = node("Expand", [whole, sizes], {}, f"{name}.none")
        elif lacking:
            rest = np.zeros((len(lacking), *source.parameters[name].shape[1:]), computed.numpy())
            more = _constant(graph, rest, f"{name}.more")
            whole = node("Concat", [whole, more], {"axis": 0}, f"{name}.longer")
        whole.shape, whole.type = value.shape, ir.TensorType(computed)
        value.replace_all_uses_with(whole)
        if name not in folded and stored is not None:
            bound[key] = whole
    if front:
        graph.insert_before(graph[0], front)


def _constant(graph: ir.Graph, array: Any, name: str) -> ir.Value:
    """A constant of the graph."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def add_bias(model: ir.Model, written: str, tensor: ir.TensorProtocol, claims: Sequence[str]) -> None:
    """Add a bias that the base does not have to what a map writes.

    Args:
        written: the name of the value that the map writes.
        tensor: the bias, named.
        claims: what it comes from.
    """
    y = next(v for node in model.graph for v in node.outputs if v.name == written)
    label = tensor.name or ""
    bias = ir.Value(
        name=label, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(bias)
    node = ir.node("Add", [y, bias], name=f"{label}.add")
    node.metadata_props["pelt.attachment"] = ", ".join(claims)
    out = node.outputs[0]
    out.name, out.shape, out.type = f"{label}.added", y.shape, y.type
    producer = y.producer()
    assert producer is not None
    model.graph.insert_after(producer, node)
    replace_uses(y, out, {node}, model.graph)
