"""The cost interpreter: what a module costs at a site when it stays in the graph.

A value is a shape that also knows whether it exists only while the model runs. An operation on such values costs
floating-point operations per token and a node; what it reads besides was computed at compile time and is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from peltc.spec.formula.dims import Dim
from peltc.spec.formula.interpreter import Deferred
from peltc.spec.formula.syntax import Expr
from peltc.spec.interpreters.check import site_shapes
from peltc.spec.interpreters.shape import Shape
from peltc.spec.interpreters.shapes import ShapeInterpreter


@dataclass(frozen=True)
class Cost:
    """What one module costs.

    Attributes:
        flops: floating-point operations per token; a multiplication and an addition are two.
        stored: values stored beside the base after constant folding.
        nodes: operations in the graph, layout included.
    """

    flops: int = 0
    stored: int = 0
    nodes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.stored + other.stored, self.nodes + other.nodes)

    def bytes(self, width: int = 4) -> int:
        """Bytes stored, at `width` bytes a value."""
        return self.stored * width


@dataclass(frozen=True)
class Given(Shape):
    """A parameter of the base, which costs nothing more."""


@dataclass(frozen=True)
class Product(Shape):
    """What a map with a constant weight gives; a constant factor goes into that weight."""


@dataclass(frozen=True)
class OneHot(Shape):
    """What a table reads: ids, which pick rows of a matrix and multiply nothing."""


FREE = {"identity", "dropout", "detach"}
LAYOUT = {"concat", "slice", "take", "pick", "put", "reshape", "transpose", "permute", "unsqueeze"}


NODES = {"silu": 2, "attend": 5}
"""Functions that are several operations in the graph."""


def _neutral(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a call is a product with 1 or a sum with 0, which leave no node."""
    one = {"multiply": 1, "add": 0}.get(name)
    return one is not None and any(type(v) in (int, float) and v == one for v in arguments.values())


def _absorbs(arguments: Mapping[str, Any]) -> bool:
    """Whether an operand is a product, and the other a constant over its features at most."""
    pairs = ((arguments["a"], arguments["b"]), (arguments["b"], arguments["a"]))
    return any(
        isinstance(p, Product) and (not isinstance(c, Shape) or (not c.running and c.rank <= 1)) for p, c in pairs
    )


class CostInterpreter(ShapeInterpreter):
    """Evaluates formulas over shapes and adds up what they cost."""

    def __init__(self) -> None:
        self.cost = Cost()

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        result = super().call(name, arguments)
        operands = [v for value in arguments.values() for v in (value if isinstance(value, list) else [value])]
        running = [v for v in operands if isinstance(v, Shape) and v.running]
        if not running:
            return result
        if name in FREE or _neutral(name, arguments) or (name in ("multiply", "divide") and _absorbs(arguments)):
            return running[0]
        stored = sum(per_token(v.dims) for v in operands if _stored(v))
        nodes = 2 if name == "linear" and arguments["bias"] is not None else NODES.get(name, 1)
        self.cost += Cost(0 if name in LAYOUT else self.flops(name, arguments, running, result), stored, nodes)
        constant = name == "linear" and not arguments["weight"].running
        return Product(result.dims, result.origin, True) if constant else result

    @staticmethod
    def flops(name: str, arguments: Mapping[str, Any], running: list[Shape], result: Shape) -> int:
        """Operations per token of one call."""
        if any(isinstance(v, OneHot) for v in running):
            return per_token(result.dims) if arguments.get("bias") is not None else 0
        if name == "linear":
            bias = per_token(result.dims) if arguments["bias"] is not None else 0
            return 2 * per_token(arguments["weight"].dims) + bias
        if name == "layer_norm":
            return 8 * per_token(result.dims)
        if name == "attend":  # per pair of tokens what is not known here; each token's own share of it
            return 2 * per_token(arguments["q"].dims) + 2 * per_token(arguments["v"].dims)
        if name == "matmul":
            return 2 * per_token(arguments["a"].dims[-1:]) * per_token(result.dims)
        return max(per_token(v.dims) for v in (*running, result))


def _stored(value: Any) -> bool:
    """Whether a value is a tensor that is neither computed at run time nor the base's own."""
    return isinstance(value, Shape) and not isinstance(value, Given) and not value.running and bool(value.dims)


def per_token(dims: tuple[Any, ...]) -> int:
    """The number of elements that a shape has for each token: axes of unknown size (batch, sequence) count once."""
    total = 1
    for size in dims:
        number = size.constant if isinstance(size, Dim) else size
        total *= 1 if number is None else number
    return total


def cost_of(
    kind: str,
    sizes: Mapping[str, Any],
    width: int,
    effects: Mapping[str, Expr],
    let: tuple[tuple[str, Expr], ...],
    constants: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
) -> Cost:
    """The cost of definitions at a site, nothing absorbed.

    Args:
        kind: the kind of site; `sizes` its sizes.
        width: the model's, which is that of a layer's input.
        effects, let: formulas by name.
        constants: options and sizes.
        tensors: shapes of the method's parameters there.

    Raises:
        EvaluationError: a formula does not fit the site.
    """
    interpreter = CostInterpreter()
    values, expected = site_shapes(kind, sizes, width=width)
    values = {n: v if v.running else Given(v.dims, v.origin) for n, v in values.items()}
    if kind == "table":
        values["x"] = OneHot(values["x"].dims, values["x"].origin, True)
    scope: dict[str, Any] = {
        **values,
        **{n: Shape(s) for n, s in tensors.items()},
        **constants,
        "norm": _norm(interpreter),
    }
    for name, expr in let:
        scope[name] = Deferred(partial(interpreter.evaluate, expr, scope))
    for name, expr in effects.items():
        result = interpreter.evaluate(expr, scope)
        shape = result if isinstance(result, Shape) else Shape(())
        if name == "delta":
            interpreter.cost += Cost(per_token(expected[name].dims), 0, 1)
        if name in ("keys", "values"):  # each query meets the added positions
            more = per_token((Dim.of(shape.dims[-2]) - Dim.of("T"),))
            interpreter.cost += Cost(2 * sizes["heads"] * sizes["head_dim"] * more, 0, 0)
        if _stored(shape):
            interpreter.cost += Cost(0, per_token(shape.dims), 0)
    return interpreter.cost


def _norm(interpreter: CostInterpreter) -> Any:
    def norm(z: Shape) -> Shape:
        interpreter.cost += Cost(8 * per_token(z.dims), 0, 1)
        return z

    return norm
