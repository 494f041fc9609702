"""Weights of the base in small whole numbers, read by operations of ONNX Runtime.

    y = x Ŵᵀ,   y = Ŵ[ids]

ONNX Runtime's own quantiser makes the blocks of the weight in float32, what folds into it inside. One weight after the
other is read, made, and written to the artifact's data: no two are in memory. A table that is one tensor with a head
stays one: both operations read the same bytes of the file. Scales are written in half precision, and cast behind, which
ONNX Runtime does once, when it opens the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from peltc.compiler.artifact import DataFile, content_of
from peltc.compiler.files.blocks import Blocks
from peltc.compiler.files.levels import Levels
from peltc.compiler.lowering.replacing import put_in_place
from peltc.compiler.lowering.written import Made, MadeLevels
from peltc.compiler.plan.quantising import Quantised
from peltc.spec.quantising import Quantise

Array = np.ndarray[Any, Any]
Pack = Callable[[Array, Quantise], Blocks]
LOST = 1 / 8
"""How much of a step rounding a scale to half precision may move a number of its block."""
Key = tuple[str, int]


@dataclass
class Quantiser:
    """Puts quantised weights in the place of those that a plan names, in all graphs of an artifact.

    Args:
        decided: which, and how.
        data: where they are written.
        pack: makes blocks of a weight [in, out].
        precision: the type that the graphs compute in.
        stored: gives the blocks of a weight that the checkpoint stores so.

    Attributes:
        errors: by weight, how far it is from what it was made of, as a share of that, both by their norms.
        left: the weights that stay as they are, and why.
    """

    decided: Quantised
    data: DataFile
    pack: Pack
    precision: str = "float32"
    stored: Callable[[str], Blocks | Levels | None] = lambda name: None
    errors: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    made: dict[Key, Made | MadeLevels] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.left = dict(self.decided.left)

    def run(self, graphs: Iterable[ir.Graph]) -> None:
        """Replace products by weights, and the picking of rows, in place; what nobody reads any more stays. A weight is
        quantised where all graphs can read it so."""
        found: list[tuple[ir.Graph, ir.Value, list[Reader]]] = []
        kept, picked = dict[Key, str](), set[Key]()
        for graph in graphs:
            for name in self.decided.weights:
                value = graph.initializers.get(name)
                if value is None:
                    continue  # one tensor with another, which has its own entry
                reading = readers(value)
                if isinstance(reading, str):
                    kept.setdefault(_key(value), reading)
                else:
                    found.append((graph, value, reading))
                    picked |= {_key(value) for reader in reading if reader.picks}
        for graph, value, reading in found:
            made = None if _key(value) in kept else self._made(value, reading[0].turned, picked, kept)
            if made is None:
                self.left[value.name or ""] = kept[_key(value)]
                continue
            for reader in reading:
                self._put(graph, reader.node, made)
        for graph in graphs:
            named = {name: graph.initializers[name] for name in self.decided.weights if name in graph.initializers}
            self.left |= {name: kept[_key(value)] for name, value in named.items() if _key(value) in kept}

    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        how = self.decided.how
        return {
            "to": how.to,
            "stored": self.decided.stored or None,
            "block": how.block,
            "zeros": how.zeros,
            "compute": how.compute,
            "weights": {name: round(error, 6) for name, error in self.errors.items()},
            "left": self.left,
        }

    def _made(self, value: ir.Value, turned: bool, picked: set[Key], kept: dict[Key, str]) -> Made | MadeLevels | None:
        """What becomes of a weight; None where it must stay, and why in `kept`."""
        name, key = value.name or "", _key(value)
        if key not in self.made and (own := self.stored(name)) is not None:
            assert turned and key not in picked  # a map's, by its outputs
            self.errors[name] = 0.0
            self.made[key] = (MadeLevels(name, own, self.data) if isinstance(own, Levels)
                              else Made(name, own, self.data, False))  # fmt: skip
        if key not in self.made:
            assert value.const_value is not None
            weight = np.asarray(content_of(value.const_value), np.float32)
            weight = np.ascontiguousarray(weight.T if turned else weight)  # [in, out]
            if key in picked and weight.shape[0] * self.decided.how.bits % 8:
                kept[key] = "its rows end within a byte"
                return None
            blocks = self._halved(self.pack(weight, self.decided.how))
            if blocks is None:
                kept[key] = f"scales of its blocks are not among the numbers of {self.precision}"
                return None
            self.errors[name] = blocks.error(weight.T)
            self.made[key] = Made(name, blocks, self.data, key in picked)
        return self.made[key]

    def _halved(self, blocks: Blocks) -> Blocks | None:
        """The same with scales in half precision; as they are where that loses too much, if the graph can read those.
        None where it cannot."""
        wide = self.precision == "bfloat16"  # no scale is out of its range
        kind = np.dtype(ml_dtypes.bfloat16 if wide else np.float16)
        with np.errstate(over="ignore"):
            scales = blocks.scales.astype(kind)
            moved = np.abs(scales.astype(np.float32) - blocks.scales) * (2**blocks.bits - 1)
        if wide or bool((moved <= LOST * np.abs(blocks.scales)).all()):
            return replace(blocks, scales=scales)
        return blocks if self.precision == "float32" else None

    def _put(self, graph: ir.Graph, node: ir.Node, made: Made | MadeLevels) -> None:
        """The operation in the place of a product, or of a picking; a bias is added behind."""
        out, bias = node.outputs[0], node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        new = [made.reader(graph, node, self.precision, self.decided.how.compute)]
        if bias is not None:
            new[0].outputs[0].name = f"{out.name}.product"
            new[0].outputs[0].shape, new[0].outputs[0].type = out.shape, out.type
            new.append(ir.node("Add", [new[0].outputs[0], bias], name=f"{node.name}.bias"))
        for one in new:
            one.metadata_props.update(node.metadata_props)
        put_in_place(new[-1].outputs[0], out)
        graph.insert_before(node, new)
        graph.remove(node, safe=True)


def _key(value: ir.Value) -> Key:
    """Where a weight's bytes lie: names may differ, in one graph and between them."""
    tensor = value.const_value
    return (str(tensor.path), tensor.offset or 0) if isinstance(tensor, ir.ExternalTensor) else (value.name or "", -1)


