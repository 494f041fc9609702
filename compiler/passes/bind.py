"""Binding: parameters become initializers that point at the checkpoint's own bytes, or at folded values.

    before   parameter as a graph input
    after    initializer in the checkpoint file (offset, length) [─► Cast, where it is stored in another type]

Names that share one stored tensor become one initializer, unless a fold told them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from peltc.compiler.base import Base
from peltc.compiler.emit import replace_uses
from peltc.compiler.wide import ROUNDED


def bind(model: ir.Model, base: Base, folded: Mapping[str, ir.TensorProtocol], table: Base | None = None) -> None:
    """Give every parameter of the graph its values, in place.

    Args:
        folded: the values of parameters with claims inside, by name.
        table: the base that knows parameters which this one does not.
    """
    graph = model.graph
    bound: dict[tuple[str, int, int], ir.Value] = {}
    for value in list(graph.inputs):
        name = value.name or ""
        source = base if name in base.parameters else table
        if source is None or name not in source.parameters:
            continue
        graph.inputs.remove(value)
        stored = source.stored(name)
        if name in folded:
            tensor: ir.TensorProtocol = folded[name]
        else:
            key = (str(stored.file), stored.offset, stored.length)
            if key in bound:
                value.replace_all_uses_with(bound[key])
                continue
            dtype = ir.DataType.from_numpy(stored.dtype)
            file, shape = stored.file, ir.Shape(stored.shape)
            tensor = ir.ExternalTensor(file.name, stored.offset, stored.length, dtype, shape=shape, name=name,
                                       base_dir=file.parent)  # fmt: skip
            bound[key] = value
        computed = value.dtype or tensor.dtype
        if stored.dtype != computed.numpy():
            # The cast stays where a fold made it a formality, so that a folded graph has the base's own nodes.
            held = ir.Value(
                name=name, shape=ir.Shape(stored.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            value.name = f"{name}.computed"
            cast = ir.node("Cast", [held], attributes={"to": computed.value}, name=value.name)
            cast.metadata_props[ROUNDED] = name
            replaced = cast.outputs[0]
            replaced.name, replaced.shape, replaced.type = value.name, value.shape, value.type
            value.replace_all_uses_with(replaced)
            graph.insert_before(graph[0], cast)
            graph.register_initializer(held)
            if name not in folded:
                bound[key] = replaced
            continue
        value.const_value = tensor
        value.type = ir.TensorType(tensor.dtype)
        graph.register_initializer(value)


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
