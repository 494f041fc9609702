"""The onnx interpreter: formulas become graph nodes. What reads no runtime value is computed by numpy first, so only
what depends on the input is emitted, and constant factors end up inside the products they follow."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Array, Emitter, last_size
from peltc.compiler.interpreters.numeric import EPSILON, HIDDEN, PASSING, NumericInterpreter, OneHot, looked_up
from peltc.spec.formula.interpreter import FormulaError, is_static


@dataclass
class Product:
    """x @ matrix + bias, not yet emitted, so that constant factors and summands still go in."""

    x: ir.Value
    matrix: Array
    bias: Array | None = None

    def over(self, features: int) -> Product:
        """The same product, its one output repeated for each of so many features; others have as many already."""
        if self.matrix.shape[1] != 1 or features == 1:
            return self
        wide = np.broadcast_to(self.matrix, (len(self.matrix), features))
        return Product(self.x, wide, None if self.bias is None else np.broadcast_to(self.bias, (features,)))


@dataclass
class Mixture:
    """Σᵢ weightsᵢ bankᵢ, not yet emitted, so that what is known of it still goes into the bank.

    Attributes:
        weights: [N].
        bank: [N, *shape].
        value: what was emitted for it.
    """

    weights: ir.Value
    bank: Array
    value: ir.Value | None = None


RUNTIME = (ir.Value, Product, Mixture)
"""What is not known before the graph runs."""


class OnnxInterpreter(NumericInterpreter):
    """Evaluates formulas over graph values (`ir.Value`), products and mixtures to come, and numpy arrays."""

    def __init__(self, emitter: Emitter):
        self.emitter = emitter

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        values = [v for value in arguments.values() for v in (value if isinstance(value, list) else [value])]
        if any(isinstance(v, OneHot) and v.ids is not None for v in values):
            return self.on_lookup(name, arguments)
        if not any(isinstance(v, RUNTIME) for v in values):
            return super().call(name, arguments)
        rule = getattr(self, f"on_{name}", None)
        if rule is not None:
            return rule(**arguments)
        if name in _UNARY:
            return self.emitter.node(_UNARY[name], [self.value(arguments["x"])])
        raise FormulaError(f"'{name}' has no graph form for a value that depends on the input")

    def value(self, item: Any) -> ir.Value:
        """A graph value, emitting what is still pending."""
        if isinstance(item, ir.Value):
            return item
        emitter = self.emitter
        if isinstance(item, Product):
            result = emitter.node("MatMul", [item.x, emitter.constant(item.matrix, "weight")])
            return result if item.bias is None else emitter.node("Add", [result, emitter.constant(item.bias, "bias")])
        if isinstance(item, Mixture):
            if item.value is None:
                item.value = self.mixed(item)
            return item.value
        return emitter.constant(np.asarray(item, np.float32) if is_static(item) else item)

    def mixed(self, mixture: Mixture) -> ir.Value:
        """A mixture as one product with the whole bank."""
        count, *shape = mixture.bank.shape
        bank = self.emitter.constant(mixture.bank.reshape(count, -1), "bank")
        flat = self.emitter.node("MatMul", [mixture.weights, bank])
        flat.shape = ir.Shape([bank.shape[1]])  # type: ignore[index]
        return self.on_reshape(flat, shape) if len(shape) > 1 else flat

    def expanded(self, item: Any, like: ir.Value) -> ir.Value:
        """A graph value, repeated to the shape of another."""
        found = self.emitter.node("Expand", [self.value(item), self.emitter.node("Shape", [like])])
        found.shape = like.shape
        return found

    # arithmetic

    def binary(self, kind: str, a: Any, b: Any) -> Any:
        return self.emitter.node(kind, [self.value(a), self.value(b)])

    def on_add(self, a: Any, b: Any) -> Any:
        for product, other in ((a, b), (b, a)):
            if isinstance(product, Product) and not isinstance(other, RUNTIME) and np.ndim(other) == 1:
                product = product.over(np.size(other))  # ONNX Runtime fuses product and sum as if they were as wide
            if isinstance(product, Product) and _features(other, product.matrix.shape[1]):
                bias = np.broadcast_to(np.asarray(other, np.float32), product.matrix.shape[1:])
                return Product(product.x, product.matrix, bias if product.bias is None else product.bias + bias)
        for zero, other in ((a, b), (b, a)):
            if not isinstance(zero, RUNTIME) and np.ndim(zero) == 0 and float(zero) == 0:
                return other
        return self.binary("Add", a, b)

    def on_subtract(self, a: Any, b: Any) -> Any:
        return self.binary("Sub", a, b)

    def on_multiply(self, a: Any, b: Any) -> Any:
        for mixture, other in ((a, b), (b, a)):
            if isinstance(mixture, Mixture) and not isinstance(other, RUNTIME) and np.ndim(other) == 0:
                return Mixture(mixture.weights, mixture.bank * np.asarray(other, np.float32))
        for product, other in ((a, b), (b, a)):
            if isinstance(product, Product) and _features(other, product.matrix.shape[1]):
                factor = np.asarray(other, np.float32)
                bias = None if product.bias is None else product.bias * factor
                return Product(product.x, product.matrix * factor, bias)
            if isinstance(product, Product) and isinstance(other, ir.Value) and last_size(other) == 1:
                return self.gated(product, other)
        for one, other in ((a, b), (b, a)):
            if not isinstance(one, RUNTIME) and np.ndim(one) == 0 and float(one) == 1:
                return other
        return self.binary("Mul", a, b)

    def gated(self, product: Product, factor: ir.Value) -> Any:
        """A product times one number per sample or token: g (x M + b) = (g x) M + g b, where x is the narrower side."""
        if product.matrix.shape[0] >= product.matrix.shape[1]:
            return self.binary("Mul", product, factor)
        narrow = Product(self.binary("Mul", product.x, factor), product.matrix)
        if product.bias is None:
            return narrow
        return self.binary("Add", narrow, self.binary("Mul", factor, product.bias))

    def on_divide(self, a: Any, b: Any) -> Any:
        if not isinstance(b, RUNTIME):
            return self.on_multiply(a, 1.0 / np.asarray(b, np.float32))
        return self.binary("Div", a, b)

    def on_power(self, a: Any, b: Any) -> Any:
        return self.binary("Pow", a, b)

    def on_matmul(self, a: Any, b: Any) -> Any:
        if isinstance(b, np.ndarray) and b.ndim == 2:
            return Product(self.value(a), b)
        return self.binary("MatMul", a, b)

    def on_linear(self, x: Any, weight: Any, bias: Any) -> Any:
        product: Any
        if isinstance(weight, np.ndarray):
            product = Product(self.value(x), weight.T)
        else:
            product = self.emitter.node("MatMul", [self.value(x), self.value(self.on_transpose(weight))])
        return product if bias is None else self.on_add(product, bias)

    def on_einsum(self, operands: list[Any], equation: str) -> Any:
        if found := _mixture(operands, equation):
            return found
        return self.emitter.node("Einsum", [self.value(o) for o in operands], {"equation": equation})

    def on_lookup(self, name: str, arguments: dict[str, Any]) -> Any:
        """Ids pick rows of a matrix: x Wᵀ of one-hot vectors."""
        if name in PASSING:
            return arguments["x"]
        arguments = {key: self.value(v) if isinstance(v, Mixture) else v for key, v in arguments.items()}
        graph = {key: v for key, v in arguments.items() if isinstance(v, ir.Value)}
        if name == "linear" and "weight" in graph:
            turned = self.on_transpose(arguments["weight"])
            name, arguments = "matmul", {"a": arguments["x"], "b": turned, "bias": arguments["bias"]}
        found, bias = looked_up(name, arguments, lambda matrix, ids: self.emitter.node(
            "Gather", [self.value(matrix), ids], {"axis": 0}))  # fmt: skip
        return found if bias is None else self.on_add(found, bias)

    def on_pick(self, x: Any, index: list[int], axis: int) -> Any:
        indices = self.emitter.constant(np.array(index, np.int64), "indices")
        return self.emitter.node("Gather", [self.value(x), indices], {"axis": axis})

    def on_put(self, x: Any, values: Any, index: list[int], axis: int) -> Any:
        value, slices = self.value(x), self.value(values)
        rank = len(slices.shape) if slices.shape is not None else 2
        row = np.array(index, np.int64).reshape([-1 if i == axis % rank else 1 for i in range(rank)])
        shape = self.emitter.node("Shape", [slices])
        places = self.emitter.node("Expand", [self.emitter.constant(row, "indices"), shape])
        found = self.emitter.node("ScatterElements", [value, places, slices], {"axis": axis})
        found.shape = value.shape
        return found

    # elementwise

    def on_identity(self, x: Any) -> Any:
        return x

    on_detach = on_identity

    def on_dropout(self, x: Any, p: Any) -> Any:
        return x

    def on_activation(self, x: Any, name: str) -> Any:
        return self.call(name, {"x": x})

    def on_relu(self, x: Any) -> Any:
        return self.emitter.node("Relu", [self.value(x)])

    def on_gelu(self, x: Any) -> Any:
        return self.emitter.node("Gelu", [self.value(x)], {"approximate": "none"})

    def on_gelu_tanh(self, x: Any) -> Any:
        return self.emitter.node("Gelu", [self.value(x)], {"approximate": "tanh"})

    def on_silu(self, x: Any) -> Any:
        value = self.value(x)
        return self.emitter.node("Mul", [value, self.emitter.node("Sigmoid", [value])])

    def on_softmax(self, x: Any, axis: int) -> Any:
        return self.emitter.node("Softmax", [self.value(x)], {"axis": axis})

    def on_layer_norm(self, x: Any, gain: Any, bias: Any) -> Any:
        width = last_size(value := self.value(x))
        if width is None and gain is None:  # the operator needs a gain as long as the last axis
            centred = self.binary("Sub", value, self.on_mean(value, -1))
            variance = self.on_mean(self.binary("Mul", centred, centred), -1)
            y = self.binary("Div", centred, self.emitter.node("Sqrt", [self.on_add(variance, EPSILON)]))
            return y if bias is None else self.on_add(y, bias)
        given = [np.ones(width or 1, np.float32) if gain is None else gain] + ([] if bias is None else [bias])
        values = [value, *map(self.value, given)]
        return self.emitter.node("LayerNormalization", values, {"axis": -1, "epsilon": EPSILON})

    def on_attend(self, q: Any, k: Any, v: Any, mask: Any, causal: bool) -> Any:
        emitter, query = self.emitter, self.value(q)
        width = last_size(query)
        if width is None:
            extent = emitter.node("Shape", [query], {"start": -1})
            scale = emitter.node("Sqrt", [emitter.node("Cast", [extent], {"to": emitter.dtype.value})])
            query = self.binary("Div", query, scale)
        else:
            query = self.value(self.on_multiply(1 / math.sqrt(width), q))
        scores = self.binary("MatMul", query, self.on_transpose(self.value(k)))
        hidden = emitter.constant(np.float32(HIDDEN))
        if mask is not None:
            shown = emitter.node("Greater", [self.value(mask), emitter.constant(np.float32(0))])
            scores = emitter.node("Where", [emitter.node("Unsqueeze", [shown, emitter.integers([1])]), scores, hidden])
        if causal:
            extent = emitter.node("Shape", [scores], {"start": -2})
            earlier = emitter.node("Trilu", [emitter.node("Expand", [emitter.constant(np.array(True)), extent])],
                                   {"upper": 0})  # fmt: skip
            scores = emitter.node("Where", [earlier, scores, hidden])
        return self.binary("MatMul", self.on_softmax(scores, -1), v)

    # reductions

    def on_mean(self, x: Any, axis: int) -> Any:
        return self.emitter.node("ReduceMean", [self.value(x), self.emitter.integers([axis])], {"keepdims": 1})

    def on_sum(self, x: Any, axis: int) -> Any:
        return self.emitter.node("ReduceSum", [self.value(x), self.emitter.integers([axis])], {"keepdims": 1})

    def on_running_sum(self, x: Any, axis: int) -> Any:
        value = self.value(x)  # ONNX Runtime adds up in float32 only
        wide = self.emitter.node("Cast", [value], {"to": ir.DataType.FLOAT})
        total = self.emitter.node("CumSum", [wide, self.emitter.integers([axis])])
        return self.emitter.node("CastLike", [total, value])

    def on_mean_seq(self, x: Any, mask: Any) -> Any:
        if mask is None:
            return self.on_mean(x, 1)
        value = self.value(x)
        rank = len(value.shape) if value.shape is not None else 3
        axes = list(range(2, rank))
        weights = self.emitter.node("Unsqueeze", [self.value(mask), self.emitter.integers(axes)])
        total = self.on_sum(self.binary("Mul", value, weights), 1)
        return self.binary("Div", total, self.on_sum(weights, 1))

    def on_norm2(self, x: Any, axis: int) -> Any:
        return self.emitter.node("ReduceL2", [self.value(x), self.emitter.integers([axis])], {"keepdims": 1})

    def on_upper(self, x: Any) -> Any:
        return self.emitter.node("Trilu", [self.value(x), self.emitter.constant(np.array(1))], {"upper": 1})

    # layout

    def on_transpose(self, x: Any) -> Any:
        if isinstance(x, Mixture):
            return Mixture(x.weights, x.bank.swapaxes(-1, -2))
        value = self.value(x)
        rank = len(value.shape) if value.shape is not None else 2
        axes = [*range(rank - 2), rank - 1, rank - 2]
        found = self.emitter.node("Transpose", [value], {"perm": axes})
        if value.shape is not None:
            found.shape = ir.Shape([value.shape[axis] for axis in axes])
        return found

    def on_reshape(self, x: Any, shape: list[int]) -> Any:
        found = self.emitter.node("Reshape", [self.value(x), self.emitter.integers(shape)])
        found.shape = ir.Shape(shape)
        return found

    def on_permute(self, x: Any, axes: list[int]) -> Any:
        return self.emitter.node("Transpose", [self.value(x)], {"perm": axes})

    def on_concat(self, tensors: list[Any], axis: int) -> Any:
        values = [self.value(t) for t in tensors]
        ranks = [len(v.shape) if v.shape is not None else 0 for v in values]
        model, rank = values[ranks.index(max(ranks))], max(ranks)
        parts = [v if len(v.shape or ()) in (0, rank) else self.repeated(v, model, rank) for v in values]
        return self.emitter.node("Concat", parts, {"axis": axis})

    def repeated(self, value: ir.Value, model: ir.Value, rank: int) -> ir.Value:
        """A value of lower rank, once per leading index of the model value."""
        assert value.shape is not None
        lead = self.emitter.node("Shape", [model], {"start": 0, "end": rank - len(value.shape)})
        if value.const_value is not None:
            own = self.emitter.integers(value.const_value.shape.numpy())
        else:
            own = self.emitter.node("Shape", [value])
        shape = self.emitter.node("Concat", [lead, own], {"axis": 0})
        expanded = self.emitter.node("Expand", [value, shape])
        expanded.shape = ir.Shape([None] * rank)
        return expanded

    def on_slice(self, x: Any, start: int, stop: int, axis: int) -> Any:
        numbers = [self.emitter.integers([n]) for n in (start, stop, axis)]
        return self.emitter.node("Slice", [self.value(x), *numbers])

    def on_take(self, x: Any, index: int, axis: int) -> Any:
        return self.emitter.node("Gather", [self.value(x), self.emitter.constant(np.array(index))], {"axis": axis})

    def on_unsqueeze(self, x: Any, axis: int) -> Any:
        return self.emitter.node("Unsqueeze", [self.value(x), self.emitter.integers([axis])])


def _mixture(operands: list[Any], equation: str) -> Mixture | None:
    """What an equation says of weights [N] and a bank [N, ...] that is known, if it is the weighted sum."""
    found = _WEIGHTED.fullmatch(equation)
    weights, *bank = operands
    if found and len(bank) == 1 and isinstance(weights, ir.Value) and isinstance(bank[0], np.ndarray):
        return Mixture(weights, bank[0])
    return None


_WEIGHTED = re.compile(r"([a-z]),\1([a-z]*)->\2")


def _features(item: Any, size: int) -> bool:
    """Whether an item is a number or a vector over features."""
    return not isinstance(item, RUNTIME) and (np.ndim(item) == 0 or np.shape(item) in ((size,), (1,)))


_UNARY: dict[str, str] = {
    "negate": "Neg", "tanh": "Tanh", "sigmoid": "Sigmoid", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "abs": "Abs",
    "cos": "Cos", "sin": "Sin",
}  # fmt: skip
