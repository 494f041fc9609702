"""Sizes: integers while a model is known, polynomials over named sizes (`r`, `in`, `2*d + P`) while it is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

Monomial = tuple[str, ...]  # ('d', 'r') is d*r; () is the constant term


@dataclass(frozen=True)
class Dim:
    """A polynomial with integer coefficients: `terms` maps a product of names to its coefficient, none of them 0."""

    terms: tuple[tuple[Monomial, int], ...]

    @staticmethod
    def of(value: Size | str) -> Dim:
        """A size from a number or a name."""
        if isinstance(value, Dim):
            return value
        return _dim({(value,): 1} if isinstance(value, str) else {(): int(value)})

    @property
    def constant(self) -> int | None:
        """The number, where it is one."""
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and self.terms[0][0] == () else None

    def __add__(self, other: Size) -> Dim:
        terms = dict(self.terms)
        for monomial, factor in Dim.of(other).terms:
            terms[monomial] = terms.get(monomial, 0) + factor
        return _dim(terms)

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return self * -1

    def __sub__(self, other: Size) -> Dim:
        return self + Dim.of(other) * -1

    def __rsub__(self, other: Size) -> Dim:
        return Dim.of(other) - self

    def __mul__(self, other: Size) -> Dim:
        terms: dict[Monomial, int] = {}
        for a, x in self.terms:
            for b, y in Dim.of(other).terms:
                monomial = tuple(sorted(a + b))
                terms[monomial] = terms.get(monomial, 0) + x * y
        return _dim(terms)

    __rmul__ = __mul__

    def __floordiv__(self, other: Size) -> Dim:
        """The exact quotient by a single term. Names without a common factor are taken to divide (`in // n`)."""
        divisor = Dim.of(other)
        if len(divisor.terms) != 1:
            raise ValueError(f"cannot divide {self} by {divisor}")
        names, factor = divisor.terms[0]
        terms: dict[Monomial, int] = {}
        for monomial, x in self.terms:
            rest = list(monomial)
            missing = [name for name in names if name not in rest or rest.remove(name)]  # type: ignore[func-returns-value]
            if x % factor and self.constant is not None and divisor.constant is not None:
                raise ValueError(f"{self} is not a multiple of {divisor}")
            exact = not missing and x % factor == 0
            key, value = (tuple(sorted(rest)), x // factor) if exact else ((f"({_dim({monomial: x})}//{divisor})",), 1)
            terms[key] = terms.get(key, 0) + value
        return _dim(terms)

    def __rfloordiv__(self, other: Size) -> Dim:
        return Dim.of(other) // self

    def __str__(self) -> str:
        parts = []
        for monomial, factor in self.terms:
            names = "*".join(monomial)
            parts.append(str(factor) if not names else names if factor == 1 else f"{factor}*{names}")
        return " + ".join(parts) or "0"

    __repr__ = __str__


Size = Union[int, Dim]  # noqa: UP007 - used at run time, before Dim exists


def _dim(terms: dict[Monomial, int]) -> Dim:
    return Dim(tuple(sorted((m, f) for m, f in terms.items() if f)))


def simplify(size: Size) -> Size:
    """An `int` where the size is one."""
    if isinstance(size, Dim):
        constant = size.constant
        return size if constant is None else constant
    return size


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every value of their names."""
    return Dim.of(a) == Dim.of(b)


def product(sizes: tuple[Size, ...]) -> Size:
    """The number of elements of a shape."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return simplify(total)


def shape_text(shape: tuple[Size, ...]) -> str:
    """`[B, S, 384]`."""
    return "[" + ", ".join(str(s) for s in shape) + "]"
