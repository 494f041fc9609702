"""Nodes that are added to a graph, with the names, types and marks of what they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.graphs.wide import HALF

Array = np.ndarray[Any, Any]


class Emitter:
    """Adds named, marked nodes and constants to a graph."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType, owner: str, marks: Mapping[str, str]):
        """
        Args:
            graph: takes the nodes, at its end; sort it when all are there.
            dtype: of the constants and of the computation.
            owner: what names start with.
            marks: metadata of every node.
        """
        self.graph, self.dtype, self.owner, self.marks = graph, dtype, owner, dict(marks)
        self.added: set[ir.Node] = set()

    def node(
        self, kind: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any] | None = None
    ) -> ir.Value:
        """A node with one output."""
        name = self.unique(kind.lower())
        node = ir.node(kind, list(inputs), attributes=dict(attributes or {}), name=name)
        node.metadata_props.update(self.marks)
        output = node.outputs[0]
        output.name = name
        if kind == "Shape":
            output.type = ir.TensorType(ir.DataType.INT64)
        elif kind in ("Greater", "Equal"):
            output.type = ir.TensorType(ir.DataType.BOOL)
        elif kind == "Where":
            output.type = inputs[1].type if inputs[1] is not None else None
        elif kind == "Cast":
            output.type = ir.TensorType(ir.DataType((attributes or {})["to"]))
        else:
            first = inputs[0].type if inputs and inputs[0] is not None else None
            output.type = first or ir.TensorType(self.dtype)
        ranks = [None if v is None or v.shape is None else len(v.shape) for v in inputs]
        rank = _rank(kind, ranks, list(inputs))
        if rank is not None:
            output.shape = ir.Shape([*[None] * (rank - 1), _features_of(kind, list(inputs))] if rank else [])
        self.graph.append(node)
        self.added.add(node)
        return output

    def copy(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Node:
        """A copy of a node that reads other values. Of shapes it keeps what a longer sequence does not change."""
        clone = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs))
        clone.metadata_props.update({**node.metadata_props, **self.marks})
        for before, after in zip(node.outputs, clone.outputs, strict=True):
            after.name, after.type = self.unique(before.name or "copy"), before.type
            if before.shape is not None and len(before.shape):
                after.shape = ir.Shape([*[None] * (len(before.shape) - 1), last_size(before)])
        clone.name = clone.outputs[0].name
        self.graph.append(clone)
        self.added.add(clone)
        return clone

    def split(self, value: ir.Value, widths: Sequence[int]) -> list[ir.Value]:
        """The features of a value in parts."""
        node = ir.node("Split", [value, self.integers(widths)], {"axis": -1}, num_outputs=len(widths))
        node.name = self.unique("split")
        node.metadata_props.update(self.marks)
        for output, width in zip(node.outputs, widths, strict=True):
            output.name, output.type = self.unique("part"), value.type
            if value.shape is not None:
                output.shape = ir.Shape([*value.shape[:-1], width])
        self.graph.append(node)
        self.added.add(node)
        return list(node.outputs)

    def constant(self, array: Any, name: str = "constant", dtype: ir.DataType | None = None) -> ir.Value:
        """An initializer; floating-point values are of the graph's type, or of another `dtype`. In half precision they
        keep their content in float32; see `peltc.compiler.graphs.wide.hold`."""
        values = np.asarray(array)
        kind = None
        if values.dtype.kind == "f" or values.dtype.name == "bfloat16":
            kind = dtype or self.dtype
            values = values.astype(np.float32 if kind in HALF else kind.numpy(), copy=False)
        label = self.unique(name)
        tensor = ir.tensor(np.ascontiguousarray(values) if values.ndim else values, name=label)
        value_type = ir.TensorType(kind or tensor.dtype)
        value = ir.Value(name=label, shape=ir.Shape(values.shape), type=value_type, const_value=tensor)
        value.metadata_props.update(self.marks)
        self.graph.register_initializer(value)
        return value

    def integers(self, numbers: Sequence[int]) -> ir.Value:
        """A constant of whole numbers, one for the whole graph."""
        label = "pelt.integers." + "_".join(map(str, numbers))
        known = self.graph.initializers.get(label)
        if known is not None:
            return known
        tensor = ir.tensor(np.array(numbers, np.int64), name=label)
        value = ir.Value(
            name=label, shape=ir.Shape([len(numbers)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def unique(self, word: str) -> str:
        count = self.graph.meta.setdefault("pelt.names", {})
        label = f"{self.owner}.{word}"
        count[label] = count.get(label, -1) + 1
        return f"{label}.{count[label]}" if count[label] else label


def _rank(kind: str, ranks: list[int | None], inputs: list[ir.Value | None]) -> int | None:
    """The rank of a node's result, where it can be told."""
    if kind == "Shape":
        return 1
    if kind in ("Einsum",) or not ranks or ranks[0] is None:
        return None
    if kind in ("Reshape", "Expand", "Unsqueeze"):
        shape = inputs[1].const_value if inputs[1] is not None else None
        count = None if shape is None else int(shape.size)
        if kind == "Unsqueeze":
            return None if count is None else ranks[0] + count
        return count if kind == "Reshape" or count is None else max(count, ranks[0])
    if kind == "Gather":
        return None if ranks[1] is None else ranks[0] + ranks[1] - 1
    if kind in ("Add", "Sub", "Mul", "Div", "Pow", "MatMul", "Where"):
        known = [r for r in ranks if r is not None]
        return max(known) if len(known) == len(ranks) else None
    return ranks[0]


def _features_of(kind: str, inputs: list[ir.Value | None]) -> int | None:
    """The size of the last axis of a node's result, where it can be told."""
    lasts = [last_size(v) for v in inputs]
    if kind == "MatMul":
        return lasts[1]
    if kind in ("Add", "Sub", "Mul", "Div", "Pow", "Where"):
        operands = lasts[-2:]
        return None if None in operands else max(size for size in operands if size is not None)
    if kind in ("ReduceMean", "ReduceSum", "ReduceL2"):
        axes = inputs[1].const_value if inputs[1] is not None else None
        return lasts[0] if axes is not None and axes.numpy().tolist() == [1] else None
    return lasts[0] if kind in _SAME_SIZE else None


def last_size(value: ir.Value | None) -> int | None:
    """The size of a value's last axis, 1 of one without axes; None where it is not known."""
    if value is None or value.shape is None:
        return None
    if not len(value.shape):
        return 1
    size = value.shape[-1]
    return size if isinstance(size, int) else None


_SAME_SIZE = {"Sigmoid", "Tanh", "Relu", "Gelu", "Neg", "Exp", "Log", "Sqrt", "Abs", "Cos", "Sin", "Softmax",
              "LayerNormalization"}  # fmt: skip


def replace_uses(old: ir.Value, new: ir.Value, keep: set[ir.Node], graph: ir.Graph) -> None:
    """Let everything read `new` instead of `old`, except the nodes in `keep`. Graph outputs keep their names."""
    for use in tuple(old.uses()):
        if use.node not in keep:
            use.node.replace_input_with(use.idx, new)
    for i, output in enumerate(graph.outputs):
        if output is old:
            name = old.name
            old.name = f"{name}.base"
            new.name, new.shape, new.type = name, old.shape, old.type
            graph.outputs[i] = new


def clone_between(source: ir.Value, target: ir.Value, replacement: ir.Value, emitter: Emitter) -> ir.Value:
    """Copy the nodes that lead from `source` to `target`, reading `replacement` instead; returns the copy's end."""
    on_path: dict[ir.Value, bool] = {source: True}

    def leads(value: ir.Value | None) -> bool:
        if value is None:
            return False
        if value not in on_path:
            on_path[value] = False
            node = value.producer()
            on_path[value] = node is not None and any([leads(v) for v in node.inputs])
        return on_path[value]

    copies: dict[ir.Value, ir.Value] = {source: replacement}

    def copy(value: ir.Value | None) -> ir.Value | None:
        if value is None or not leads(value):
            return value
        if value not in copies:
            node = value.producer()
            assert node is not None
            clone = emitter.copy(node, [copy(v) for v in node.inputs])
            copies.update(zip(node.outputs, clone.outputs, strict=True))
        return copies[value]

    result = copy(target)
    assert result is not None
    return result
