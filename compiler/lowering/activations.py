"""Activations in pieces as one operation: `FastGelu`, `QuickGelu` and `BiasGelu`, of ONNX Runtime.

    FastGelu(x; b)  = y (1 + tanh(√(2/π) (y + 0.044715 y³))) / 2, where y = x + b
    QuickGelu(x; α) = x σ(α x), of which SiLU is the case α = 1
    BiasGelu(x; b)  = the exact GELU of x + b

The first is read as a product: whatever the order of its factors, they are x, one half, and one more than a hyperbolic
tangent of an odd polynomial of x, whose two numbers are held against those of the formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from peltc.compiler.lowering.constants import scalar, sizes
from peltc.compiler.lowering.layout import rank
from peltc.compiler.lowering.maps import DOMAIN
from peltc.compiler.lowering.replacing import put_in_place

Terms = dict[int, float]
"""Powers of a value, and what each is multiplied by."""
FORMULA: Terms = {1: math.sqrt(2 / math.pi), 3: math.sqrt(2 / math.pi) * 0.044715}
NEAR = 1e-6
"""How far a number may be from the formula's, as a share: what float32 rounds it to."""


def put_activations(graph: ir.Graph) -> None:
    """Replace activations, in place; what nobody reads any more stays."""
    for node in list(graph):
        if node.op_type == "Mul" and not node.domain:
            if (x := _tanh_gelu(node.outputs[0])) is not None:
                inner, bias = _biased(x)
                _put(graph, node, "FastGelu", [inner, *([] if bias is None else [bias])], {})
            elif (found := _by_sigmoid(node)) is not None:
                _put(graph, node, "QuickGelu", [found[0]], {"alpha": found[1]})
        elif node.op_type == "Gelu" and not node.domain and node.inputs[0] is not None:
            inner, bias = _biased(node.inputs[0])
            if node.attributes.get_string("approximate", "none") == "tanh":
                _put(graph, node, "FastGelu", [inner, *([] if bias is None else [bias])], {})
            elif bias is not None:
                _put(graph, node, "BiasGelu", [inner, bias], {})


def _put(graph: ir.Graph, node: ir.Node, kind: str, inputs: list[ir.Value], attributes: dict[str, float]) -> None:
    new = ir.node(kind, inputs, attributes, domain=DOMAIN, name=node.name)
    new.metadata_props.update(node.metadata_props)
    put_in_place(new.outputs[0], node.outputs[0])
    graph.insert_before(node, new)
    graph.remove(node, safe=True)


def _biased(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """A value without the bias that ends it, and the bias."""
    node = value.producer()
    if node is not None and node.op_type == "Add" and not node.domain:
        for one, other in (tuple(node.inputs), tuple(node.inputs)[::-1]):
            if one is not None and other is not None and other.is_initializer() and _is_bias(other, one, value):
                return one, other
    return value, None


def _is_bias(bias: ir.Value, value: ir.Value, total: ir.Value) -> bool:
    found = sizes(value)
    return rank(bias) == 1 and found is not None and sizes(bias) == found[-1:] and found == sizes(total)


def _factors(value: ir.Value, reach: int = 4) -> Iterator[ir.Value]:
    """What is multiplied to a value."""
    node = value.producer()
    if node is None or node.op_type != "Mul" or node.domain or not reach or scalar(value) is not None:
        yield value
        return
    for factor in node.inputs:
        if factor is not None:
            yield from _factors(factor, reach - 1)


def _tanh_gelu(value: ir.Value) -> ir.Value | None:
    """The x of a GELU by a hyperbolic tangent."""
    factor, others = 1.0, list[ir.Value]()
    for part in _factors(value):
        number = scalar(part)
        if number is None:
            others.append(part)
        else:
            factor *= number
    if len(others) != 2 or abs(factor - 0.5) > 0.5 * NEAR:
        return None
    for x, gate in (others, others[::-1]):
        angle = _one_more_than_tanh(gate)
        terms = None if angle is None else _polynomial(angle, x)
        if (
            terms is not None
            and terms.keys() == FORMULA.keys()
            and all(abs(terms[order] / weight - 1) < NEAR for order, weight in FORMULA.items())
        ):
            return x
    return None


def _one_more_than_tanh(value: ir.Value) -> ir.Value | None:
    """The z of 1 + tanh z."""
    node = value.producer()
    if node is None or node.op_type != "Add":
        return None
    for one, other in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        maker = None if one is None else one.producer()
        if scalar(other) == 1.0 and maker is not None and maker.op_type == "Tanh":
            return maker.inputs[0]
    return None


def _polynomial(value: ir.Value | None, x: ir.Value, reach: int = 6) -> Terms | None:
    """A value as a polynomial of another, without what is of no power; None where it is none."""
    if value is x:
        return {1: 1.0}
    node = None if value is None or not reach else value.producer()
    if node is None or len(node.inputs) != 2 or node.op_type not in ("Add", "Mul", "Pow", "Div"):
        return None
    first, second = node.inputs
    number, other = scalar(second), first
    if number is None and node.op_type in ("Add", "Mul"):
        number, other = scalar(first), second
    one = _polynomial(other, x, reach - 1)
    if number is not None:
        if one is None or node.op_type == "Add":
            return None
        if node.op_type == "Pow":
            power, orders = int(number), list(one)
            if power != number or power < 1 or len(orders) != 1:
                return None
            return {orders[0] * power: one[orders[0]] ** power}
        return {order: weight * (number if node.op_type == "Mul" else 1 / number) for order, weight in one.items()}
    two = _polynomial(second, x, reach - 1)
    one = _polynomial(first, x, reach - 1)
    if one is None or two is None or node.op_type not in ("Add", "Mul"):
        return None
    found = Terms()
    if node.op_type == "Add":
        for order, weight in (*one.items(), *two.items()):
            found[order] = found.get(order, 0.0) + weight
    else:
        for order, weight in one.items():
            for other_order, by in two.items():
                found[order + other_order] = found.get(order + other_order, 0.0) + weight * by
    return found


def _by_sigmoid(node: ir.Node) -> tuple[ir.Value, float] | None:
    """The x and the α of x σ(α x)."""
    for x, gate in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        maker = None if gate is None else gate.producer()
        if x is None or maker is None or maker.op_type != "Sigmoid":
            continue
        inner, alpha = maker.inputs[0], 1.0
        scaling = None if inner is None or inner is x else inner.producer()
        if scaling is not None and scaling.op_type == "Mul":
            for one, other in (tuple(scaling.inputs), tuple(scaling.inputs)[::-1]):
                if one is x and (number := scalar(other)) is not None:
                    inner, alpha = one, number
        if inner is x:
            return x, alpha
    return None
