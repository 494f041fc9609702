"""Feature indices pushed through a graph instead of numbers.

Which outputs of a fused map become queries, which keys? A probe seeds the map's output with the index of each
feature and carries the indices through reshapes, splits, slices, rotations and norms, at small concrete sizes. What
arrives at the attention product says who owns what, in which order.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

SIZES = {"batch": 2, "sequence": 3, "target": 5, "past": 4, "query": 3, "total": 7, "source": 5, "time": 1280}
"""Sizes of the axes that have names. A recording is so long that something is left behind strided convolutions."""
UNKNOWN = -1
MIXING = {"MatMul", "Gemm", "Conv", "Softmax", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2", "Einsum"}
"""Operators after which features are no longer those of the seed."""
KEEPING = {
    "Add", "Sub", "Mul", "Div", "Pow", "Neg", "Abs", "Sign", "Sqrt", "Reciprocal", "Exp", "Log", "Floor", "Ceil",
    "Round", "Mod", "Min", "Max", "Clip", "Where", "Cast", "Identity", "Dropout", "Not", "And", "Or", "Equal", "Less",
    "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN", "Sigmoid", "Tanh", "Relu", "Gelu", "Erf", "Elu", "Celu",
    "Selu", "LeakyRelu", "Softplus", "Softsign", "HardSigmoid", "HardSwish", "Mish", "Swish", "PRelu", "Sin", "Cos",
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "LpNormalization", "Trilu", "CumSum",
    "BatchNormalization", "InstanceNormalization",
}  # fmt: skip
"""Operators after which each feature is where it was."""

ARITHMETIC = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.floor_divide, "Mod": np.mod,
              "Max": np.maximum, "Min": np.minimum, "And": np.logical_and, "Equal": np.equal}  # fmt: skip
"""What a graph computes of shapes."""
STEPS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod}  # fmt: skip
"""What sizes may be computed by."""

Array = np.ndarray[Any, Any]


class Unprobed(Exception):
    """The graph does something here that carries no feature indices."""


class Probe:
    """Carries index arrays from seeded values to where they are asked for."""

    def __init__(self, seeds: Mapping[ir.Value, Array]):
        self.known: dict[ir.Value, Array | None] = dict(seeds)

    def track(self, value: ir.Value) -> Array | None:
        """The indices in a value; None where nothing seeded reaches it.

        Raises:
            Unprobed: an operator on the way cannot carry indices.
        """
        pending = [value]
        while pending:
            current = pending[-1]
            if current in self.known:
                pending.pop()
                continue
            node = current.producer()
            if node is None:
                self.known[current] = None
                pending.pop()
                continue
            waiting = [v for v in node.inputs if v is not None and v not in self.known]
            if waiting:
                pending.extend(waiting)
                continue
            pending.pop()
            inputs = [None if v is None else self.known[v] for v in node.inputs]
            if all(i is None for i in inputs):
                for output in node.outputs:
                    self.known[output] = None
            else:
                for output, array in zip(node.outputs, self._apply(node, inputs), strict=False):
                    self.known[output] = array
        return self.known[value]

    def _apply(self, node: ir.Node, inputs: list[Array | None]) -> list[Array | None]:
        x = inputs[0]
        kind = node.op_type
        if kind in ("Shape", "Size"):
            return [None]
        if kind == "Reshape" and x is not None:
            shape = [int(n) for n in self.integers(node.inputs[1])]
            zero = not node.attributes.get_int("allowzero", 0)
            return [x.reshape([x.shape[i] if n == 0 and zero else n for i, n in enumerate(shape)])]
        if kind == "Transpose" and x is not None:
            return [x.transpose(node.attributes.get_ints("perm", tuple(range(x.ndim))[::-1]))]
        if kind == "Unsqueeze" and x is not None:
            axes = [int(a) for a in self.integers(node.inputs[1])]
            return [np.expand_dims(x, tuple(axes))]
        if kind == "Squeeze" and x is not None:
            return [np.squeeze(x, tuple(int(a) for a in self.integers(node.inputs[1])))]
        if kind == "Expand" and x is not None:
            return [x * np.ones(tuple(int(n) for n in self.integers(node.inputs[1])), np.int64)]
        if kind == "Tile" and x is not None:
            return [np.tile(x, tuple(int(n) for n in self.integers(node.inputs[1])))]
        if kind == "Split" and x is not None:
            axis, count = node.attributes.get_int("axis", 0), len(node.outputs)
            if len(node.inputs) > 1 and node.inputs[1] is not None:
                return list(np.split(x, np.cumsum(self.integers(node.inputs[1]))[:-1], axis))
            return list(np.array_split(x, count, axis))
        if kind == "Slice" and x is not None:
            starts, stops = self.integers(node.inputs[1]), self.integers(node.inputs[2])
            axes = self.integers(node.inputs[3]) if len(node.inputs) > 3 else list(range(len(starts)))
            steps = self.integers(node.inputs[4]) if len(node.inputs) > 4 else [1] * len(starts)
            index: list[Any] = [slice(None)] * x.ndim
            for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
                bound = None if step < 0 and stop < -x.shape[axis] else int(stop)
                index[int(axis)] = slice(int(start), bound, int(step))
            return [x[tuple(index)]]
        if kind == "Gather" and x is not None:
            return [np.take(x, self.integers(node.inputs[1], scalar=True), node.attributes.get_int("axis", 0))]
        if kind == "GatherND" and x is not None and not node.attributes.get_int("batch_dims", 0):
            where = np.asarray(self._integers(node.inputs[1]))
            return [x[tuple(np.moveaxis(where, -1, 0))]]
        if kind == "ScatterND":
            data = np.full(self.shape(node.inputs[0]), UNKNOWN) if x is None else x.copy()
            where = np.asarray(self._integers(node.inputs[1]))
            data[tuple(np.moveaxis(where, -1, 0))] = UNKNOWN if inputs[2] is None else inputs[2]
            return [data]
        if kind == "Concat":
            axis = node.attributes.get_int("axis", 0)
            model = next(i for i in inputs if i is not None)
            parts = []
            for value, array in zip(node.inputs, inputs, strict=True):
                if array is None:
                    shape = list(model.shape)
                    shape[axis] = self.shape(value)[axis]
                    array = np.full(shape, UNKNOWN)
                parts.append(array)
            return [np.concatenate(parts, axis)]
        if kind == "Pad" and x is not None:
            pads = [int(n) for n in self.integers(node.inputs[1])]
            widths = list(zip(pads[: x.ndim], pads[x.ndim :], strict=True))
            if len(pads) != 2 * x.ndim or any(n < 0 for n in pads):
                raise Unprobed("Pad of some axes")
            return [np.pad(x, widths, constant_values=UNKNOWN)]
        if kind in MIXING:
            return [None] * len(node.outputs)
        if kind not in KEEPING:
            raise Unprobed(f"{kind} moves features")
        tracked = [i for i in inputs if i is not None]
        result = tracked[0]
        for other in tracked[1:]:
            try:
                result, other = np.broadcast_arrays(result, other)
            except ValueError as error:
                raise Unprobed(f"{node.op_type}: {error}") from None
            result = np.where(result >= 0, result, other)
        return [result] + [None] * (len(node.outputs) - 1)

    def shape(self, value: ir.Value | None) -> tuple[int, ...]:
        """A value's shape at the probe's sizes."""
        if value is None:
            raise Unprobed("a missing input")
        known = self.known.get(value)
        if known is not None:
            return tuple(known.shape)
        if value.shape is None:
            raise Unprobed(f"'{value.name}' has no shape")
        sizes = []
        for size in value.shape:
            number = size if isinstance(size, int) else computed(str(size.value))
            if number is None:
                raise Unprobed(f"'{value.name}' has the unknown size {size}")
            sizes.append(number)
        return tuple(sizes)

    def integers(self, value: ir.Value | None, scalar: bool = False) -> Any:
        """The content of an integer tensor that the graph computes from shapes."""
        result = self._integers(value)
        return result if scalar else np.atleast_1d(result).tolist()

    def _integers(self, value: ir.Value | None) -> Array:
        if value is None:
            raise Unprobed("a missing input")
        if value.const_value is not None:
            return value.const_value.numpy()
        node = value.producer()
        if node is None:
            raise Unprobed(f"'{value.name}' is not known")
        kind, args = node.op_type, node.inputs
        if kind == "Shape":
            self.track(args[0]) if args[0] is not None else None
            shape = np.array(self.shape(args[0]), np.int64)
            return shape[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(shape))]
        if kind in ("Identity", "Cast"):
            return self._integers(args[0])
        if kind == "Concat":
            return np.concatenate([np.atleast_1d(self._integers(a)) for a in args])
        if kind == "Squeeze":
            return np.squeeze(self._integers(args[0]))
        if kind == "Range":
            start, stop, step = (int(self._integers(a)) for a in args)
            return np.arange(start, stop, step)
        if kind == "Unsqueeze":
            return np.expand_dims(
                self._integers(args[0]), tuple(int(a) for a in np.atleast_1d(self._integers(args[1])))
            )
        if kind == "Reshape":
            return self._integers(args[0]).reshape([int(n) for n in np.atleast_1d(self._integers(args[1]))])
        if kind == "Gather":
            return np.take(self._integers(args[0]), self._integers(args[1]), node.attributes.get_int("axis", 0))
        if kind == "Slice":
            data, first, last = (np.atleast_1d(self._integers(a)) for a in args[:3])
            if len(first) != 1 or (len(args) > 3 and int(np.atleast_1d(self._integers(args[3]))[0])):
                raise Unprobed("Slice of another axis in a shape")
            return np.asarray(data[int(first[0]) : int(last[0])])
        if kind in ("Sign", "Not"):
            return np.asarray((np.sign if kind == "Sign" else np.logical_not)(self._integers(args[0])))
        operation = ARITHMETIC.get(kind)
        if operation is None:
            raise Unprobed(f"{kind} in a shape")
        return np.asarray(operation(self._integers(args[0]), self._integers(args[1])))


def computed(expression: str) -> int | None:
    """The size that an axis' name, or what is computed of names, stands for: `(time//2) + 1`. None where it holds
    anything but names of axes, whole numbers, sums, differences, products and quotients."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return SIZES[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp):
            return STEPS[type(node.op)](value(node.left), value(node.right))
        raise KeyError(node)

    if expression in SIZES:
        return SIZES[expression]
    try:
        return value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, KeyError, ZeroDivisionError, ValueError):
        return None


def ranges(indices: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Sorted indices as ranges [start, stop)."""
    result: list[tuple[int, int]] = []
    for i in indices:
        if result and result[-1][1] == i:
            result[-1] = (result[-1][0], i + 1)
        else:
            result.append((i, i + 1))
    return tuple(result)
