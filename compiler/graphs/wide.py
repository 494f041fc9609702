"""Graphs that compute in half precision, and the numbers in them that are known better.

    unrounded   a constant that the exporter rounds to the graph's type keeps the number that it was before
    hold        such constants, and those of modules, are float32 initializers with a Cast after them
    widen       a whole graph, as it is and on the same bytes, computed in float32
    expose      the same graph in its own type, with inputs and outputs in float32

A function is what a graph computes without rounding, so it is the same in every type; what a type's rounding does to
it is another matter. That both can be looked at apart, no number may be rounded for good before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]

HALF = {ir.DataType.FLOAT16: 2.0**-10, ir.DataType.BFLOAT16: 2.0**-7}
"""The half-precision types, and the epsilon of each."""
COMPUTED = ".computed"
"""Behind an initializer's name: the same in the graph's type."""
ROUNDED = "pelt.parameter"
"""Marks the Cast of a parameter that is stored in another type: the model's own is the rounded one."""

_SAME: dict[str, Callable[..., Any]] = {
    "Cast": lambda x: x, "CastLike": lambda x: x, "Identity": lambda x: x, "Sqrt": np.sqrt,
    "Reciprocal": lambda x: 1 / x, "Neg": np.negative, "Add": np.add, "Sub": np.subtract, "Mul": np.multiply,
    "Div": np.divide, "Pow": np.power,
}  # fmt: skip
"""What exporters make constants of."""


def unrounded(graph: ir.Graph, parameters: set[str]) -> dict[str, float]:
    """The numbers that a graph computes from constants alone, by value name, as if no type rounded them.

    Args:
        graph: as the exporter made it, before constants are folded.
        parameters: initializers that are no constants.
    """
    known: dict[ir.Value, float] = {}
    for name, value in graph.initializers.items():
        if name not in parameters:
            _learn(known, value, value.const_value)
    with np.errstate(all="ignore"):
        for node in graph:
            if node.op_type == "Constant":
                given = node.attributes.get("value") or node.attributes.get("value_float")
                _learn(known, node.outputs[0], None if given is None else given.value)
            elif node.op_type in _SAME:
                inputs = [v for v in node.inputs if v is not None][: 1 if node.op_type == "CastLike" else None]
                if inputs and all(v in known for v in inputs):
                    known[node.outputs[0]] = float(_SAME[node.op_type](*(known[v] for v in inputs)))
    return {value.name: number for value, number in known.items() if value.name and np.isfinite(number)}


def _learn(known: dict[ir.Value, float], value: ir.Value, content: Any) -> None:
    if isinstance(content, float):
        known[value] = content
    elif hasattr(content, "numpy") and content.size == 1 and content.dtype.is_floating_point():
        known[value] = float(content.numpy().reshape(()))


def recall(graph: ir.Graph, numbers: Mapping[str, float]) -> None:
    """Give constants of a half type the numbers that they were before they were rounded, in place. The value's type
    stays that of the graph, and its content becomes float32. This is done only where rounding gives the same constant
    again."""
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in HALF or tensor.size != 1 or name not in numbers:
            continue
        rounded = float(tensor.numpy().reshape(()))
        if abs(rounded - numbers[name]) <= 2 * HALF[tensor.dtype] * abs(numbers[name]):
            value.type = ir.TensorType(tensor.dtype)
            content = np.full(tensor.shape.numpy(), numbers[name], np.float32)
            value.const_value = ir.tensor(content, name=name)


