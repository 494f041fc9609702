"""Weights of the base in blocks of small whole numbers: `MatMulNBits` and `GatherBlockQuantized`, of ONNX Runtime.

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

from peltc.compiler.artifact import DataFile, content_of, digest
from peltc.compiler.files.blocks import Blocks
from peltc.compiler.lowering.replacing import put_in_place
from peltc.compiler.plan.quantising import Quantised
from peltc.spec.quantising import Quantise

Array = np.ndarray[Any, Any]
Pack = Callable[[Array, Quantise], Blocks]
OPERATION, LOOKUP, DOMAIN = "MatMulNBits", "GatherBlockQuantized", "com.microsoft"
NUMBERS, ROWS, SCALES, ZEROS = ".quantised", ".rows", ".scales", ".zeros"
"""Behind a weight's name: what it became."""
ORDER = "order."
"""What names of orders of columns begin with; maps that read the same may have one together."""
LEVELS = {"int8": 4, "float": 0}
"""ONNX Runtime's levels of accuracy, by what products are computed in."""
LOST = 1 / 8
"""How much of a step rounding a scale to half precision may move a number of its block."""
COMPUTED = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
"""What graphs compute in."""
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
    stored: Callable[[str], Blocks | None] = lambda name: None
    errors: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    made: dict[Key, Made] = field(default_factory=dict)

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

    def _made(self, value: ir.Value, turned: bool, picked: set[Key], kept: dict[Key, str]) -> Made | None:
        """What becomes of a weight; None where it must stay, and why in `kept`."""
        name, key = value.name or "", _key(value)
        if key not in self.made and (own := self.stored(name)) is not None:
            assert turned and key not in picked  # a map's, by its outputs
            self.errors[name], self.made[key] = 0.0, Made(name, own, self.data, False)
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

    def _put(self, graph: ir.Graph, node: ir.Node, made: Made) -> None:
        """The operation in the place of a product, or of a picking; a bias is added behind."""
        picking, out = node.op_type == "Gather", node.outputs[0]
        scales = made.scales(graph, self.precision)
        zeros = [] if made.zeros is None else [_value(graph, made.zeros)]
        attributes = {"bits": made.bits, "block_size": made.block}
        bias: list[ir.Value | None] = []
        if picking:
            inputs = [_value(graph, made.rows), node.inputs[1], scales, *zeros]
            attributes |= {"gather_axis": 0, "quantize_axis": 1}
        else:
            inputs = [made.ordered(graph, node), _value(graph, made.numbers), scales, *zeros]
            attributes |= {"K": made.n_in, "N": made.n_out, "accuracy_level": LEVELS[self.decided.how.compute]}
            bias = list(node.inputs[2:3])
        new = [ir.node(LOOKUP if picking else OPERATION, inputs, attributes, domain=DOMAIN, name=node.name)]
        if bias and bias[0] is not None:
            new[0].outputs[0].name = f"{out.name}.product"
            new[0].outputs[0].shape, new[0].outputs[0].type = out.shape, out.type
            new.append(ir.node("Add", [new[0].outputs[0], bias[0]], name=f"{node.name}.bias"))
        for one in new:
            one.metadata_props.update(node.metadata_props)
        put_in_place(new[-1].outputs[0], out)
        graph.insert_before(node, new)
        graph.remove(node, safe=True)


