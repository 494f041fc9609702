"""Where ONNX Runtime computes the nodes of a graph that is to run on a CUDA device, by its table of CUDA kernels.

    device     CUDA has a kernel in the node's types
    shapes     it reads sizes alone, which are in the machine's own memory, and so ONNX Runtime leaves it there
    lacking    CUDA has no kernel for it: it falls back to the CPU, and what it reads and makes is copied
    constant   ONNX Runtime computes it once, when it opens the graph

The table, cuda_kernels.json, is read from ONNX Runtime's own registry by tests/gpu/kernels.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import onnx_ir as ir

from peltc.spec.diagnostics import Diagnostic, PeltError, Place

DEVICE, SHAPES, LACKING, CONSTANT = "device", "shapes", "lacking", "constant"
FLOW = {"If", "Loop", "Scan"}
DEPENDENT = {"NonZero", "Compress", "Unique", "NonMaxSuppression"}
"""Operators whose results have sizes that their inputs' values decide."""
SMALL = 100
"""How many values a constant may have that ONNX Runtime reads on the CPU for the sake of sizes."""
OPSETS = "pelt.opsets"
"""Where a graph in a node has the opsets that the whole model imports."""
MADE = {"Cast": "to", "RandomNormal": "dtype", "RandomUniform": "dtype", "EyeLike": "dtype"}
"""Operators with an attribute that says the type of their result."""


@dataclass(frozen=True)
class Kernels:
    """An operator's CUDA kernels in one of its versions.

    Attributes:
        inputs, outputs: names of type parameters, or types; `...` behind the last where it repeats.
        kernels: the types that each parameter may have together.
        host_inputs, host_outputs: those that are in the machine's own memory.
        known: whether it is known which these are.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kernels: tuple[Mapping[str, frozenset[str]], ...]
    host_inputs: frozenset[int] = frozenset()
    host_outputs: frozenset[int] = frozenset()
    known: bool = True

    def bound(self, inputs: Iterable[str], outputs: Iterable[str] = ()) -> dict[str, str]:
        """The types of the type parameters, of those of inputs and outputs; unknown ones are ""."""
        found: dict[str, str] = {}
        for formal, given in ((self.inputs, inputs), (self.outputs, outputs)):
            for i, kind in enumerate(given):
                name = formal[min(i, len(formal) - 1)].removesuffix("...")
                if kind:
                    found.setdefault(name, kind)
        return found

    def fits(self, types: Mapping[str, str]) -> bool:
        """Whether there is a kernel in these types."""
        return any(all(types.get(name, "") in (*allowed, "") for name, allowed in k.items()) for k in self.kernels)


@cache
def table() -> tuple[str, dict[str, dict[int, Kernels]]]:
    """The version of ONNX Runtime that the table is of, and its operators, domain and all, by version."""
    held = json.loads(files(__package__).joinpath("cuda_kernels.json").read_text(encoding="utf-8"))
    found: dict[str, dict[int, Kernels]] = {}
    for name, entry in held["operators"].items():
        operator, since = name.rsplit("-", 1)
        found.setdefault(operator, {})[int(since)] = Kernels(
            tuple(entry["inputs"]), tuple(entry["outputs"]),
            tuple({name: frozenset(types) for name, types in kernel.items()} for kernel in entry["kernels"]),
            frozenset(entry.get("host_inputs", ())), frozenset(entry.get("host_outputs", ())),
            "memory" not in entry,
        )  # fmt: skip
    return held["onnxruntime"], found


@dataclass
class Placed:
    """Where the nodes of a graph are computed.

    Attributes:
        where: by node.
        types: those of all values, where they are known.
        lacking: nodes without a kernel, with the types that they would need one in.
        hinders: what keeps the graph from being captured as a CUDA graph, in the order of its nodes.
    """

    where: dict[ir.Node, str] = field(default_factory=dict)
    types: dict[ir.Value, str] = field(default_factory=dict)
    lacking: dict[ir.Node, dict[str, str]] = field(default_factory=dict)
    hinders: list[str] = field(default_factory=list)

    def captured(self) -> bool | str:
        """Whether a CUDA graph can be captured of it, or what hinders it."""
        return self.hinders[0] if self.hinders else True

    def record(self, provider: str) -> dict[str, Any]:
        """What the manifest says of it."""
        on_cpu = sum(1 for where in self.where.values() if where in (SHAPES, LACKING))
        return {"provider": provider, "kernels": table()[0], "cpu_nodes": on_cpu,
                "lacking": [*dict.fromkeys(described(*each) for each in self.lacking.items())],
                "cuda_graph": self.captured()}  # fmt: skip


def place(model: ir.Model) -> Placed:
    """Say where ONNX Runtime computes the nodes of a finished graph, those of the graphs in nodes like If and Loop
    included; nothing that is written is changed."""
    return _Placing(model.graph).run()


def check_kernels(graphs: Mapping[str, Placed]) -> None:
    """Refuse graphs for CUDA with nodes that it has no kernel for.

    Raises:
        PeltError: E640, once for each operator, types and origin.
    """
    found: dict[str, Diagnostic] = {}
    for name, placed in graphs.items():
        for node, types in placed.lacking.items():
            told = described(node, types)
            owner = node.metadata_props.get("pelt.attachment")
            hint = (
                "`deploy: {precision: float32}` has most kernels" if {"bfloat16", "float16"} & {*types.values()} else ""
            )
            hint = hint or (
                "another formula or option of the method" if owner else "please report it: model and versions"
            )
            found.setdefault(told, Diagnostic(
                "E640", f"CUDA has no kernel for {told}", Place(f"{name}.onnx"),
                f"operations of ONNX Runtime {table()[0]} on CUDA, or another deploy.provider than cuda", hint,
            ))  # fmt: skip
    if found:
        raise PeltError(found.values())


def described(node: ir.Node, types: Mapping[str, str]) -> str:
    """A node by its operator, types, and where it is from: a module, or a part of the model."""
    marks = node.metadata_props
    kinds = ", ".join(dict.fromkeys(types.values()))
    told = f"'{node.op_type}' of opset {_opset(node)}{f' in {kinds}' if kinds else ''}"
    if "pelt.attachment" in marks:
        method, site = marks.get("pelt.method"), marks.get("pelt.site")  # a bias of several has neither
        return f"{told}, of '{marks['pelt.attachment']}'" + (f" ({method}) at {site}" if method and site else "")
    scopes = [scope.partition(":")[0] for scope in marks.get("namespace", "").split("/")[:-1]]
    where = next((scope for scope in reversed(scopes) if scope and not scope.startswith("_")), "")
    return f"{told}, of the model{f' at {where}' if where else ''}: '{node.outputs[0].name}'"


def kernels_of(node: ir.Node) -> Kernels | None:
    """What CUDA has for a node's operator in the version that its graph means."""
    name = "Cast" if node.op_type == "CastLike" else node.op_type  # ONNX Runtime makes a Cast of it
    versions = table()[1].get(f"{node.domain}::{name}" if node.domain else name, {})
    known = [since for since in versions if since <= _opset(node)]
    return versions[max(known)] if known else None