def hold(graph: ir.Graph) -> None:
    """Turn every initializer whose content is wider than its type into float32 with a Cast after it, in place.

    ONNX Runtime does the Cast once, when the session opens."""
    casts = []
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype == value.dtype or value.dtype not in HALF:
            continue
        held = ir.Value(name=name, shape=value.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        held.metadata_props.update(value.metadata_props)
        casts.append(cast_after(value, held, f"{name}{COMPUTED}"))
        graph.initializers.pop(name)
        graph.register_initializer(held)
    if casts:
        graph.insert_before(graph[0], casts)


def cast_after(value: ir.Value, held: ir.Value, name: str) -> ir.Node:
    """A Cast of `held` to the type of `value`, which everything reads in place of `value`; not yet in the graph."""
    assert value.dtype is not None
    cast = ir.node("Cast", [held], attributes={"to": value.dtype.value}, name=name)
    cast.metadata_props.update(value.metadata_props)
    result = cast.outputs[0]
    result.name, result.shape, result.type = name, value.shape, value.type
    value.replace_all_uses_with(result)
    return cast


def cast_of(value: ir.Value, kind: ir.DataType, name: str, owner: ir.Node) -> ir.Node:
    """A Cast that is a part of what a node is a part of; not yet in the graph."""
    cast = ir.node("Cast", [value], {"to": kind.value}, name=f"{name}.cast")
    cast.metadata_props.update(owner.metadata_props)
    result = cast.outputs[0]
    result.name, result.shape, result.type = name, value.shape, ir.TensorType(kind)
    return cast


def unhold(graph: ir.Graph) -> None:
    """Take back what `hold` did, so that a constant is a constant to whoever reads the graph, in place."""
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Cast" else None
        result = node.outputs[0]
        if source is None or source.const_value is None or result.name != f"{source.name}{COMPUTED}":
            continue
        graph.initializers.pop(source.name or "")
        value = ir.Value(name=source.name, shape=source.shape, type=result.type, const_value=source.const_value)
        result.replace_all_uses_with(value)
        graph.remove(node, safe=True)
        graph.register_initializer(value)


def widen(model: ir.Model) -> None:
    """Make a graph that computes in half precision compute in float32, in place. Initializers keep their bytes, in the
    files where they lie, and are cast behind. What the graph itself rounds to the half type stays rounded."""
    for graph in (model.graph, *model.graph.subgraphs()):
        before = [_widened(v, ".wide") for v in list(graph.initializers.values())
                  if v.const_value is not None and v.const_value.dtype in HALF]  # fmt: skip
        for node in list(graph):
            if ROUNDED in node.metadata_props:
                graph.insert_after(node, _widened(node.outputs[0], ".wide"))
                continue
            for name, attribute in list(node.attributes.items()):
                wide = _wide(name, attribute)
                if wide is not None:
                    node.attributes[name] = wide
            _retype(node.outputs)
        _retype(graph.inputs)
        if before:
            graph.insert_before(graph[0], before)


def _widened(value: ir.Value, suffix: str) -> ir.Node:
    """A Cast of a value to float32, which everything reads in its place; not yet in the graph."""
    cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT.value}, name=f"{value.name}{suffix}")
    result = cast.outputs[0]
    result.name, result.shape, result.type = f"{value.name}{suffix}", value.shape, ir.TensorType(ir.DataType.FLOAT)
    for use in tuple(value.uses()):
        if use.node is not cast:
            use.node.replace_input_with(use.idx, result)
    return cast


def _retype(values: Iterable[ir.Value]) -> None:
    for value in values:
        if value.dtype in HALF:
            value.type = ir.TensorType(ir.DataType.FLOAT)


def expose(model: ir.Model) -> None:
    """Let a graph take and give float32 where it takes and gives a half type, in place; inside, it stays as it is."""
    graph = model.graph
    entering, leaving = [], []
    for i, value in enumerate(list(graph.inputs)):
        if value.dtype in HALF:
            given = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
            graph.inputs[i] = given
            entering.append(cast_after(value, given, f"{value.name}.narrow"))
    for i, value in enumerate(list(graph.outputs)):
        if value.dtype in HALF:
            name, value.name = value.name, f"{value.name}.narrow"
            cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT.value}, name=f"{name}.wide")
            graph.outputs[i] = cast.outputs[0]
            graph.outputs[i].name, graph.outputs[i].shape = name, value.shape
            graph.outputs[i].type = ir.TensorType(ir.DataType.FLOAT)
            leaving.append(cast)
    if entering:
        graph.insert_before(graph[0], entering)
    graph.extend(leaving)


def _wide(name: str, attribute: Any) -> ir.Attr | None:
    """An attribute that names or holds a half type, with float32 in its place."""
    if attribute.type == ir.AttributeType.INT and name in ("to", "dtype") and attribute.value in HALF:
        return ir.AttrInt64(name, ir.DataType.FLOAT.value)
    if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in HALF:
        return ir.AttrTensor(name, ir.tensor(attribute.value.numpy().astype(np.float32)))
    return None
