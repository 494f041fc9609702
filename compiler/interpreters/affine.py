"""The affine interpreter: a value is a map (x, y) ↦ Mx x + My y + c, where x is a site's input and y its output.

A formula that this interpreter can evaluate folds into the site's weight and bias; any other raises `NotAffine`
with the sub-expression. Identities and scalings stay what they are: `x * l` costs a vector, not a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from peltc.compiler.interpreters.numeric import NumericInterpreter, linear
from peltc.spec.formula.interpreter import FormulaError, is_static

Array = np.ndarray[Any, Any]


class NotAffine(FormulaError):
    """An operation that does not keep a map affine."""


@dataclass(frozen=True)
class Map:
    """A linear map y = M x of feature vectors, in the cheapest of three forms.

    Attributes:
        diagonal: a factor per feature [N], or one number.
        matrix: M itself [O, I], laid out as weights are.
        factors: U [O, K] and V [K, I] with M = U V, where that is smaller than M.
    """

    diagonal: Array | None = None
    matrix: Array | None = None
    factors: tuple[Array, Array] | None = None

    def scaled(self, factor: Array) -> Map:
        """Followed by a scaling of each output."""
        if self.diagonal is not None:
            return Map(self.diagonal * factor)
        column = factor[:, None] if factor.ndim else factor
        if self.factors is not None:
            return Map(factors=(self.factors[0] * column, self.factors[1]))
        return Map(matrix=self.dense() * column)

    def ends(self) -> tuple[Array, Array]:
        """The matrices that end in M's outputs [O, ...] and begin with its inputs [..., I]: M twice, or its factors."""
        return self.factors or (self.dense(), self.dense())

    def over(self, features: int) -> Map:
        """The same map, its one output repeated for each of so many features; other maps have as many already."""
        if self.diagonal is not None or len(first := self.ends()[0]) == features:
            return self
        wide = np.broadcast_to(first, (features, first.shape[1]))
        return Map(matrix=wide) if self.factors is None else Map(factors=(wide, self.factors[1]))

    def then(self, weight: Array) -> Map:
        """Followed by a linear map with a weight [N, O]."""
        if self.diagonal is not None:
            return Map(matrix=weight * self.diagonal)
        inner = self.over(weight.shape[1])
        if inner.factors is not None:
            return _product(weight @ inner.factors[0], inner.factors[1])
        return _product(weight, inner.dense())

    def composed(self, outer: Map) -> Map:
        """Followed by another map."""
        if outer.diagonal is not None:
            return self.scaled(outer.diagonal)
        if outer.factors is not None:
            return self.then(outer.factors[1]).then(outer.factors[0])
        return self.then(outer.dense())

    def plus(self, other: Map) -> Map:
        if self.diagonal is not None and other.diagonal is not None:
            return Map(self.diagonal + other.diagonal)
        apart = [m.ends() for m in (self, other) if m.diagonal is None]  # a diagonal is square
        features = apart[0][1].shape[1] if len(apart) == 1 else max(len(first) for first, _ in apart)
        one, two = self.over(features), other.over(features)
        if one.factors is not None and two.factors is not None:
            (u, v), (p, q) = one.factors, two.factors
            return _product(np.concatenate([u, p], 1), np.concatenate([v, q]))
        first, second = (one, two) if one.factors is not None or two.diagonal is not None else (two, one)
        result = first.dense() if first.factors is not None else first.dense().copy()
        if second.diagonal is not None:
            np.einsum("ii->i", result)[...] += second.diagonal
        else:
            result += second.dense()
        return Map(matrix=result)

    def dense(self, features: int = 0) -> Array:
        """M [O, I]; a product of factors is computed anew.

        Args:
            features: I, which a diagonal does not say itself.
        """
        if self.factors is not None:
            return np.asarray(self.factors[0] @ self.factors[1])
        if self.diagonal is not None:
            assert features, "a diagonal has no size of its own"
            return np.diag(np.broadcast_to(self.diagonal, (features,)))
        assert self.matrix is not None
        return self.matrix

    def apply(self, vector: Array) -> Array:
        """M applied to a vector of features."""
        if self.diagonal is not None:
            return np.asarray(vector * self.diagonal)
        if self.factors is not None:
            u, v = self.factors
            return np.asarray(u @ (v @ np.broadcast_to(vector, v.shape[1:])))
        return np.asarray(self.dense() @ np.broadcast_to(vector, self.dense().shape[1:]))


def _product(u: Array, v: Array) -> Map:
    """U V, kept apart where the product is larger than both."""
    return Map(factors=(u, v)) if u.shape[0] * v.shape[1] > u.size + v.size else Map(matrix=u @ v)


@dataclass(frozen=True)
class Affine:
    """Mx x + My y + c: `maps` by source, `offset` c or None."""

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
    summand = _vector(constant, "a summand")
    maps = {source: m.over(summand.size) for source, m in map_.maps.items()} if summand.size > 1 else map_.maps
    return Affine(maps, summand + (0 if map_.offset is None else map_.offset))


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
    moved = x.apply(lambda m: m.then(weight), lambda c: linear(np.broadcast_to(c, weight.shape[1:]), weight, None))
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