def fits_in_float32(node: ir.Node, types: Mapping[str, str]) -> bool:
    """Whether CUDA has a kernel for a node that lacks one in half precision, were it in float32.

    Args:
        types: those that it lacks one in.
    """
    entry, half = kernels_of(node), {"float16", "bfloat16"}
    wide = {name: "float" if kind in half else kind for name, kind in types.items()}
    return entry is not None and wide != dict(types) and entry.fits(wide)


def _opset(node: ir.Node) -> int:
    if not isinstance(node.graph, ir.Graph):
        return 1
    return int(node.graph.meta.get(OPSETS, node.graph.opset_imports).get(node.domain, 1))


class _Placing:
    """Places the nodes of one graph."""

    def __init__(self, graph: ir.Graph):
        self.graph, self.found = graph, Placed()
        self.types = self.found.types
        self.host: set[ir.Value] = set()  # values in the machine's own memory
        self.fixed: set[ir.Value] = set()  # values of constants alone
        self.opsets = graph.opset_imports
        self.entries: dict[ir.Node, Kernels | None] = {}

    def run(self) -> Placed:
        self.visit(self.graph)
        for node, entry in self.entries.items():
            for reason in self.hindrances(node, entry):
                self.found.hinders.append(reason)
        return self.found

    def visit(self, graph: ir.Graph) -> None:
        """Place the nodes of a graph, each before the graphs in it, which read what stands before it."""
        graph.meta[OPSETS] = self.opsets
        self.fixed.update(graph.initializers.values())
        for value in (*graph.inputs, *graph.initializers.values()):
            self.types[value] = _kind(value.dtype)
        for node in graph:
            self.entries[node] = entry = kernels_of(node)
            self.infer(node, entry)
            self.found.where[node] = self.whereabouts(node, entry)
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    self.visit(attribute.as_graph())

    def infer(self, node: ir.Node, entry: Kernels | None) -> None:
        """Learn the types of what a node makes."""
        types = entry.bound(self.kinds(node.inputs)) if entry else {}
        for i, value in enumerate(node.outputs):
            name = entry.outputs[min(i, len(entry.outputs) - 1)].removesuffix("...") if entry else ""
            kind = types.get(name) or (name if name in _NAMES else "")
            if node.op_type == "CastLike":
                kind = self.kinds(node.inputs)[1]
            elif (key := MADE.get(node.op_type)) and key in node.attributes:
                kind = _kind(ir.DataType(node.attributes[key].as_int()))
            elif node.op_type in ("Constant", "ConstantOfShape"):
                content = node.attributes.get("value")
                kind = _kind(content.as_tensor().dtype) if content is not None else _kind(value.dtype) or "float"
            self.types[value] = kind or _kind(value.dtype)

    def kinds(self, values: Iterable[ir.Value | None]) -> list[str]:
        return ["" if value is None else self.types.get(value, _kind(value.dtype)) for value in values]

    def whereabouts(self, node: ir.Node, entry: Kernels | None) -> str:
        """Where a node is computed; its results are known to be there then."""
        given = [v for v in node.inputs if v is not None]
        types = self.kinds((*node.inputs, *node.outputs))
        if node.op_type == "Constant" or (given and all(v in self.fixed for v in given) and "bfloat16" not in types):
            self.fixed.update(node.outputs)
            return CONSTANT
        bound = entry.bound(self.kinds(node.inputs), self.kinds(node.outputs)) if entry else {}
        if entry is None or not entry.fits(bound):
            if not (given and all(v in self.host or self.small(v) for v in given)):
                self.found.lacking[node] = bound or dict(enumerate_types(types))
                self.host.update(node.outputs)
                return LACKING
            self.host.update(node.outputs)
            return SHAPES
        # A node goes to the CPU where all that it reads is there already, and CUDA would not read any of it there.
        read = [(i, v) for i, v in enumerate(node.inputs) if v is not None and not self.small(v)]
        if read and all(v in self.host and i not in entry.host_inputs for i, v in read):
            self.host.update(node.outputs)
            return SHAPES
        self.host.update(value for i, value in enumerate(node.outputs) if i in entry.host_outputs)
        return DEVICE

    def small(self, value: ir.Value) -> bool:
        """Whether a value is a constant that is read wherever it is needed."""
        if value not in self.fixed:
            return False
        size = value.const_value.size if value.const_value is not None else None
        return size is None or size <= SMALL

    def hindrances(self, node: ir.Node, entry: Kernels | None) -> Iterator[str]:
        """Why a node keeps a graph from being captured."""
        where = self.found.where[node]
        if where == CONSTANT:
            return
        told = described(node, {})
        if node.op_type in FLOW:
            yield f"{told} runs a part of the graph or not, by a value"
        elif node.op_type in DEPENDENT:
            yield f"{told} has a result whose size its values decide"
        elif entry is not None and not entry.known:
            yield f"{told} may read or make values in the machine's memory: it is not known of its kernel"
        elif where == LACKING:
            yield f"CUDA has no kernel for {described(node, self.found.lacking[node])}"
        for i, value in enumerate(node.inputs):
            if value is None or value in self.fixed or value.is_graph_input():
                continue
            on_host = where != DEVICE or (entry is not None and i in entry.host_inputs)
            if on_host != (value in self.host):
                maker = value.producer()
                made = "" if maker is None else f" that {described(maker, {})} makes"
                way = "to the machine's memory" if on_host else "to the device"
                yield f"{told} reads a value{made}, which is copied {way} first"


def enumerate_types(types: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Types by their place, for an operator whose type parameters are not known."""
    return ((str(i), kind) for i, kind in enumerate(types) if kind)


_NAMES = {kind.name.lower() for kind in ir.DataType}


def _kind(dtype: ir.DataType | None) -> str:
    """A type's name, "" for one that is not known."""
    return "" if dtype is None else dtype.name.lower()
