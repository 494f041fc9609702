"""A block: a sub-layer that reads the residual stream and writes to it, with its maps by role."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from peltc.compiler.graphs.flow import Linear, Norm
from peltc.compiler.survey.anatomy import Rows
from peltc.compiler.survey.cores import Core
from peltc.compiler.survey.experts import Stack


@dataclass(frozen=True)
class Experts:
    """One side of the experts' network.

    Attributes:
        weight: the stacked parameter.
        stack: the maps that it is used in; None where the graph computes them in a way that is not known here.
        rows: the features of each map that are this side's own.
    """

    weight: str
    stack: Stack | None
    rows: Rows | None


@dataclass(eq=False)
class Block:
    """A sub-layer: from the residual stream `r` to the sum `s` of which `y` is a term.

    Attributes:
        kind: attention, cross_attention, mixer or feed_forward.
        x, y, r, s: what the maps read, what they write, the stream before, the sum.
        linears: the maps by role, `rows` and `slices` what each owns of a fused one.
        norms: normalisations within, by role.
        experts: stacked maps by role.
        core: the attention core.
        before, inside, after: the normalisation of the stream before the maps, of what they write, of the sum.
        parameters: all parameters within.
    """

    kind: str
    x: ir.Value
    y: ir.Value
    r: ir.Value
    s: ir.Value
    linears: dict[str, Linear] = field(default_factory=dict)
    rows: dict[str, Rows | None] = field(default_factory=dict)
    slices: dict[str, ir.Value] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    experts: dict[str, Experts] = field(default_factory=dict)
    core: Core | None = None
    before: Norm | None = None
    inside: Norm | None = None
    after: Norm | None = None
    parameters: frozenset[str] = frozenset()

    @property
    def out(self) -> ir.Value:
        """The stream after the block."""
        return self.after.y if self.after else self.s

    @property
    def last(self) -> Linear | None:
        """The map whose result is `y`, alone or normalised."""
        return self.linears.get("output") or self.linears.get("down")

    @property
    def first(self) -> Linear | None:
        """The first map that reads `x`."""
        return next((m for m in self.linears.values() if m.x is self.x), None)  # not a map of flattened tokens

    def add(self, role: str, linear: Linear, rows: Rows | None = None, cut: ir.Value | None = None) -> None:
        """Give a map a role."""
        self.linears[role], self.rows[role] = linear, rows
        self.slices[role] = linear.y if cut is None else cut

    def add_experts(self, role: str, weight: str, stack: Stack | None, rows: Rows | None = None) -> None:
        """Give a side of the experts' network a role."""
        self.experts[role] = Experts(weight, stack, rows)
