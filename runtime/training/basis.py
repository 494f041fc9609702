"""All basis vectors of a space in place of a site's input, so that a formula tells its matrix.

What a formula makes of the basis vectors, one in each row, is the transpose of its matrix. The vectors are not written
out where a matrix is applied to them, for the result is the matrix itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from peltc.compiler.interpreters.numeric import PASSING
from peltc.runtime.training.interpreter import TorchInterpreter

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Basis:
    """The basis vectors of a space, one in each row.

    Attributes:
        size: how many there are.
        factor: [size] or one number, by which each is multiplied; None for 1.
    """

    size: int
    factor: Tensor | float | None = None

    def through(self, matrix: Tensor) -> Tensor:
        """What a matrix [size, O] makes of each of them [size, O]."""
        if isinstance(self.factor, Tensor) and self.factor.dim():
            return matrix * self.factor.reshape(-1, 1)
        return matrix if self.factor is None else matrix * self.factor

    def scaled(self, factor: Any) -> Basis:
        """Each of them multiplied once more."""
        return Basis(self.size, factor if self.factor is None else self.factor * factor)

    def dense(self, like: Tensor | None) -> Tensor:
        """The vectors themselves."""
        vectors = torch.eye(self.size)
        return self.through(vectors if like is None else vectors.to(like))


class BasisInterpreter(TorchInterpreter):
    """Evaluates formulas over tensors, of which the input may be a basis."""

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        found = {key: value for key, value in arguments.items() if isinstance(value, Basis)}
        if not found:
            return super().call(name, arguments)
        (key, x), *more = found.items()
        if name in PASSING:
            return x
        if name == "linear" and key == "x":
            rows = x.through(arguments["weight"].transpose(-1, -2))
            return rows if arguments["bias"] is None else rows + arguments["bias"]
        if name == "matmul" and key == "a":
            return x.through(arguments["b"])
        if name == "negate":
            return x.scaled(-1.0)
        other: Any = arguments.get("b" if key == "a" else "a")
        if not more and not (isinstance(other, Tensor) and other.dim() > 1):  # the same factor for every vector
            if name == "multiply":
                return x.scaled(other)
            if name == "divide" and key == "a":
                return x.scaled(1.0 / other)
        return super().call(name, {k: v.dense(self.like) if isinstance(v, Basis) else v for k, v in arguments.items()})
