"""What a value in a formula has been through, from the input or from parameters to where it stands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any


class Way(Enum):
    """What a value of the running model went through."""

    MAP = "a linear map of the method's own"
    FACTOR = "a factor for each feature, before anything else"
    CURVE = "a non-linear function"
    NORM = "a normalisation"
    ATTENTION = "a product of two such values over their positions"
    TOKENS = "a sum over positions"


class Part(Enum):
    """What a parameter is in a module."""

    MASK = "a choice of elements"
    COEFFICIENT = "what chooses or weighs frozen values"
    BANK = "the frozen values"
    PROTOTYPE = "what a mask leaves some elements of"
    EXPERTS = "a stack of which one is drawn in training"
    NETWORK = "a piece of a network that yields other values"
    KRONECKER = "a factor of a Kronecker product"
    BLOCKS = "the blocks on a diagonal"


NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Flow:
    """A tensor's history; one that reads nothing of the running model is known at compile time.

    Attributes:
        passes: the site's values that it still is, or a sum of them.
        reads: the site's values that something was made of.
        own: the method's parameters in it; those of gates apart.
        went: what the site's values went through.
        parts: what its parameters are, by name.
        gates: what it was multiplied by that depends on the input.
        gate: what it has one value between 0 and 1 for, token or sample, where it can be such a factor itself.
        scaled: whether a factor other than 1 stands before it.
        bent: whether it is known at compile time and went through a non-linear function.
    """

    passes: frozenset[str] = NONE
    reads: frozenset[str] = NONE
    own: frozenset[str] = NONE
    went: frozenset[Way] = frozenset()
    parts: frozenset[tuple[Part, str]] = frozenset()
    gates: frozenset[str] = NONE
    gate: str = ""
    scaled: bool = False
    bent: bool = False

    @property
    def running(self) -> bool:
        return bool(self.passes or self.reads or self.gates)

    def being(self, part: Part) -> Flow:
        """The same, its parameters being something."""
        return replace(self, parts=self.parts | {(part, name) for name in self.own})

    def through(self, *ways: Way, gate: str = "", scaled: bool = False) -> Flow:
        """The same after something was made of it."""
        return replace(self, passes=NONE, reads=self.passes | self.reads, went=self.went | set(ways), gate=gate,
                       scaled=scaled)  # fmt: skip

    def what(self, *parts: Part) -> set[str]:
        """The parameters that are one of these."""
        return {name for part, name in self.parts if part in parts}


def merged(flows: Iterable[Flow]) -> Flow:
    """The history of what tensors come together in."""
    flows = tuple(flows)

    def union(sets: Iterable[frozenset[Any]]) -> frozenset[Any]:
        return frozenset().union(*sets)

    gates = {f.gate for f in flows if f.running}
    return Flow(
        union(f.passes for f in flows),
        union(f.reads for f in flows),
        union(f.own for f in flows),
        union(f.went for f in flows),
        union(f.parts for f in flows),
        union(f.gates for f in flows),
        gates.pop() if len(gates) == 1 else "",
        any(f.scaled for f in flows),
        any(f.bent for f in flows),
    )


def scaled_by(value: Flow, factor: Flow) -> Flow:
    """A value of the running model times what is known at compile time."""
    ways = [Way.FACTOR] if value.passes and not value.reads else []
    own = replace(value, own=value.own | factor.own, parts=value.parts | factor.parts)
    return own.through(*ways, scaled=True)


def flow(value: Any) -> Flow:
    """A value's history; a number has none."""
    return value if isinstance(value, Flow) else Flow()
