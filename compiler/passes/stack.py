"""Stacking: inserted products that read one value become one product, whose result is split.

    x ─► MatMul w₁ ─► σ ─► mean ─► g₁         x ─► MatMul [w₁ w₂] ─► σ ─► mean ─► Split ─► g₁
    x ─► MatMul w₂ ─► σ ─► mean ─► g₂    becomes                                      └──► g₂

First whole chains of operations that keep features apart (gates), then bare products (LoRA's A beside an adapter's
down-projection): many thin products cost more than one that is wider.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter, replace_uses

MARK = "pelt.attachment"
UNARY = {"Sigmoid", "Tanh", "Relu", "Gelu", "Neg", "Exp", "Abs", "Sqrt"}
BINARY = {"Add", "Mul", "Sub", "Div"}
Array = np.ndarray[Any, Any]


@dataclass
class Chain:
    """A product and what follows it feature by feature.

    Attributes:
        nodes: the product first.
        constants: of each node the constant over features [N], None where it has none.
        signature: what chains must have in common to be stacked.
    """

    x: ir.Value
    weight: Array
    nodes: list[ir.Node] = field(default_factory=list)
    constants: list[Array | None] = field(default_factory=list)
    signature: list[Any] = field(default_factory=list)

    @property
    def end(self) -> ir.Value:
        return self.nodes[-1].outputs[0]


def stack(model: ir.Model) -> None:
    """Stack what can be stacked, in place."""
    for whole in (True, False):
        groups: dict[Any, list[Chain]] = {}
        for node in model.graph:
            chain = _chain(node, model.graph, whole)
            if chain is not None and (len(chain.nodes) > 1 or not whole):
                groups.setdefault((chain.x, tuple(chain.signature)), []).append(chain)
        for chains in groups.values():
            if len(chains) > 1:
                _merge(chains, model.graph)
    model.graph.sort()


def _constant(value: ir.Value | None) -> Array | None:
    """A constant that the rewrite has added."""
    if value is None or value.const_value is None or MARK not in value.metadata_props:
        return None
    return np.asarray(value.const_value.numpy())


def _chain(node: ir.Node, graph: ir.Graph, whole: bool) -> Chain | None:
    """The chain that an inserted product by a constant begins; of one node unless `whole`."""
    if node.op_type != "MatMul" or MARK not in node.metadata_props:
        return None
    weight, x = _constant(node.inputs[1]), node.inputs[0]
    if weight is None or weight.ndim != 2 or x is None or node.inputs[1] is None:
        return None
    if x.shape is not None and len(x.shape) == 1:  # weights over a bank: the product is as wide as the bank
        return None
    chain = Chain(x, weight, [node], [None], ["MatMul", len(weight), node.inputs[1].dtype])
    while whole:
        uses = tuple(chain.end.uses())
        if len(uses) != 1 or chain.end in graph.outputs:
            break
        step = _step(uses[0].node, uses[0].idx, weight.shape[1])
        if step is None:
            break
        chain.nodes.append(uses[0].node)
        chain.constants.append(step[1])
        chain.signature.append(step[0])
    return chain


def _step(node: ir.Node, index: int, width: int) -> tuple[Any, Array | None] | None:
    """What an operation does to each feature apart, and its constant over features; None where it mixes them."""
    if MARK not in node.metadata_props:
        return None
    attributes = tuple(sorted((a.name, str(a.value)) for a in node.attributes.values() if isinstance(a, ir.Attr)))
    if node.op_type in UNARY:
        return (node.op_type, attributes), None
    if node.op_type in BINARY and len(node.inputs) == 2:
        constant = _constant(node.inputs[1 - index])
        if constant is None or constant.shape not in ((), (1,), (width,)):
            return None
        return (node.op_type, index), np.broadcast_to(constant, (width,))
    if node.op_type == "ReduceMean" and index == 0:
        axes = node.inputs[1].const_value if node.inputs[1] is not None else None
        if axes is not None and axes.numpy().tolist() == [1] and node.attributes.get_int("keepdims", 1) == 1:
            return (node.op_type, 1), None
    return None


def _merge(chains: list[Chain], graph: ir.Graph) -> None:
    """One chain in place of several, and a split at its end."""
    first = chains[0]
    marks = dict(first.nodes[0].metadata_props)
    names = dict.fromkeys(name for c in chains for name in c.nodes[0].metadata_props[MARK].split("+"))
    marks[MARK] = "+".join(names)
    dtype = first.signature[2]  # not that of the content, which may be wider
    emitter = Emitter(graph, dtype, f"pelt.{marks[MARK]}.{marks['pelt.site']}", marks)
    x = first.nodes[0].inputs[0]  # by now: what it was when the chain was found may have been stacked itself
    value = emitter.node("MatMul", [x, emitter.constant(np.concatenate([c.weight for c in chains], 1), "weight")])
    for i, node in enumerate(first.nodes[1:], 1):
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if first.constants[i] is None:
            value = emitter.node(node.op_type, [value, *node.inputs[1:]], attributes)
            continue
        joined = emitter.constant(np.concatenate([c.constants[i] for c in chains]), "bias")
        pair = [value, joined] if first.signature[2 + i][1] == 0 else [joined, value]
        value = emitter.node(node.op_type, pair, attributes)
    widths = [c.weight.shape[1] for c in chains]
    for chain, part in zip(chains, emitter.split(value, widths), strict=True):
        replace_uses(chain.end, part, set(), graph)
    constants = [value for chain in chains for node in chain.nodes for value in node.inputs]  # a removed node has none
    for chain in chains:
        graph.remove(list(reversed(chain.nodes)), safe=True)
    for constant in constants:
        _drop(constant, graph)


def _drop(value: ir.Value | None, graph: ir.Graph) -> None:
    """Forget a constant that nothing reads any more."""
    if value is not None and value.name and value.name in graph.initializers and not tuple(value.uses()):
        graph.initializers.pop(value.name)