@dataclass(frozen=True)
class Reader:
    """A node that computes a product by a weight or picks rows of it, and whether the weight is stored [out, in]."""

    node: ir.Node
    turned: bool

    @property
    def picks(self) -> bool:
        """Whether it picks rows."""
        return self.node.op_type == "Gather"


def readers(weight: ir.Value) -> list[Reader] | str:
    """The nodes that read a weight; or, where one cannot read it quantised, why."""
    found, pending = list[Reader](), [(weight, False)]
    while pending:
        value, turned = pending.pop()
        if value.is_graph_output():
            return "it is an output"
        for use in value.uses():
            node, whole = use.node, list(use.node.attributes.get_ints("perm", ())) == [1, 0]
            if node.op_type == "Cast" or (node.op_type == "Transpose" and whole):
                pending.append((node.outputs[0], turned ^ (node.op_type == "Transpose")))
            elif use.idx == 1 and node.op_type == "MatMul":
                found.append(Reader(node, turned))
            elif use.idx == 1 and node.op_type == "Gemm" and _is_plain(node):
                found.append(Reader(node, turned ^ bool(node.attributes.get_int("transB", 0))))
            elif use.idx == 0 and node.op_type == "Gather" and not turned and not node.attributes.get_int("axis", 0):
                found.append(Reader(node, True))
            else:
                module = node.metadata_props.get("pelt.attachment")
                return f"'{module}' computes with it" if module else f"{node.op_type} reads it as well"
    return found if len({reader.turned for reader in found}) == 1 else "it is read in two directions"


def _is_plain(node: ir.Node) -> bool:
    """Whether a Gemm is a product and a bias."""
    scales = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    return scales == [1.0, 1.0] and not node.attributes.get_int("transA", 0)
