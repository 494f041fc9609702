"""Tables that ids pick rows of, on the way to the first layer: of words, positions and types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from peltc.compiler.graphs.flow import LAYOUT, Flow

ROLES = {"input_ids": "word", "token_type_ids": "type"}
"""What the rows of a table stand for, by the input that picks them."""
COUNTING = {"Range", "CumSum"}
STEPS = {*LAYOUT, "Slice", "Expand", "Gather", "GatherND", "Concat"}


@dataclass(frozen=True, eq=False)
class Table:
    """A table from which ids pick rows.

    Attributes:
        name: the parameter, [rows, width].
        role: what a row stands for: word, position or type.
        node: the picking.
    """

    name: str
    role: str
    node: ir.Node


def find_tables(flow: Flow, behind: Iterable[ir.Value]) -> Iterator[Table]:
    """The tables whose rows are among some values, in the order of the graph.

    What counts along the sequence picks positions. Ids that are an input, or are all zero, have their own meanings.
    """
    wanted = set(behind)
    for node in flow.nodes:
        if node.op_type != "Gather" or node.outputs[0] not in wanted or node.attributes.get_int("axis", 0) != 0:
            continue
        name = flow.parameter(node.inputs[0])
        if name is None or len(flow.parameters[name]) != 2:
            continue
        role = _role(node.inputs[1])
        if role:
            yield Table(name, role, node)


def numbered(tables: Iterable[Table]) -> Iterator[tuple[str, Table]]:
    """Different tables, each with what tells it from those of its role: nothing, 2, 3, ..."""
    seen: dict[str, list[str]] = {}
    for table in tables:
        names = seen.setdefault(table.role, [])
        if table.name not in names:
            names.append(table.name)
            yield str(len(names)) if len(names) > 1 else "", table


def _role(ids: ir.Value | None) -> str:
    """What ids stand for: the input that they are made of element by element, or what counts along it."""
    seen, pending, inputs = set[ir.Value](), [ids], list[str]()
    while pending:
        value = pending.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if value.is_graph_input():
            inputs.append(value.name or "")
        elif node is not None and node.op_type in COUNTING:
            return "position"
        elif node is not None and node.op_type != "Shape":
            pending.extend(node.inputs)
    found = (role for word, role in ROLES.items() if any(name.endswith(word) for name in inputs))
    return next(found, "" if inputs else "type" if ids is not None and _is_zero(ids) else "position")


def _is_zero(value: ir.Value) -> bool:
    """Whether ids are zeros, laid out as the input is."""
    current: ir.Value | None = value
    while current is not None:
        if current.const_value is not None:
            return not np.any(current.const_value.numpy())
        node = current.producer()
        if node is None:
            return False
        if node.op_type == "ConstantOfShape":
            fill = node.attributes.get("value")
            return fill is None or not np.any(fill.as_tensor().numpy())
        if node.op_type not in STEPS:
            return False
        current = node.inputs[0]
    return False
