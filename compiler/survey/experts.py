"""Experts: linear maps whose weights are stacked in one parameter; a router says which tokens each of them gets.

    tokens in the order of their experts ─┬─► Gather ─► MatMul with slice 0 ─┐
                                          ├─► Gather ─► MatMul with slice 1 ─┼─► Concat ─► (+ bias) ─► y
                                          └─► ...                           ─┘

The exporter writes them so where a model groups its tokens by expert. Other ways, such as a product with the whole
stack, are not followed: there the parameter is a site that nothing attaches to.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import onnx_ir as ir

from peltc.compiler.graphs.flow import Flow, Linear
from peltc.compiler.survey.anatomy import Rows
from peltc.compiler.survey.owned import gated, owned_features
from peltc.compiler.survey.probe import ranges

Stack = Linear
"""The maps of all experts as one: `node` is the node that joins their results, in the order of the stack; `x` and `y`
are its tokens in that order."""
TOKENS = 6
"""How many tokens stand in one row while features are followed; any number would do."""


def find_stack(flow: Flow, weight: str, products: Sequence[ir.Node]) -> Stack | None:
    """The maps of a stacked parameter, if each of its slices is used in one product and their results are joined.

    Args:
        products: the products by the parameter's slices.
    """
    experts = flow.parameters[weight][0]
    readers = {reader for product in products for reader in flow.readers(product.outputs[0])}
    if len(products) != experts or len(readers) != 1 or any(p.op_type != "MatMul" for p in products):
        return None
    (joint,) = readers
    if joint.op_type != "Concat" or joint.attributes.get_int("axis", 0) != 0:
        return None
    if [v.producer() for v in joint.inputs if v is not None] != list(products):
        return None
    slices = [_slice(flow, product.inputs[1], weight) for product in products]
    if slices[0] is None or slices != [(number, slices[0][1]) for number in range(experts)]:
        return None
    gathered = [v.producer() for product in products if (v := product.inputs[0]) is not None]
    sources = {node.inputs[0] for node in gathered if node is not None and node.op_type == "Gather"}
    if len(gathered) != experts or len(sources) != 1 or any(n is None or n.op_type != "Gather" for n in gathered):
        return None
    x = sources.pop()
    assert x is not None and slices[0] is not None
    inputs, outputs = flow.parameters[weight][1:][:: -1 if slices[0][1] else 1]
    bias, y = _bias(flow, joint.outputs[0], (experts, outputs))
    return Linear(weight, bias, x, y, inputs, outputs, not slices[0][1], joint)


def _slice(flow: Flow, value: ir.Value | None, weight: str) -> tuple[int, bool] | None:
    """Which slice of a stacked parameter a matrix is, and whether it is turned; None for anything else."""
    number, turned = None, False
    while value is not None and value.name != weight:
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Transpose":
            last = tuple(node.attributes.get_ints("perm", ()))[-2:]
            turned ^= last in ((2, 1), (1, 0))
        elif node.op_type == "Split" and number is None and node.attributes.get_int("axis", 0) == 0:
            number = list(node.outputs).index(value)
        elif node.op_type not in ("Squeeze", "Cast", "Identity"):
            return None
        value = node.inputs[0]
    return None if value is None or number is None else (number, turned)


def _bias(flow: Flow, y: ir.Value, shape: tuple[int, int]) -> tuple[str | None, ir.Value]:
    """The stacked bias of which each token gets its expert's row, and the sum."""
    readers = flow.readers(y)
    if len(readers) == 1 and readers[0].op_type == "Add":
        other = next((v for v in readers[0].inputs if v is not y), None)
        node = other.producer() if other is not None else None
        picks = node is not None and node.op_type in ("Gather", "GatherND")
        name = flow.parameter(node.inputs[0]) if node is not None and picks else None
        if name is not None and flow.parameters[name] == shape:
            return name, readers[0].outputs[0]
    return None, y


def gate_and_up(flow: Flow, stack: Stack) -> dict[str, Rows]:
    """The features of a gated network's gate and of the side beside it, by the side; empty where there is no gate that
    can be told from the other side."""
    alone = copy.copy(flow)
    alone.linear_of = {stack.y: stack, stack.node.outputs[0]: stack}
    for value in _steps(flow, stack.y):
        sides = gated(alone, value, TOKENS) or gated(alone, value, TOKENS, but="Clip")  # both sides may be bounded
        if sides is None:
            continue
        rows = {}
        for name, (_, side) in zip(("gate", "up"), sides, strict=True):
            owned = owned_features(flow, stack, side, TOKENS)
            if owned is None or not len(owned):
                return {}
            rows[name] = ranges(owned.tolist())
        return rows
    return {}


def _steps(flow: Flow, start: ir.Value, most: int = 24) -> list[ir.Value]:
    """Products of values that are made of another one alone, nearest first."""
    found, pending, seen = [], [start], {start}
    while pending and len(seen) < most:
        for reader in flow.readers(pending.pop(0)):
            for value in reader.outputs:
                if value not in seen and reader.op_type not in ("Shape", "Gather", "GatherND", "Concat", "MatMul"):
                    seen.add(value)
                    pending.append(value)
                    if reader.op_type == "Mul" and all(flow.depends(v, start) for v in reader.inputs if v is not None):
                        found.append(value)
    return found
