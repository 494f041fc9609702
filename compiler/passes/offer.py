"""Offering: constants that a profile decides become inputs, whose defaults are the modules' start values.

    before   initializer ─► node
    after    input, with the initializer as its default ─► node

Which constants these are is found by writing the same modules with other values: a constant that changes with them is
the profile's. So it holds for every formula, after all that is known at compile time has been computed, and a profile
has as few tensors as can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.spec.diagnostics import fail

Array = np.ndarray[Any, Any]
STAMP = "@"
"""Between an input's own name and the stamp of what it belongs to."""


def constants(model: ir.Model) -> dict[str, Array]:
    """The constants that modules have brought into a graph, by name."""
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and "pelt.attachment" in value.metadata_props
    }


def decided(one: Mapping[str, Array], other: Mapping[str, Array]) -> dict[str, Array]:
    """Those of `one` that are others in `other`, which is the same graph with the modules' tensors drawn anew.

    Raises:
        PeltError: E208 the graph itself is another, so that no constants alone tell the two apart.
    """
    if {name: array.shape for name, array in one.items()} != {name: array.shape for name, array in other.items()}:
        raise fail("E208", "what a module computes here depends on its values in more than constants of the graph",
                   expected="mode: static, one artifact for each set of values")  # fmt: skip
    return {name: array for name, array in one.items() if not np.array_equal(array, other[name])}


def offer(graph: ir.Graph, names: Mapping[str, str]) -> None:
    """Make constants inputs of a graph, in place.

    ONNX Runtime refuses a tensor for an input that the graph does not have. Since the stamp is part of each name, a
    profile that was made for another base or for other modules is refused, whoever runs the graph.

    Args:
        names: the inputs' names, with the stamp of what profiles belong to, by those of the constants.
    """
    for name, called in names.items():
        if name not in graph.initializers:
            continue  # another graph's
        value = graph.initializers.pop(name)
        assert value.const_value is not None
        value.name = called
        value.const_value.name = value.name
        graph.register_initializer(value)
        graph.inputs.append(value)
