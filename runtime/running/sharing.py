"""Weights that sessions of one process share: a base is in memory once, however many artifacts are open on it.

Maps read their weights as they are stored, so that these stay in the file, which the system keeps in memory once for
all processes. ONNX Runtime packs no weight anew, which costs time in each run, most where texts are short. Where it
computes in another type than a weight is stored in, as it does with half precision on the CPU, it makes each session a
copy: nothing is shared.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import onnx_ir as ir

from peltc.spec.diagnostics import Place, fail

Array = np.ndarray[Any, Any]
Key = tuple[Any, ...]


@dataclass
class Weight:
    """A weight in memory: what ONNX Runtime reads, and the array that it reads it from."""

    value: Any
    array: Array


_WEIGHTS: WeakValueDictionary[Key, Weight] = WeakValueDictionary()
"""The weights that sessions of this process read, by file, place in it, type and shape."""
_LOCK = threading.Lock()


def shared(model: ir.Model, folder: Path) -> tuple[bytes, dict[str, Weight]]:
    """A graph whose weights are shared, and the weights by the names of its initializers.

    Args:
        folder: that of the files in which its weights lie.

    Raises:
        PeltError: E605 weights that do not lie in a file beside the graph.
    """
    found = dict[str, Weight]()
    for name, value in model.graph.initializers.items():
        if (stored := _stored(value)) is not None:
            found[name] = _weight(folder, stored)
    return ir.to_proto(model).SerializeToString(), found


def _stored(value: ir.Value) -> ir.ExternalTensor | None:
    """Where a weight of the graph lies; None of what is computed, given, in the graph's file, or of another type."""
    tensor = value.const_value
    if not isinstance(tensor, ir.ExternalTensor) or value.is_graph_input() or tensor.dtype != ir.DataType.FLOAT:
        return None
    return tensor


def _weight(folder: Path, stored: ir.ExternalTensor) -> Weight:
    """A weight that this process has in memory already, or has from now on."""
    import onnxruntime as ort

    place = folder / stored.location
    if Path(stored.location).name != str(stored.location):
        raise fail("E605", "a weight does not lie beside the graph", Place(str(place)), "the graph as it was compiled")
    shape, offset = tuple(stored.shape.numpy()), stored.offset or 0
    status = os.stat(place)
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, offset, stored.dtype, shape)
    with _LOCK:
        if (known := _WEIGHTS.get(key)) is None:
            array: Array = np.memmap(place, stored.dtype.numpy(), "r", offset, shape)
            known = _WEIGHTS[key] = Weight(ort.OrtValue.ortvalue_from_numpy(array), array)
        return known


def in_memory() -> Iterator[tuple[int, int]]:
    """The weights that this process shares: of each its file, by its number in the file system, and its bytes."""
    for key, weight in list(_WEIGHTS.items()):
        yield key[1], weight.array.nbytes
