"""What a graph can be given: the numbers that its tables have rows for, and the longest text that its positions allow.

A lookup is a `Gather` from something that no input decides. Where its index is an input, as token ids are, the table's
rows bound the input's values. Where its index is computed from the inputs and runs along one of their axes, as
positions do, the rows bound the axis; how, is tried: the nodes that compute the index are run on texts of several
lengths, so that an offset, a count of tokens that are not padding, or a distance that is cut to a range are what
they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from peltc.compiler.graphs.flow import Flow

Array = np.ndarray[Any, Any]
Limits = dict[str, Any]
FILLS = 8
"""Token ids that texts are tried with, each filled with one: some models give no position to their padding token."""
PICKING = {"Gather": "axis", "GatherBlockQuantized": "gather_axis"}
"""Operators that pick rows, and which attribute says along what."""
MAX_ROWS = 2**20
"""Of a table that lengths are tried on."""


@dataclass(frozen=True, eq=False)
class Lookup:
    """A `Gather` whose table no input decides: its number of rows, and the index [B, S]."""

    rows: int
    index: ir.Value


def lookups(graph: ir.Graph, parameters: Collection[str]) -> Iterator[tuple[Lookup, str]]:
    """The lookups of a graph, each with the name of the input that is its index, or "" where it is computed.

    Args:
        parameters: names of graph inputs that are parameters.
    """
    flow = Flow(graph, dict.fromkeys(parameters, ()))
    inputs = {v for v in graph.inputs if v.name not in parameters}
    for node in graph:
        if node.op_type not in PICKING or node.inputs[0] is None or node.inputs[1] is None:
            continue
        table, index = node.inputs[0], node.inputs[1]
        axis = node.attributes.get_int(PICKING[node.op_type], 0)
        size = table.shape[axis] if table.shape is not None and table.shape.rank() else None
        if table in flow.dynamic or index not in flow.dynamic or not isinstance(size, int):
            continue
        origin = flow.origin(index)
        yield Lookup(size, index), str(origin.name) if origin in inputs else ""


def values_below(graph: ir.Graph, parameters: Collection[str] = ()) -> dict[str, int]:
    """What values of inputs must stay below, by input: the rows of the smallest table that they are looked up in."""
    found: dict[str, int] = {}
    for lookup, name in lookups(graph, parameters):
        if name:
            found[name] = min(lookup.rows, found.get(name, lookup.rows))
    return found


def graph_limits(file: Path, parameters: Collection[str]) -> Limits:
    """The limits of a graph whose parameters are inputs.

    Returns:
        `values`: what an input's values must stay below, by input. `lengths`: of an axis of the inputs, by its name,
        the longest (`most`), and whether padding counts (`padding`).
    """
    model = ir.load(file)
    lengths: dict[str, dict[str, Any]] = {}
    for lookup, name in list(lookups(model.graph, parameters)):
        axis = _axis(lookup.index)
        if name or not axis or not 1 < lookup.rows <= MAX_ROWS:  # one row is for all positions
            continue
        tried = _Trial.of(file, str(lookup.index.name), axis, lookup.rows, parameters)
        limit = tried.limit() if tried is not None else None
        if limit is not None and limit["most"] < lengths.get(axis, limit)["most"] + (axis not in lengths):
            lengths[axis] = limit
    return {"values": values_below(model.graph, parameters), "lengths": lengths}


def _axis(index: ir.Value) -> str:
    """The symbolic axis that an index [B, S], [1, S] or [S] runs along; of positions, not of pairs of them."""
    sizes = list(index.shape) if index.shape is not None else []
    if not 1 <= len(sizes) <= 2 or isinstance(sizes[-1], int) or (len(sizes) == 2 and sizes[0] == sizes[1]):
        return ""
    return str(sizes[-1])


class _Trial:
    """The nodes that compute an index, run on texts of any length."""

    def __init__(self, evaluator: Any, inputs: list[ir.Value], axis: str, rows: int):
        self.evaluator, self.inputs, self.axis, self.rows = evaluator, inputs, axis, rows

    @staticmethod
    def of(file: Path, index: str, axis: str, rows: int, parameters: Collection[str]) -> _Trial | None:
        """None where the index reads a parameter, or its axis is none of the inputs'."""
        from onnx.reference import ReferenceEvaluator

        model = ir.load(file)
        graph = model.graph
        value = next(v for node in graph for v in node.outputs if v.name == index)
        graph.outputs[:] = [value]
        RemoveUnusedNodesPass()(model)
        used = [v for v in graph.inputs if v.uses()]
        graph.inputs[:] = used
        if any(v.name in parameters for v in used) or not any(axis in map(str, v.shape or ()) for v in used):
            return None
        return _Trial(ReferenceEvaluator(ir.to_proto(model)), used, axis, rows)

    def limit(self) -> dict[str, Any] | None:
        """The longest text whose every index has a row; None where there is none, or none is found."""
        if not any(map(self.holds, (1, 2))) or self.holds(self.rows + 1):
            return None
        low, high = 1, self.rows + 1  # the first holds, the second does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.holds(middle) else (low, middle)
        longer = [self.rows_hold(low + 1, masked) for masked in (False, True)]
        return {"most": low, "padding": not any(row for rows in longer for row in rows)}

    def holds(self, length: int) -> bool:
        """Whether every text of a length, without padding, has its rows."""
        found = self.rows_hold(length, masked=False)
        return bool(found) and all(found)

    def rows_hold(self, length: int, masked: bool) -> list[bool]:
        """Which texts have their rows, each filled with another token, `masked` all over or nowhere."""
        feeds = {str(v.name): self.feed(v, length, masked) for v in self.inputs}
        try:
            index = np.asarray(self.evaluator.run(None, feeds)[0])
        except Exception:  # a length that the graph's own constants do not go along with
            return []
        if index.ndim == 0 or index.shape[-1] != length:
            return []
        inside = (index >= -self.rows) & (index < self.rows)
        return [bool(np.all(row)) for row in inside.reshape(-1, length)]

    def feed(self, value: ir.Value, length: int, masked: bool) -> Array:
        """One text per token [F, S], or zeros of what is no token [F, S, ...]."""
        sizes = list(value.shape or ())
        shape = [d if isinstance(d, int) else length if str(d) == self.axis else 2 for d in sizes]
        if shape and not isinstance(sizes[0], int):
            shape[0] = FILLS
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.int64)
        if str(value.name).endswith("mask"):
            return np.full(shape, not masked, dtype)
        if dtype.kind != "i" or shape[:1] != [FILLS]:
            return np.zeros(shape, dtype)
        return np.broadcast_to(np.arange(FILLS, dtype=dtype).reshape(-1, *[1] * (len(shape) - 1)), shape).copy()
