"""Sizes: integers while a model is known, polynomials over named sizes (`r`, `in`, `2*d + P`) while it is not.

A division is taken to leave no remainder, since a method that divides sizes asks for sizes that divide: `4 * (in // 4)`
is `in`. Where a model's numbers do not divide, the plan says so.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import Union

Monomial = tuple[tuple[str, int], ...]  # (('d', 2), ('n', -1)) is d*d//n; () is the constant term


@dataclass(frozen=True)
class Dim:
    """A polynomial: `terms` maps a product of names, each with its exponent, to its coefficient, none of them 0."""

    terms: tuple[tuple[Monomial, Fraction], ...]

    @staticmethod
    def of(value: Size | str) -> Dim:
        """A size from a whole number or a name.

        Raises:
            TypeError: the value is neither.
        """
        if isinstance(value, Dim):
            return value
        if isinstance(value, str):
            return _dim({((value, 1),): Fraction(1)})
        return _dim({(): Fraction(operator.index(value))})

    @property
    def constant(self) -> int | None:
        """The number, where it is one."""
        if not self.terms:
            return 0
        monomial, factor = self.terms[0]
        return factor.numerator if len(self.terms) == 1 and monomial == () and factor.denominator == 1 else None

    def __add__(self, other: Size) -> Dim:
        terms = dict(self.terms)
        for monomial, factor in Dim.of(other).terms:
            terms[monomial] = terms.get(monomial, Fraction(0)) + factor
        return _dim(terms)

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return self * -1

    def __sub__(self, other: Size) -> Dim:
        return self + Dim.of(other) * -1

    def __rsub__(self, other: Size) -> Dim:
        return Dim.of(other) - self

    def __mul__(self, other: Size) -> Dim:
        terms: dict[Monomial, Fraction] = {}
        for a, x in self.terms:
            for b, y in Dim.of(other).terms:
                monomial = _times(a, b)
                terms[monomial] = terms.get(monomial, Fraction(0)) + x * y
        return _dim(terms)

    __rmul__ = __mul__

    def __floordiv__(self, other: Size) -> Dim:
        """The quotient by a single term, taken to be exact for names; numbers are rounded down, as everywhere.

        Raises:
            ValueError: the divisor is zero or a sum.
        """
        divisor = Dim.of(other)
        if len(divisor.terms) != 1:
            raise ValueError(f"cannot divide {self} by {divisor}")
        names, factor = divisor.terms[0]
        inverse = _dim({tuple((name, -power) for name, power in names): 1 / factor})
        terms = dict((self * inverse).terms)
        if () in terms:
            terms[()] = Fraction(terms[()].__floor__())
        return _dim(terms)

    def __rfloordiv__(self, other: Size) -> Dim:
        return Dim.of(other) // self

    def __str__(self) -> str:
        parts = []
        for monomial, factor in self.terms:
            above = [name for name, power in monomial for _ in range(power)]
            below = [name for name, power in monomial for _ in range(-power)]
            if factor.numerator != 1 or not above:
                above.insert(0, str(factor.numerator))
            if factor.denominator != 1:
                below.insert(0, str(factor.denominator))
            under = "*".join(below) if len(below) < 2 else f"({'*'.join(below)})"
            parts.append("*".join(above) + (f"//{under}" if under else ""))
        return " + ".join(parts) or "0"

    __repr__ = __str__


Size = Union[int, Dim]  # noqa: UP007 - used at run time, before Dim exists


def _dim(terms: dict[Monomial, Fraction]) -> Dim:
    return Dim(tuple(sorted((m, f) for m, f in terms.items() if f)))


def _times(a: Monomial, b: Monomial) -> Monomial:
    powers = dict(a)
    for name, power in b:
        powers[name] = powers.get(name, 0) + power
    return tuple(sorted((name, power) for name, power in powers.items() if power))


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
