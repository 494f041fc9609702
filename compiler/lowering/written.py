"""Quantised weights in an artifact's data, the operations of ONNX Runtime that read them, and how they are read back.

blocks    y = MatMulNBits(x), y = GatherBlockQuantized(ids)       (q - zero) · scale
levels    y = MatMulBnb4(x)                                       level[q] · scale
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.artifact import DataFile, content_of, digest
from peltc.compiler.files.blocks import Blocks
from peltc.compiler.files.levels import Levels

Array = np.ndarray[Any, Any]
OPERATION, LOOKUP, LEVELLED, DOMAIN = "MatMulNBits", "GatherBlockQuantized", "MatMulBnb4", "com.microsoft"
NUMBERS, ROWS, SCALES, ZEROS = ".quantised", ".rows", ".scales", ".zeros"
"""Behind a weight's name: what it became."""
ORDER = "order."
"""What names of orders of columns begin with; maps that read the same may have one together."""
LEVELS = {"int8": 4, "float": 0}
"""ONNX Runtime's levels of accuracy, by what products are computed in."""
NF4 = 1
"""ONNX Runtime's number for the type."""
COMPUTED = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
"""What graphs compute in."""


class Made:
    """A weight's blocks in an artifact's data; none of them stays in memory.

    Args:
        picked: whether rows of it are picked.
    """

    def __init__(self, name: str, blocks: Blocks, data: DataFile, picked: bool):
        self.attributes = {"bits": blocks.bits, "block_size": blocks.block}
        self.sizes = {"K": blocks.n_in, "N": len(blocks.numbers)}
        self.numbers = data.add(name + NUMBERS, blocks.numbers)
        self.scaling = data.add(name + SCALES, blocks.scales)
        self.zeros = [] if blocks.zeros is None else [data.add(name + ZEROS, blocks.zeros)]
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

    def reader(self, graph: ir.Graph, node: ir.Node, precision: str, compute: str) -> ir.Node:
        """What does as a node does that reads the weight: a product, without its bias, or a picking of rows.

        Args:
            precision: the type that the graph computes in.
            compute: what products are computed in.
        """
        scales, zeros = scaled(graph, self.scaling, precision), [value_of(graph, part) for part in self.zeros]
        if node.op_type == "Gather":
            inputs = [value_of(graph, self.rows), node.inputs[1], scales, *zeros]
            more = {"gather_axis": 0, "quantize_axis": 1}
            return ir.node(LOOKUP, inputs, self.attributes | more, domain=DOMAIN, name=node.name)
        inputs = [self._ordered(graph, node), value_of(graph, self.numbers), scales, *zeros]
        more = {**self.sizes, "accuracy_level": LEVELS[compute]}
        return ir.node(OPERATION, inputs, self.attributes | more, domain=DOMAIN, name=node.name)

    def _ordered(self, graph: ir.Graph, product: ir.Node) -> ir.Value | None:
        """What a product reads, with columns in the order that the blocks have them in."""
        x = product.inputs[0]
        if self.order is None or x is None:
            return x
        node = ir.node("Gather", [x, value_of(graph, self.order)], {"axis": -1}, name=f"{product.name}.order")
        node.metadata_props.update(product.metadata_props)
        result = node.outputs[0]
        result.name, result.shape, result.type = f"{product.outputs[0].name}.ordered", x.shape, x.type
        graph.insert_before(product, node)
        return result


class MadeLevels:
    """A weight's levels in an artifact's data."""

    def __init__(self, name: str, levels: Levels, data: DataFile):
        self.numbers = data.add(name + NUMBERS, levels.numbers)
        self.scaling = data.add(name + SCALES, levels.scales)
        self.attributes = {"K": levels.shape[1], "N": levels.shape[0], "block_size": levels.block, "quant_type": NF4}

    def reader(self, graph: ir.Graph, node: ir.Node, precision: str, compute: str) -> ir.Node:
        """As of blocks, of a product; its inputs are read as they are."""
        inputs = [node.inputs[0], value_of(graph, self.numbers), scaled(graph, self.scaling, precision)]
        return ir.node(LEVELLED, inputs, self.attributes, domain=DOMAIN, name=node.name)


def scaled(graph: ir.Graph, scaling: ir.ExternalTensor, precision: str) -> ir.Value:
    """Scales in the type of the computation."""
    held, wanted = value_of(graph, scaling), COMPUTED[precision]
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


def value_of(graph: ir.Graph, tensor: ir.ExternalTensor) -> ir.Value:
    """A part of a weight as a value of the graph."""
    name = tensor.name or ""
    value = graph.initializers.get(name)
    if value is None:
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype),
                         const_value=tensor)  # fmt: skip
        graph.register_initializer(value)
    return value


def blocks_in(graph: ir.Graph) -> dict[str, Blocks | Levels]:
    """The quantised weights that a graph computes with, by the name of the weight that they stand for; of weights of
    which a part is missing, none."""
    found: dict[str, Blocks | Levels] = {}
    for node in graph:
        at = {OPERATION: 1, LOOKUP: 0, LEVELLED: 1}.get(node.op_type)
        held = None if at is None else node.inputs[at]
        if held is None or held.name is None or held.const_value is None:
            continue
        name = held.name.removesuffix(NUMBERS).removesuffix(ROWS)
        scales, zeros = (_content(graph, name + end) for end in (SCALES, ZEROS))
        if scales is None or (zeros is None and len(node.inputs) > 3):
            continue
        numbers, sizes = content_of(held.const_value), node.attributes
        if node.op_type == LEVELLED:
            shape = sizes.get_int("N", 0), sizes.get_int("K", 0)
            found[name] = Levels(numbers, scales, sizes.get_int("block_size", 0), shape)
            continue
        bits, block = sizes.get_int("bits", 0), sizes.get_int("block_size", 0)
        n_in = sizes.get_int("K", numbers.shape[1] * 8 // bits)
        rows, width = numbers.reshape(len(numbers), -1), scales.shape[1] * block * bits // 8
        rows = np.pad(rows, ((0, 0), (0, width - rows.shape[1]))).reshape(len(rows), scales.shape[1], -1)
        found[name] = Blocks(rows, scales, zeros, bits, n_in, _order_of(node))
    return found


def _content(graph: ir.Graph, name: str) -> Array | None:
    """What an initializer holds."""
    value = graph.initializers.get(name)
    return None if value is None or value.const_value is None else np.array(content_of(value.const_value))


def _order_of(product: ir.Node) -> Array | None:
    """The order of columns that a product reads its input in."""
    maker = product.inputs[0].producer() if product.inputs[0] is not None else None
    order = maker.inputs[1] if maker is not None and maker.op_type == "Gather" else None
    if order is None or order.const_value is None or not (order.name or "").startswith(ORDER):
        return None
    return np.array(content_of(order.const_value))
