"""The affine interpreter: a value is a map (x, y) ↦ x Mx + y My + c, where x is a site's input and y its output.

A formula that this interpreter can evaluate folds into the site's weight and bias; any other raises `NotAffine`
with the sub-expression. Identities and scalings stay what they are: `x * l` costs a vector, not a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from peltc.compiler.numeric import NumericInterpreter, linear
from peltc.spec.formula import FormulaError, is_static

Array = np.ndarray[Any, Any]


class NotAffine(FormulaError):
    """An operation that does not keep a map affine."""


@dataclass(frozen=True)
class Map:
    """A linear map of row vectors: a diagonal (a scalar is one) or a matrix [inputs, outputs]."""

    diagonal: Array | None = None
    matrix: Array | None = None

    def scaled(self, factor: Array) -> Map:
        """Followed by a scaling of each output."""
        if self.matrix is not None:
            return Map(matrix=self.matrix * factor)
        assert self.diagonal is not None
        return Map(self.diagonal * factor)

    def then(self, matrix: Array) -> Map:
        """Followed by a matrix [outputs, new outputs]."""
        if self.matrix is not None:
            return Map(matrix=self.matrix @ matrix)
        assert self.diagonal is not None
        return Map(matrix=self.diagonal[:, None] * matrix if self.diagonal.ndim else self.diagonal * matrix)

    def plus(self, other: Map) -> Map:
        if self.matrix is None and other.matrix is None:
            assert self.diagonal is not None and other.diagonal is not None
            return Map(self.diagonal + other.diagonal)
        if self.matrix is None or other.matrix is None:
            dense = self.matrix if self.matrix is not None else other.matrix
            thin = other.diagonal if self.matrix is not None else self.diagonal
            assert dense is not None and thin is not None
            result = dense.copy()
            np.einsum("ii->i", result)[...] += thin
            return Map(matrix=result)
        return Map(matrix=self.matrix + other.matrix)

    def behind(self, matrix: Array) -> Array:
        """The matrix of this map after another one: `matrix @ self`."""
        if self.matrix is not None:
            return np.asarray(matrix @ self.matrix)
        assert self.diagonal is not None
        return np.asarray(matrix * self.diagonal)


@dataclass(frozen=True)
class Affine:
    """x Mx + y My + c: `maps` by source, `offset` c or None."""

    maps: Mapping[str, Map]
    offset: Array | None = None

    @staticmethod
    def identity(source: str) -> Affine:
        """The source itself."""
        return Affine({source: Map(np.array(1.0, np.float32))})

    def apply(self, change: Callable[[Map], Map], offset: Callable[[Array], Array]) -> Affine:
        return Affine(
            {s: change(m) for s, m in self.maps.items()}, None if self.offset is None else offset(self.offset)
        )

    def plus(self, other: Affine) -> Affine:
        maps = dict(self.maps)
        for source, m in other.maps.items():
            maps[source] = maps[source].plus(m) if source in maps else m
        offsets = [o for o in (self.offset, other.offset) if o is not None]
        return Affine(maps, offsets[0] + offsets[1] if len(offsets) == 2 else offsets[0] if offsets else None)


class AffineInterpreter(NumericInterpreter):
    """Evaluates formulas over affine maps; what reads no input is computed by numpy."""

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        values = [v for value in arguments.values() for v in (value if isinstance(value, list) else [value])]
        if not any(isinstance(v, Affine) for v in values):
            return super().call(name, arguments)
        rule = _RULES.get(name)
        if rule is None:
            raise NotAffine(f"'{name}' of the site's input is not affine")
        return rule(**arguments)


def _vector(value: Any, what: str) -> Array:
    """A factor or summand that is the same for every token."""
    if is_static(value):
        return np.asarray(value, np.float32)
    array = np.asarray(value)
    while array.ndim > 1 and array.shape[0] == 1:
        array = array[0]
    if array.ndim > 1:
        raise NotAffine(f"{what} of rank {array.ndim} is not the same for every token")
    return array


def _add(a: Any, b: Any) -> Affine:
    if isinstance(a, Affine) and isinstance(b, Affine):
        return a.plus(b)
    map_, constant = (a, b) if isinstance(a, Affine) else (b, a)
    return Affine(map_.maps, _vector(constant, "a summand") + (0 if map_.offset is None else map_.offset))


def _multiply(a: Any, b: Any) -> Affine:
    if isinstance(a, Affine) and isinstance(b, Affine):
        raise NotAffine("a product of two values that depend on the site's input is not affine")
    map_, constant = (a, b) if isinstance(a, Affine) else (b, a)
    factor = _vector(constant, "a factor")
    return map_.apply(lambda m: m.scaled(factor), lambda c: c * factor)


def _divide(a: Any, b: Any) -> Affine:
    if isinstance(b, Affine):
        raise NotAffine("a division by a value that depends on the site's input is not affine")
    return _multiply(a, 1.0 / _vector(b, "a divisor"))


def _linear(x: Any, weight: Any, bias: Any) -> Affine:
    if isinstance(weight, Affine) or isinstance(bias, Affine) or not isinstance(x, Affine):
        raise NotAffine("a weight that depends on the site's input is not affine")
    moved = x.apply(lambda m: m.then(weight.T), lambda c: linear(np.broadcast_to(c, weight.shape[1:]), weight, None))
    return moved if bias is None else _add(moved, bias)


def _matmul(a: Any, b: Any) -> Affine:
    if isinstance(b, Affine) or b.ndim != 2:
        raise NotAffine("a matrix that depends on the site's input is not affine")
    return _linear(a, b.T, None)


def _same(x: Affine, **ignored: Any) -> Affine:
    return x


def _activation(x: Affine, name: str) -> Affine:
    if name != "identity":
        raise NotAffine(f"'{name}' of the site's input is not affine")
    return x


_RULES: dict[str, Callable[..., Affine]] = {
    "add": _add,
    "subtract": lambda a, b: _add(a, _multiply(b, -1.0) if isinstance(b, Affine) else -_vector(b, "a summand")),
    "multiply": _multiply,
    "divide": _divide,
    "negate": lambda x: _multiply(x, -1.0),
    "linear": _linear,
    "matmul": _matmul,
    "identity": _same,
    "detach": _same,
    "dropout": _same,
    "activation": _activation,
}
