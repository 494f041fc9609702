"""Whether a graph is the base's where all that profiles bring is zero: read from the graph, so that it holds for every
input.

A product with zeros is zeros, and so is what keeps zeros as they are, and the first of a table's rows where it is; a
sum with zeros is its other part. Where all
that the base reads of a module are such sums over its own values, nothing is left of the module.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]

MARK = "pelt.attachment"
KEEPING = {"Identity", "Cast", "Neg", "Abs", "Sqrt", "Relu", "Gelu", "Tanh", "Erf", "Transpose", "Reshape", "Expand",
           "Unsqueeze", "Squeeze", "Split", "Slice", "Gather", "ReduceMean", "ReduceSum", "ReduceL2"}  # fmt: skip
"""Nodes whose result is zeros where their first input is."""


def leaves_the_base(graph: ir.Graph, names: Container[str]) -> bool:
    """Whether nothing of the modules is left where all that profiles bring is zero.

    Args:
        names: the initializers that profiles bring.
    """
    known: dict[ir.Value, bool] = {}

    def zero(value: ir.Value | None) -> bool:
        """Whether a value is zeros then, whatever the input."""
        if value is None:
            return False
        if value not in known:
            known[value] = False  # while it is being looked at
            known[value] = value.name in names or _zero(value)
        return known[value]

    def _zero(value: ir.Value) -> bool:
        node = value.producer()
        if node is None:  # of a bank whose biases are zeros, say
            added = MARK in value.metadata_props and value.const_value is not None
            return added and value.const_value is not None and not value.const_value.numpy().any()
        inputs = [v for v in node.inputs if v is not None]
        if node.op_type in ("MatMul", "Mul"):
            return any(map(zero, inputs))
        if node.op_type in ("Add", "Sub", "Concat"):
            return all(map(zero, inputs))
        if node.op_type == "Gather" and zero(inputs[1]) and inputs[0].const_value is not None:
            return not inputs[0].const_value.numpy()[0].any()
        return (node.op_type in KEEPING or node.op_type == "Div") and zero(inputs[0])

    def own(value: ir.Value | None) -> bool:
        """Whether a value is one of the base's own then."""
        node = None if value is None else value.producer()
        if node is None or MARK not in node.metadata_props:
            return value is not None and MARK not in value.metadata_props
        if node.op_type == "Add":
            a, b = node.inputs
            return (zero(b) and own(a)) or (zero(a) and own(b))
        return False

    def read(node: ir.Node) -> list[Any]:
        return [
            v for v in node.inputs if v is not None and (p := v.producer()) is not None and MARK in p.metadata_props
        ]

    behind = [value for node in graph if MARK not in node.metadata_props for value in read(node)]
    ends = [v for v in graph.outputs if (p := v.producer()) is not None and MARK in p.metadata_props]
    return all(map(own, [*behind, *ends]))


def zeroed(models: Iterable[ir.Model], arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Put zeros in the place of what profiles bring, in place; returns them."""
    zeros = {name: np.zeros_like(array) for name, array in arrays.items()}
    for model in models:
        for name, array in zeros.items():
            if (value := model.graph.initializers.get(name)) is not None:
                value.const_value = ir.tensor(array, name=name)
    return zeros
