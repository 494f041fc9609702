"""Weights of base maps in blocks of small whole numbers: `MatMulNBits`, of ONNX Runtime.

    y = x Ŵᵀ,   Ŵ = (q - zero) · scale

Each output's inputs are divided into blocks; the numbers q of a block share a scale, and a zero point where there are
any. ONNX Runtime's own quantiser makes them of the weight in float32, what folds into it inside. One weight after the
other is read, made, and written to the artifact's data: no two are in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.artifact import DataFile, content_of
from peltc.compiler.plan.quantising import Quantised
from peltc.spec.quantising import Quantise

Array = np.ndarray[Any, Any]
Pack = Callable[[Array, Quantise], tuple[Array, Array, Array | None]]
OPERATION, DOMAIN = "MatMulNBits", "com.microsoft"
TINY = 1e-30
PARTS = (".quantised", ".scales", ".zeros")
"""Behind a weight's name: what it became."""
LEVELS = {"int8": 4, "float": 0}
"""ONNX Runtime's levels of accuracy, by what products are computed in."""


@dataclass
class Quantiser:
    """Puts quantised weights in the place of those that a plan names, graph after graph.

    Args:
        decided: which, and how.
        data: where they are written.
        pack: makes blocks of a weight [in, out]: the numbers [out, blocks, bytes], the scales [out, blocks], and the
            zero points [out, bytes] or None, two of four bits to a byte, the lower half first.

    Attributes:
        errors: by weight, how far it is from what it was made of, as a share of that, both by their norms.
        left: the weights that stay as they are, and why.
    """

    decided: Quantised
    data: DataFile
    pack: Pack
    errors: dict[str, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    parts: dict[str, list[ir.ExternalTensor]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.left = dict(self.decided.left)

    def run(self, graph: ir.Graph) -> None:
        """Replace the products of a graph, in place; what nobody reads any more stays."""
        for name in self.decided.weights:
            value = graph.initializers.get(name)
            if value is None or name in self.left:
                continue  # one tensor with another, which has its own entry
            found = readers(value)
            if isinstance(found, str):
                assert name not in self.errors, name  # graphs of one model read their weights alike
                self.left[name] = found
                continue
            for node, turned in found:
                self._put(graph, node, self._made(value, turned), name)

    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        how = self.decided.how
        return {
            "to": how.to,
            "block": how.block,
            "zeros": how.zeros,
            "compute": how.compute,
            "weights": {name: round(error, 6) for name, error in self.errors.items()},
            "left": self.left,
        }

    def _made(self, value: ir.Value, turned: bool) -> list[ir.ExternalTensor]:
        """The parts of a weight, in the artifact's data."""
        name = value.name or ""
        if name not in self.parts:
            assert value.const_value is not None
            weight = np.asarray(content_of(value.const_value), np.float32)
            weight = np.ascontiguousarray(weight.T if turned else weight)  # [in, out]
            self.sizes[name] = weight.shape[0], weight.shape[1]
            packed = self.pack(weight, self.decided.how)
            self.errors[name] = error_of(weight, packed, self.decided.how)
            parts = [part for part in packed if part is not None]
            self.parts[name] = [self.data.add(name + end, part) for end, part in zip(PARTS, parts, strict=False)]
        return self.parts[name]

    def _put(self, graph: ir.Graph, node: ir.Node, tensors: list[ir.ExternalTensor], name: str) -> None:
        """The operation in the place of a product; a bias is added behind."""
        how, (x, _, *bias) = self.decided.how, node.inputs
        out = node.outputs[0]
        assert x is not None
        inputs = [x, *(_value(graph, tensor) for tensor in tensors)]
        n_in, n_out = self.sizes[name]
        attributes = {"K": n_in, "N": n_out, "bits": how.bits, "block_size": how.block,
                      "accuracy_level": LEVELS[how.compute]}  # fmt: skip
        new = [ir.node(OPERATION, inputs, attributes, domain=DOMAIN, name=node.name)]
        if bias and bias[0] is not None:
            new[0].outputs[0].name = f"{out.name}.product"
            new[0].outputs[0].shape, new[0].outputs[0].type = out.shape, out.type
            new.append(ir.node("Add", [new[0].outputs[0], bias[0]], name=f"{node.name}.bias"))
        for one in new:
            one.metadata_props.update(node.metadata_props)
        after = new[-1].outputs[0]
        after.name, after.shape, after.type = out.name, out.shape, out.type
        out.replace_all_uses_with(after, replace_graph_outputs=True)
        graph.insert_before(node, new)
        graph.remove(node, safe=True)


def _value(graph: ir.Graph, tensor: ir.ExternalTensor) -> ir.Value:
    """A part of a weight as a value of the graph."""
    name = tensor.name or ""
    value = graph.initializers.get(name)
    if value is None:
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype),
                         const_value=tensor)  # fmt: skip
        graph.register_initializer(value)
    return value


def readers(weight: ir.Value) -> list[tuple[ir.Node, bool]] | str:
    """The products by a weight, and whether it is stored [out, in]; or, where something else reads it, what does."""
    found, pending = list[tuple[ir.Node, bool]](), [(weight, False)]
    while pending:
        value, turned = pending.pop()
        if value.is_graph_output():
            return "it is an output"
        for use in value.uses():
            node, whole = use.node, list(use.node.attributes.get_ints("perm", ())) == [1, 0]
            if node.op_type == "Cast" or (node.op_type == "Transpose" and whole):
                pending.append((node.outputs[0], turned ^ (node.op_type == "Transpose")))
            elif use.idx == 1 and node.op_type == "MatMul":
                found.append((node, turned))
            elif use.idx == 1 and node.op_type == "Gemm" and _is_plain(node):
                found.append((node, turned ^ bool(node.attributes.get_int("transB", 0))))
            else:
                module = node.metadata_props.get("pelt.attachment")
                return f"'{module}' computes with it" if module else f"{node.op_type} reads it as well"
    return found if len({turned for _, turned in found}) == 1 else "it is read in two directions"


def _is_plain(node: ir.Node) -> bool:
    """Whether a Gemm is a product and a bias."""
    scales = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    return scales == [1.0, 1.0] and not node.attributes.get_int("transA", 0)


def dequantised(packed: Array, scales: Array, zeros: Array | None, bits: int, n_in: int) -> Array:
    """The weight [out, in] that blocks stand for, float32: (q - zero) · scale."""
    n_out, blocks, _ = packed.shape
    numbers = _unpacked(packed, bits).reshape(n_out, blocks, -1).astype(np.float32)
    middle = np.float32(1 << (bits - 1)) if zeros is None else _unpacked(zeros, bits)[:, :blocks, None]
    result: Array = ((numbers - middle) * scales.reshape(n_out, blocks, 1)).reshape(n_out, -1)[:, :n_in]
    return result


def _unpacked(numbers: Array, bits: int) -> Array:
    """Numbers of four bits, two of which are in a byte, the lower half first."""
    if bits == 8:
        return numbers
    return np.stack([numbers & 15, numbers >> 4], -1).reshape(*numbers.shape[:-1], -1)


def error_of(weight: Array, packed: tuple[Array, Array, Array | None], how: Quantise) -> float:
    """How far a quantised weight is from what it was made of, as a share of that, both by their norms."""
    off = dequantised(*packed, how.bits, weight.shape[0]) - weight.T
    return float(np.linalg.norm(off)) / max(float(np.linalg.norm(weight)), TINY)
