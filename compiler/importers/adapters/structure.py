"""What stands before a map and between two in a model's graph: whether a head of the `adapters` library, which is said
by the number of its layers and an activation, is what a class of `transformers` computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peltc.compiler.survey.anatomy import Site

if TYPE_CHECKING:
    import onnx_ir as ir

    from peltc.compiler.base.base import Base

OPERATORS = {"tanh": "Tanh", "relu": "Relu", "gelu": "Gelu", "sigmoid": "Sigmoid"}
"""The operators that the library's activations are in a graph."""


def _value(graph: ir.Graph, name: str) -> ir.Value | None:
    return next((value for node in graph for value in node.outputs if value.name == name), None)


def _producer(graph: ir.Graph, name: str) -> ir.Node | None:
    value = _value(graph, name)
    return value.producer() if value is not None else None


def reads_first(graph: ir.Graph, site: Site) -> bool:
    """Whether a map reads the first token of the last layer's output."""
    node = _producer(graph, site.values["x"])
    if node is None or node.op_type != "Gather" or len(node.inputs) != 2 or _axis(node) != 1:
        return False
    index = node.inputs[1]
    known = index.const_value if index is not None else None
    if known is None and index is not None and (made := index.producer()) is not None and made.op_type == "Constant":
        attribute: Any = made.attributes.get("value")
        known = attribute.value if attribute is not None else None
    return known is not None and known.numpy().tolist() in (0, [0])


def _axis(node: ir.Node) -> int:
    found: Any = node.attributes.get("axis")
    return int(found.value) if found is not None else 0


def through(graph: ir.Graph, first: Site, second: Site, activation: object) -> bool:
    """Whether one map reads what an activation makes of another's output, and nothing else stands between."""
    if activation is None:
        return second.values["x"] == first.values["y"]
    node = _producer(graph, second.values["x"])
    wanted = OPERATORS.get(str(activation))
    return node is not None and node.op_type == wanted and [v.name for v in node.inputs if v] == [first.values["y"]]


def reads_stream(graph: ir.Graph, site: Site, base: Base) -> bool:
    """Whether a map reads the last layer's output, or what the norm behind it makes of that."""
    ends = {s.values.get("y") for s in base.anatomy if s.role in ("layer", "final_norm")}
    return site.values["x"] in ends