class Made:
    """A weight's blocks in an artifact's data; none of them stays in memory.

    Args:
        picked: whether rows of it are picked.
    """

    def __init__(self, name: str, blocks: Blocks, data: DataFile, picked: bool):
        self.bits, self.block, self.n_in, self.n_out = blocks.bits, blocks.block, blocks.n_in, len(blocks.numbers)
        self.numbers = data.add(name + NUMBERS, blocks.numbers)
        self.scaling = data.add(name + SCALES, blocks.scales)
        self.zeros = None if blocks.zeros is None else data.add(name + ZEROS, blocks.zeros)
        self.order = None
        if blocks.order is not None:
            self.order = data.add(f"{ORDER}{digest(blocks.order)[:16]}", blocks.order)
        self.rows = self.numbers
        if picked and blocks.rows.size != blocks.numbers.size:
            self.rows = data.add(name + ROWS, blocks.rows)
        elif picked:  # the same bytes
            held = self.numbers
            self.rows = ir.ExternalTensor(held.location, held.offset, held.length, held.dtype,
                                          shape=ir.Shape(blocks.rows.shape), name=name + ROWS,
                                          base_dir=held.base_dir)  # fmt: skip

    def ordered(self, graph: ir.Graph, product: ir.Node) -> ir.Value | None:
        """What a product reads, with columns in the order that the blocks have them in."""
        x = product.inputs[0]
        if self.order is None or x is None:
            return x
        order = _value(graph, self.order)
        node = ir.node("Gather", [x, order], {"axis": -1}, name=f"{product.name}.order")
        node.metadata_props.update(product.metadata_props)
        result = node.outputs[0]
        result.name, result.shape, result.type = f"{product.outputs[0].name}.ordered", x.shape, x.type
        graph.insert_before(product, node)
        return result

    def scales(self, graph: ir.Graph, precision: str) -> ir.Value:
        """The scales in the type of the computation."""
        held = _value(graph, self.scaling)
        wanted = COMPUTED[precision]
        if held.dtype == wanted:
            return held
        for use in held.uses():
            if use.node.op_type == "Cast":
                return use.node.outputs[0]
        cast = ir.node("Cast", [held], {"to": wanted.value}, name=f"{held.name}.computed")
        result = cast.outputs[0]
        result.name, result.shape, result.type = f"{held.name}.computed", held.shape, ir.TensorType(wanted)
        graph.insert_before(graph[0], cast)
        return result


def _key(value: ir.Value) -> Key:
    """Where a weight's bytes lie: names may differ, in one graph and between them."""
    tensor = value.const_value
    return (str(tensor.path), tensor.offset or 0) if isinstance(tensor, ir.ExternalTensor) else (value.name or "", -1)


def _value(graph: ir.Graph, tensor: ir.ExternalTensor) -> ir.Value:
    """A part of a weight as a value of the graph."""
    name = tensor.name or ""
    value = graph.initializers.get(name)
    if value is None:
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype),
                         const_value=tensor)  # fmt: skip
        graph.register_initializer(value)
    return value


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


def blocks_in(graph: ir.Graph) -> dict[str, Blocks]:
    """The blocks that a graph computes with, by the name of the weight that they stand for; of weights of which a part
    is missing, none."""
    found: dict[str, Blocks] = {}
    for node in graph:
        numbers = {OPERATION: 1, LOOKUP: 0}.get(node.op_type)
        held = None if numbers is None else node.inputs[numbers]
        if held is None or held.name is None:
            continue
        name = held.name.removesuffix(NUMBERS).removesuffix(ROWS)
        parts = [content_of(part.const_value) if (part := graph.initializers.get(name + end)) and part.const_value
                 else None for end in (SCALES, ZEROS)]  # fmt: skip
        if parts[0] is None or held.const_value is None or (parts[1] is None and len(node.inputs) > 3):
            continue
        bits, block = (node.attributes.get_int(key, 0) for key in ("bits", "block_size"))
        content = content_of(held.const_value)
        n_in = node.attributes.get_int("K", content.shape[1] * 8 // bits)
        rows = content.reshape(len(content), -1)
        width = parts[0].shape[1] * block * bits // 8
        rows = np.pad(rows, ((0, 0), (0, width - rows.shape[1]))).reshape(len(rows), parts[0].shape[1], -1)
        found[name] = Blocks(rows, np.array(parts[0]), parts[1], bits, n_in, _order_of(node))
    return found


def _order_of(product: ir.Node) -> Array | None:
    """The order of columns that a product reads its input in."""
    maker = product.inputs[0].producer() if product.inputs[0] is not None else None
    order = maker.inputs[1] if maker is not None and maker.op_type == "Gather" else None
    if order is None or order.const_value is None or not (order.name or "").startswith(ORDER):
        return None
    return np.array(content_of(order.const_value))
