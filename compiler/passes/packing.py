"""Packing: the masks of a profile as bits in the graph, which mixes a bank of modules by them.

    hard    bytes [⌈N/8⌉] ─► Gather in the bits of all bytes [256, 8] ─► Reshape, Slice ─► weights [N] ─► MatMul with
            the bank [N, ...]
    soft    weights [N] ─► MatMul with the bank [N, ...]

Bit i of a mask, counted from the lowest bit of the first byte, is 1 where module i takes part. A byte's eight bits are
looked up in a table, whose ones are the weight that a module has, so that no step is left that computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter

Array = np.ndarray[Any, Any]
MASK = "pelt.mask"
"""Metadata of a constant that is a mask's bits: how many modules there are, and how many take part."""


def unpacked(weights: Array, emitter: Emitter) -> ir.Value:
    """Weights [N] over a bank that a hard mask gives, as a graph value that bits become."""
    chosen = weights != 0
    given = weights[chosen]
    bits = emitter.constant(np.packbits(chosen, bitorder="little"), "masks")
    bits.metadata_props[MASK] = f"{len(weights)} {len(given)}"
    places = emitter.node("Cast", [bits], {"to": ir.DataType.INT32})
    spread = emitter.node("Gather", [_bits_of_bytes(float(given[0]), emitter), places], {"axis": 0})
    count = 8 * -(-len(weights) // 8)
    result = emitter.node("Reshape", [spread, emitter.integers([count])])
    if count != len(weights):
        result = emitter.node("Slice", [result, *(emitter.integers([n]) for n in (0, len(weights), 0))])
    result.shape = ir.Shape([len(weights)])
    return result


def _bits_of_bytes(weight: float, emitter: Emitter) -> ir.Value:
    """The bits of all bytes [256, 8], the lowest first, times a weight; one constant for the whole graph."""
    label = f"pelt.bits.{weight:.9g}"
    if (known := emitter.graph.initializers.get(label)) is not None:
        return known
    table = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") * np.float32(weight)
    value = emitter.constant(table, "bits")
    emitter.graph.initializers.pop(value.name or "")
    value.name = label
    value.metadata_props.clear()
    emitter.graph.register_initializer(value)
    return value


def masks_of(model: ir.Model) -> Mapping[str, tuple[int, int]]:
    """The constants of a graph that are masks' bits, by name: of how many modules, and how many take part."""
    found = {}
    for name, value in model.graph.initializers.items():
        if said := value.metadata_props.get(MASK):
            size, ones = map(int, said.split())
            found[name] = (size, ones)
    return found
