"""Normalisations as one operation, with the addition to the residual stream before them.

    RMSNormalization(x; g)               = g x / sqrt(mean(x²) + ε)
    SkipSimplifiedLayerNormalization(x, r; g)     = the same of x + r, and x + r
    SkipLayerNormalization(x, r, b; g, c)         = g (y − mean y) / sqrt(var y + ε) + c of y = x + b + r, and y

`onnxscript` finds the pieces of an RMS norm. What is added before a norm is read from the
norm: operands as wide as the sum, neither of them a weight, and the bias of a map where there is one.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern
from onnxscript.rewriter.rules.fusion._rms_normalization import RmsNormFusion

from peltc.compiler.lowering.layout import rank
from peltc.compiler.lowering.maps import DOMAIN
from peltc.compiler.lowering.replacing import put_in_place

SKIPS = {"RMSNormalization": "SkipSimplifiedLayerNormalization", "LayerNormalization": "SkipLayerNormalization"}
"""The operations that add before they normalise, by those that do not."""


FOUND: Any = RmsNormFusion  # untyped


class _Norm(FOUND):  # type: ignore[misc]
    """`onnxscript`'s rule, which drops the cast of what is normalised: where the gain is in another type, as in a model
    whose norms are in float32 among half precision, the cast stays."""

    def rewrite(self, op: Any, x: Any, scale: Any, epsilon: Any, target_dtype: Any = None, **rest: Any) -> Any:
        if target_dtype is None and x.dtype != scale.dtype:
            x = op.Cast(x, to=scale.dtype)
        return super().rewrite(op, x, scale, epsilon, **rest)


NORMS = pattern.RewriteRuleSet([_Norm.rule("norm, its gain behind", True), _Norm.rule("norm, its gain before", False)])


def put_norms(model: ir.Model) -> None:
    """Replace the pieces of norms, and norms of sums, in place."""
    NORMS.apply_to_model(model)
    for node in list(model.graph):
        if node.op_type in SKIPS and node.domain == "" and len(node.outputs) == 1:
            _join(node, model.graph)


def _join(node: ir.Node, graph: ir.Graph) -> None:
    """Let a norm add what it is of, where that is a sum of two values of its own width."""
    total, gain = node.inputs[:2]
    adding = None if total is None else total.producer()
    axis = node.attributes.get_int("axis", -1)
    if total is None or gain is None or adding is None or adding.op_type != "Add" or rank(total) != 3:
        return
    if axis not in (-1, 2) or node.attributes.get_int("stash_type", 1) != 1 or gain.dtype != total.dtype:
        return
    if not all(_alike(v, total) for v in adding.inputs):
        return
    x, residual = adding.inputs
    bias = None
    if node.op_type == "LayerNormalization":
        for one, other in ((x, residual), (residual, x)):
            if one is not None and (parts := _biased(one, total)) is not None:
                (x, bias), residual = parts, other
                break
    inputs = [x, residual, *node.inputs[1:]]
    if bias is not None:
        inputs += [None] * (4 - len(inputs)) + [bias]
    attributes = {"epsilon": node.attributes.get_float("epsilon", 1e-5)}
    joined = ir.node(SKIPS[node.op_type], inputs, attributes, domain=DOMAIN, num_outputs=4, name=node.name)
    joined.metadata_props.update(node.metadata_props)
    put_in_place(joined.outputs[0], node.outputs[0])
    put_in_place(joined.outputs[3], total)
    for unused in joined.outputs[1:3]:
        unused.name = ""
    graph.insert_before(node, joined)
    graph.remove(node, safe=True)


def _alike(value: ir.Value | None, total: ir.Value) -> bool:
    """Whether a value has the sizes of a sum [B, S, d] that it is a part of, by their names."""
    if value is None or value.is_initializer() or value.shape is None or total.shape is None or value.dtype is None:
        return False
    same = [str(size) for size in value.shape] == [str(size) for size in total.shape]
    return same and value.dtype == total.dtype and "None" not in map(str, value.shape)


def _biased(value: ir.Value, total: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """A value without the bias that ends it, and the bias, where nothing else reads their sum."""
    node = value.producer()
    if node is None or node.op_type != "Add" or len(tuple(value.uses())) != 1 or value.is_graph_output():
        return None
    for one, other in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        if other is not None and other.is_initializer() and rank(other) == 1 and one is not None and _alike(one, total):
            return one, other
    return None
