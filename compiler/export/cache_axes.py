"""The dynamic axes of a graph with a cache, found by two examples of different sizes, and their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peltc.compiler.export.captured import EXAMPLE
from peltc.spec.diagnostics import fail


def dynamic_axes(one: Any, other: Any) -> Any:
    """The axes in which two examples of an input differ, in the form that `torch.export` takes.

    Args:
        one: a tensor, a cache, or whatever else torch knows how to flatten.
        other: the same in other sizes.
    """
    import torch
    from torch.utils._pytree import SUPPORTED_NODES

    if isinstance(one, torch.Tensor):
        pairs = enumerate(zip(one.shape, other.shape, strict=True))
        return {axis: torch.export.Dim.AUTO for axis, (a, b) in pairs if a != b}
    if type(one) in SUPPORTED_NODES:
        children = zip(*(SUPPORTED_NODES[type(v)].flatten_fn(v)[0] for v in (one, other)), strict=True)
        return [dynamic_axes(a, b) for a, b in children]
    return None


def tidy(model: Any) -> None:
    """Drop the inputs that the graph does not read."""
    outputs = set(model.graph.outputs)
    for value in list(model.graph.inputs):
        if not value.uses() and value not in outputs:
            model.graph.inputs.remove(value)


def name_axes(model: Any, example: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Give the symbolic axes the names that users read: batch, past, query, total, keep, source.

    Raises:
        PeltError: E505 where an axis that was to be symbolic is not.
    """
    import onnx_ir as ir
    from transformers.exporters.utils import get_leaf_tensors

    sizes, others = (
        {name: tuple(tensor.shape) for name, tensor in get_leaf_tensors(dict(kwargs)).items()}
        for kwargs in (example, other)
    )
    words, renamed = EXAMPLE.names(), dict[str, str]()
    for value in model.graph.inputs:
        name = (value.name or "").removeprefix("input.")
        for axis, (a, b) in enumerate(zip(sizes.get(name, ()), others.get(name, ()), strict=True)):
            if a != b:
                size = value.shape[axis]
                if isinstance(size, int) or size.value is None:
                    raise fail("E505", f"the exporter froze the {words[a]} axis of '{name}' at {size}",
                               expected="a symbolic axis")  # fmt: skip
                renamed[size.value] = words[a]
    symbols = {word: symbol for symbol, word in renamed.items()}
    past, query = symbols.get("past"), symbols.get("query", 1)
    renamed |= {f"{past} + {query}": "total", f"{query} + {past}": "total"}
    values = [v for node in model.graph.all_nodes() for v in node.outputs]
    for value in (*model.graph.inputs, *values):
        for axis, size in enumerate(value.shape if value.shape is not None else ()):
            if not isinstance(size, int) and size.value in renamed:
                value.shape[axis] = ir.SymbolicDim(renamed[size.value])
