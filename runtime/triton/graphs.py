"""An artifact's graphs as Triton's ONNX Runtime runs them: with all profiles as constants, and nothing to give but what
a request has.

    artifact     profiles [K, ...], an input with a default ─► Gather at `profile` ─► ...
    exported     profiles [K, ...], a constant in a file    ─► Gather at `profile@stamp` ─► ... ─► Where there is
                                                                                           such a row, else NaN

The name of the input that picks a row ends in a stamp of what the rows belong to, as those of profiles do: whoever
picks rows by another export's numbers is refused by Triton, and is not answered with another profile. A row that is
not there yet, since names come to the server before their profiles, is answered with NaN, and no other text with it:
to look it up would stop the whole batch on a CPU, and pass for zeros on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.files.manifest import GROWN, PROFILE
from peltc.compiler.passes.offer import STAMP
from peltc.runtime.running.device import providers_of
from peltc.runtime.running.engine import check_computed
from peltc.runtime.serving.inference import datatype
from peltc.runtime.serving.joining import ROWS
from peltc.runtime.triton.rows import Stacked
from peltc.spec.diagnostics import Place, fail

KEEP = "logits_to_keep"
"""The input of a graph with a cache that says which positions' logits are wanted: here always the last one's."""
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
OTHER = {"tensor(bfloat16)": "BF16"}
"""Triton's names of types that the protocol does not have."""


@dataclass(frozen=True)
class Tensor:
    """An input or an output.

    Attributes:
        type: as Triton calls it, `INT64`.
        axes: a size, or a name, for each.
    """

    name: str
    type: str
    axes: tuple[int | str, ...]

    def dims(self, batched: bool) -> list[int]:
        """The sizes as a config has them, -1 where a request decides, without the axis of the texts where it is one of
        the server's."""
        return [axis if isinstance(axis, int) else -1 for axis in self.axes[batched:]]


@dataclass(frozen=True)
class Graph:
    """A graph that was written for Triton.

    Attributes:
        row: the input that picks each text's profile, None where there is none.
        half: whether it computes in half precision.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    row: str | None
    half: bool = False

    @property
    def batched(self) -> bool:
        """Whether the first axis of everything is the texts', so that the server may join requests."""
        given = [tensor for tensor in self.inputs if tensor.name != self.row]
        return all(tensor.axes[:1] == (ROWS,) for tensor in (*given, *self.outputs))


def fixed(file: Path, stacked: Stacked | None) -> tuple[ir.Model, list[str]]:
    """A graph of an artifact as it is written, and the names of the files beside it that it reads.

    Args:
        file: the artifact's graph.
        stacked: the profiles, where the artifact has them.

    Raises:
        PeltError: E605 its weights do not lie beside it.
    """
    model = ir.load(file)
    graph = model.graph
    for value in list(graph.inputs):
        if value.name == KEEP:
            _fix(graph, value, ir.tensor(np.array([-1], np.int64), name=KEEP))
        elif stacked is not None and value.name == PROFILE:
            value.name = row_of(stacked)
            _guard(graph, value, stacked.size)
        elif stacked is not None and value.name in stacked.places:
            _fix(graph, value, stacked.tensor(value.name or ""))
    files = dict.fromkeys(_file(value, file) for value in graph.initializers.values())
    return model, [name for name in files if name]


def row_of(stacked: Stacked) -> str:
    """What the input that picks a row is called."""
    return f"{PROFILE}{STAMP}{stacked.stamp}"


def opened(file: Path, stacked: Stacked | None, place: Place, precision: str) -> Graph:
    """A written graph as ONNX Runtime knows it. Triton holds the sizes of a config against what
    ONNX Runtime finds out about them, which may be more than the graph itself says.

    Args:
        place: what it was made of, for messages.
        precision: the type that it computes in.

    Raises:
        PeltError: E605 it cannot be opened here; E618 its type has kernels on a GPU alone.
    """
    import onnxruntime as ort

    providers = providers_of()
    check_computed(precision, providers, place)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if half := precision != "float32":  # as the server does by the graph's config
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        session = ort.InferenceSession(str(file), options, providers=providers)
    except Exception as error:
        reason = str(error).splitlines()[0][:300]
        raise fail("E605", f"ONNX Runtime cannot open the graph for Triton: {reason}", place,
                   hint="what has kernels on a GPU alone is exported where there is one") from None  # fmt: skip
    inputs, outputs = (tuple(map(_tensor, values)) for values in (session.get_inputs(), session.get_outputs()))
    row = row_of(stacked) if stacked is not None else None
    return Graph(inputs, outputs, row if row in [tensor.name for tensor in inputs] else None, half)


def _guard(graph: ir.Graph, row: ir.Value, size: int) -> None:
    """Let rows that are not there be answered with NaN. Caches are left out, for the logits beside them tell it.

    Args:
        row: the input that picks rows, from -1.
        size: how many rows there are, that of the start values included.
    """

    def number(name: str, value: object, kind: Any = np.int64) -> ir.Value:
        made = ir.Value(
            name=f"pelt.rows.{name}", const_value=ir.tensor(np.array(value, kind), name=f"pelt.rows.{name}")
        )
        graph.register_initializer(made)
        return made

    uses, last = tuple(row.uses()), number("last", size - 2)
    kept = ir.node("Min", [row, last])
    least = ir.node("Max", [kept.outputs[0], number("none", -1)])
    there = ir.node("Equal", [row, least.outputs[0]])
    for use in uses:
        use.node.replace_input_with(use.idx, least.outputs[0])
    graph.insert_before(graph[0], [kept, least, there])
    for i, output in enumerate(graph.outputs):
        shape, kind = output.shape, output.dtype
        if shape is None or str(shape[0]) != ROWS or kind not in FLOATS or str(output.name).startswith(GROWN):
            continue
        axes = number(f"axes.{i}", [*range(1, len(shape))])
        wide = ir.node("Unsqueeze", [there.outputs[0], axes])
        nothing = ir.node("Cast", [number(f"nan.{i}", np.nan, np.float32)], attributes={"to": kind})
        chosen = ir.node("Where", [wide.outputs[0], output, nothing.outputs[0]])
        chosen.outputs[0].shape, chosen.outputs[0].type = shape, output.type
        name, output.name = output.name, f"{output.name}.all"
        chosen.outputs[0].name = name
        graph.extend([wide, nothing, chosen])
        graph.outputs[i] = chosen.outputs[0]


def _fix(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Make an input a constant."""
    graph.inputs.remove(value)
    value.const_value, value.type = tensor, ir.TensorType(tensor.dtype)
    value.shape = ir.Shape(tensor.shape.numpy())
    if value.name not in graph.initializers:
        graph.register_initializer(value)


def _file(value: ir.Value, file: Path) -> str:
    """The file that a constant lies in; none where it lies in the graph's own."""
    tensor = value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        return ""
    name = str(tensor.location)
    if Path(name).name != name:
        raise fail("E605", "a weight does not lie beside the graph", Place(str(file)), "the graph as it was compiled")
    return name


def _tensor(value: Any) -> Tensor:
    kind = OTHER.get(value.type) or datatype(value.type)
    axes = tuple(axis if isinstance(axis, int) else str(axis) for axis in value.shape)
    return Tensor(value.name, kind, axes)
