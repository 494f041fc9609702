"""What an attention core computes, read from the graph that is about to be written, modules included.

    softmax(c tanh(s q kᵀ / c) + m) v
    softmax([c tanh(s q kᵀ / c) + m, z]) [v; 0], where a sink z takes part: a score that no key has

Read from the softmax inwards, whatever modules changed: each step on the way to the product is a factor, something
added, a condition, or a cap, and anything else is a reason why the core stays in pieces. Layout behind the operands is
undone by carrying indices through it, so that keys and values are found as they lie in a cache, before heads are
repeated for their groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from peltc.compiler.lowering.constants import scalar
from peltc.compiler.lowering.layout import laid_out, rank, transposed

MASKED = -1e3
"""What is put in the place of a score, at most, where a condition hides it."""
STEPS = {"Add", "Sub", "Mul", "Div", "Where", "Tanh", "Cast", "Identity", "Max", "Clip", "Neg"}
"""What may stand between a product and a softmax."""


class Unread(Exception):
    """Why a core is none that one operation computes."""


@dataclass(frozen=True, eq=False)
class Term:
    """Something added to scores: a value times a factor; a condition where `shows` says which of its values shows.
    `flat` where the scores that it is added to are [N, S, T]."""

    value: ir.Value
    factor: float = 1.0
    shows: bool | None = None
    flat: bool = False


@dataclass
class _Way:
    """What lies between a softmax and the products around it."""

    reshaped: bool = False
    cut: bool = False
    sink: ir.Value | None = None
    factor: float = 1.0
    cap: float = 0.0
    terms: list[Term] = field(default_factory=list)
    wide: bool = False


@dataclass(eq=False)
class Reading:
    """What a core computes.

    Attributes:
        softmax, context: the softmax, and the product with values, which is the core's result: [B, H, S, Dv] or
            [N, S, Dv].
        query, key, value: [B, H, S, Dh], [B, K, T, Dh] and [B, K, T, Dv]; or [N, S, Dh], [N, T, Dh] and [N, T, Dv].
        turned: whether the key is read as it stands in the product instead: [..., Dh, T].
        scale, cap: s and c; a cap of zero is none.
        terms: what is added up to the mask m.
        wide: whether scores are cast to float32 for the softmax.
        sink: z [B, H, S, 1], or with axes of one.
    """

    softmax: ir.Node
    context: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    turned: bool = False
    scale: float = 1.0
    cap: float = 0.0
    terms: list[Term] = field(default_factory=list)
    wide: bool = False
    sink: ir.Value | None = None

    @property
    def rank(self) -> int:
        """Of the operands."""
        return rank(self.query) or 4


def is_core(node: ir.Node) -> bool:
    """Whether a node is the softmax of an attention: over the last axis, and something is weighed with it."""
    if node.op_type != "Softmax" or node.inputs[0] is None:
        return False
    axis = node.attributes.get_int("axis", -1)
    return (axis == -1 or axis + 1 == rank(node.inputs[0])) and any(True for _ in _weighed(node.outputs[0]))


def _weighed(value: ir.Value, limit: int = 12) -> Iterator[ir.Node]:
    """The products of two computed things that read probabilities."""
    pending, seen = [value], {value}
    for _ in range(limit):
        if not pending:
            return
        current = pending.pop(0)
        for use in current.uses():
            if use.node.op_type in ("MatMul", "Einsum"):
                if all(_computed(v) for v in use.node.inputs):
                    yield use.node
            elif use.node.op_type in ("Cast", "Identity", "Where", "Mul", "Reshape", "Transpose", "Slice", "Expand"):
                for output in use.node.outputs:
                    if output not in seen:
                        seen.add(output)
                        pending.append(output)


def _computed(value: ir.Value | None) -> bool:
    """Whether a value is no weight: neither one itself, nor one by casts and layout alone."""
    while value is not None:
        if value.const_value is not None or value.is_initializer():
            return False
        node = value.producer()
        if node is None or node.op_type not in ("Transpose", "Cast", "Identity", "Reshape", "Unsqueeze"):
            return True
        value = node.inputs[0]
    return False


def read_core(softmax: ir.Node) -> Reading:
    """What the core around a softmax computes.

    Raises:
        Unread: what of it one operation does not compute.
    """
    scores = softmax.inputs[0]
    assert scores is not None
    way = _Way()
    context = _context(softmax.outputs[0], way)
    product = _scores(scores, way)
    (query, key), value = product.inputs, context.inputs[1]
    assert query is not None and key is not None and value is not None
    if way.cut != (way.sink is not None):
        raise Unread("a part of its probabilities is not used")
    (query, q_factor), (key, k_factor) = _factored(query), _factored(key)
    scale = way.factor * q_factor * k_factor * (way.cap or 1.0)
    lifted = [laid_out(v, turned=v is key, heads=v is not query) for v in (query, key, value)]
    if rank(lifted[0] or query) == rank(lifted[2] or value) == rank(lifted[1] or key) == 4:
        query, value = lifted[0] or query, lifted[2] or value
        found = lifted[1] or transposed(key)
    elif rank(query) == rank(key) == rank(value) == 3 and not way.reshaped:
        found = transposed(key)
    else:
        shown = ", ".join(str(rank(v)) for v in (query, key, value))
        raise Unread(f"its operands have {shown} axes, and are not four each by layout alone")
    return Reading(softmax, context, query, key if found is None else found, value, found is None, scale, way.cap,
                   way.terms, way.wide, way.sink)  # fmt: skip


def _context(probabilities: ir.Value, way: _Way) -> ir.Node:
    """The product that weighs values with probabilities, which nothing else reads."""
    current = probabilities
    while True:
        uses = tuple(current.uses())
        if current.is_graph_output() or len(uses) != 1:
            raise Unread("its probabilities are read by more than its product with values")
        node = uses[0].node
        if node.op_type in ("Cast", "Identity") or _leads_same(node, uses[0].idx):
            way.reshaped |= node.op_type == "Reshape"
            current = node.outputs[0]
        elif node.op_type == "Slice" and not way.cut and _without_last(node):
            way.cut, current = True, node.outputs[0]
        elif node.op_type == "MatMul" and uses[0].idx == 0:
            return node
        else:
            raise Unread(f"its probabilities go through {node.op_type}")


def _leads_same(node: ir.Node, index: int) -> bool:
    """Whether a node merges texts and heads into one axis, or parts them, and leaves queries and keys as they are."""
    if node.op_type != "Reshape" or index != 0:
        return False
    ranks = {rank(node.inputs[0]), rank(node.outputs[0])}
    return ranks <= {3, 4}


def _scores(value: ir.Value, way: _Way) -> ir.Node:
    """The product of queries and keys behind a softmax."""
    current: ir.Value = value
    while (node := current.producer()) is not None:
        kind = node.op_type
        if kind == "MatMul":
            if not all(_computed(v) for v in node.inputs):
                raise Unread("its scores are not a product of queries and keys")
            return node
        if _leads_same(node, 0) and node.inputs[0] is not None:
            way.reshaped, current = True, node.inputs[0]
            continue
        if (scores := _shifted(node)) is not None or (scores := _before_sink(node, way)) is not None:
            current = scores
            continue
        if kind not in STEPS:
            raise Unread(f"{kind} stands between its product and its softmax")
        others = [use.node for use in current.uses() if use.node.op_type != "ReduceMax"]
        if len(others) != 1 and current is not value:
            raise Unread("its scores are read by more than its softmax")
        inner = [v for v in node.inputs if v is not None and _leads(v)]
        if kind == "Add" and len(inner) == 2:  # one of the products is a term; the one of plain operands is the core's
            inner = [v for v in inner if v.producer().op_type == "MatMul"][:1] or inner[:1]  # type: ignore[union-attr]
        if len(inner) != 1:
            raise Unread(f"{kind} joins its scores with others")
        _step(node, inner[0], way)
        current = inner[0]
    raise Unread("its scores come from outside of the graph")


def _shifted(node: ir.Node) -> ir.Value | None:
    """Scores of which their own maximum is taken away, which no softmax sees."""
    whole, most = node.inputs[0] if node.op_type == "Sub" else None, node.inputs[-1]
    maker = None if most is None else most.producer()
    if whole is None or maker is None or maker.op_type != "ReduceMax" or maker.inputs[0] is not whole:
        return None
    axes = maker.inputs[1].const_value if len(maker.inputs) > 1 and maker.inputs[1] is not None else None
    return whole if axes is not None and axes.numpy().tolist() in ([-1], [3]) else None


def _before_sink(node: ir.Node, way: _Way) -> ir.Value | None:
    """Scores that a sink is joined to, which is noted down."""
    if node.op_type != "Concat" or len(node.inputs) != 2 or way.sink is not None or way.terms or way.factor != 1.0:
        return None
    scores, sink = node.inputs
    if node.attributes.get_int("axis", 0) not in (-1, 3) or scores is None or sink is None or not _leads(scores):
        return None
    if rank(sink) != 4 or sink.shape is None or sink.shape[3] != 1:
        return None
    way.sink = sink
    return scores


def _without_last(node: ir.Node) -> bool:
    """Whether a cut leaves out the last place of the last axis, and nothing else."""
    numbers = [None if v is None or v.const_value is None else v.const_value.numpy().tolist() for v in node.inputs[1:]]
    return numbers[:3] in ([[0], [-1], [-1]], [[0], [-1], [3]]) and numbers[3:] in ([], [[1]])


def _step(node: ir.Node, inner: ir.Value, way: _Way) -> None:
    """Take one step on the way from a softmax to the product before it."""
    kind, flat = node.op_type, rank(node.outputs[0]) == 3
    others = [v for v in node.inputs if v is not None and v is not inner]
    if kind in ("Add", "Sub", "Where") and way.cap:
        raise Unread("something is added to its scores before they are capped")
    if kind == "Add":
        way.terms.append(Term(others[0], way.factor, flat=flat))
    elif kind == "Sub":
        if node.inputs[0] is not inner:
            raise Unread("its scores are subtracted from something")
        way.terms.append(Term(others[0], -way.factor, flat=flat))
    elif kind in ("Mul", "Div"):
        number = scalar(others[0]) if others else None
        if number is None or (kind == "Div" and node.inputs[0] is not inner) or not number:
            raise Unread("its scores are multiplied by something computed")
        way.factor *= number if kind == "Mul" else 1 / number
    elif kind == "Neg":
        way.factor *= -1
    elif kind == "Tanh":
        if way.cap or way.factor <= 0:
            raise Unread("its scores are capped in another way")
        way.cap, way.factor = way.factor, 1.0
    elif kind == "Where":
        condition, then, _ = node.inputs
        shows = then is inner
        fill = scalar(others[-1]) if condition is not inner else None
        if condition is None or fill is None or fill * way.factor > MASKED:
            raise Unread("a condition puts something into its scores that hides nothing")
        way.terms.append(Term(condition, shows=shows, flat=flat))
    elif kind == "Cast":
        way.wide |= node.outputs[0].dtype == ir.DataType.FLOAT
    elif kind in ("Max", "Clip") and (len(others) != 1 or (low := scalar(others[0])) is None or low > -1e4):
        raise Unread(f"its scores go through {kind}")  # what keeps scores finite that were masked twice may stand there


def _leads(value: ir.Value, limit: int = 40) -> bool:
    """Whether a value is made of a product of two computed things by the steps that may follow it."""
    pending, seen = [value], {value}
    for _ in range(limit):
        if not pending:
            return False
        node = pending.pop().producer()
        if node is None:
            continue
        if node.op_type == "MatMul" and all(_computed(v) for v in node.inputs):
            return True
        if node.op_type in STEPS or node.op_type == "Reshape":  # a sink comes after all of these
            for source in node.inputs:
                if source is not None and source not in seen and source.const_value is None:
                    seen.add(source)
                    pending.append(source)
    return False


def _factored(value: ir.Value) -> tuple[ir.Value, float]:
    """A value without the numbers that it is multiplied by, and their product."""
    factor = 1.0
    while (node := value.producer()) is not None:
        if node.op_type == "Identity" and node.inputs[0] is not None:
            value = node.inputs[0]
            continue
        if node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
            break
        first, second = node.inputs
        if (number := scalar(second)) and first is not None:
            factor *= number if node.op_type == "Mul" else 1 / number
            value = first
        elif node.op_type == "Mul" and (number := scalar(first)) and second is not None:
            factor *= number
            value = second
        else:
            break
    return value, factor
