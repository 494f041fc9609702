"""Panels: marks with a size and ports, set in rows and columns that wires join."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from peltc.compiler.picture.marks import Box, Mark, Point, Ring, Text, wire
from peltc.compiler.picture.style import GAP, LINE, PADDING, RADIUS, TITLE, Words, cells_of, length_of


@dataclass(frozen=True)
class Panel:
    """A finished piece of the picture, with its upper left corner at the origin.

    Attributes:
        inlets: where wires from below enter at the bottom edge.
        outlets: where wires leave at the top edge.
        arrow: whether wires end here, and so with an arrow; otherwise they go on inside.
        wide: wires may enter anywhere, so they come straight up.
        ports: named points for wires that do not follow the column: `split`, `sum`, `memory`.
    """

    width: float
    height: float
    marks: tuple[Mark, ...] = ()
    inlets: tuple[float, ...] = ()
    outlets: tuple[float, ...] = ()
    arrow: bool = False
    wide: bool = False
    ports: tuple[tuple[str, float, float], ...] = ()

    def moved(self, dx: float, dy: float) -> Panel:
        """The same with its contents elsewhere; the size stays."""
        return replace(
            self,
            marks=tuple(mark.moved(dx, dy) for mark in self.marks),
            inlets=tuple(x + dx for x in self.inlets),
            outlets=tuple(x + dx for x in self.outlets),
            ports=tuple((name, x + dx, y + dy) for name, x, y in self.ports),
        )

    def widened(self, width: float) -> Panel:
        """The same in the middle of at least this width."""
        extra = max(width - self.width, 0.0)
        return replace(self.moved(extra / 2, 0.0), width=self.width + extra)

    def port(self, name: str) -> list[Point]:
        """The points of a name."""
        return [(x, y) for found, x, y in self.ports if found == name]


def row(panels: Sequence[Panel], gap: float = 8.0) -> Panel:
    """Panels beside each other, on one base line; the lower ones' outlets are led up to the top."""
    height = max(panel.height for panel in panels)
    left, placed, leads = 0.0, [], []
    for panel in panels:
        moved = panel.moved(left, height - panel.height)
        placed.append(moved)
        if panel.height < height:
            leads += [wire(((x, height - panel.height), (x, 0.0))) for x in moved.outlets]
        left += panel.width + gap
    return Panel(
        left - gap,
        height,
        (*all_marks(placed), *leads),
        tuple(x for panel in placed for x in panel.inlets),
        tuple(x for panel in placed for x in panel.outlets),
        arrow=any(panel.arrow for panel in placed),
        ports=tuple(port for panel in placed for port in panel.ports),
    )


def column(panels: Sequence[Panel], gap: float = GAP) -> Panel:
    """Panels on each other, given from the bottom to the top, in the middle, joined by wires."""
    width = max(panel.width for panel in panels)
    height = sum(panel.height for panel in panels) + gap * (len(panels) - 1)
    top, placed, tops = height, [], []
    for panel in panels:
        top -= panel.height
        tops.append(top)
        placed.append(panel.widened(width).moved(0.0, top))
        top -= gap
    wires = [
        joint
        for position, (lower, upper) in enumerate(itertools.pairwise(placed))
        for joint in _wires(lower, upper, tops[position], tops[position] - gap)
    ]
    return Panel(
        width,
        height,
        (*wires, *all_marks(placed)),
        placed[0].inlets,
        placed[-1].outlets,
        arrow=placed[0].arrow,
        ports=tuple(port for panel in placed for port in panel.ports),
    )


def _wires(lower: Panel, upper: Panel, start: float, end: float) -> list[Mark]:
    """From a panel's outlets to the inlets of the panel above: straight, or over a crossbar half way."""
    middle = (start + end) / 2
    if upper.wide:
        return [wire(((x, start), (x, end)), upper.arrow) for x in lower.outlets]
    wires: list[Mark] = []
    for a, b in itertools.product(lower.outlets, upper.inlets):
        corners: tuple[Point, ...] = () if abs(a - b) < 0.1 else ((a, middle), (b, middle))
        wires.append(wire(((a, start), *corners, (b, end)), upper.arrow))
    return wires


def framed(
    panel: Panel,
    style: str,
    header: Sequence[Words],
    tip: tuple[str, ...] = (),
    bottom: float = 0.0,
    width: float = 0.0,
) -> Panel:
    """A panel in a frame that carries lines of text in its upper left corner, clear of the wire that leaves there."""
    top = LINE * len(header) + 7
    half = max(length_of(words) for words in header) + RADIUS
    inner = panel.widened(max(width - 2 * PADDING, 2 * half)).moved(PADDING, top)
    width, height = inner.width + 2 * PADDING, top + panel.height + bottom
    frame = Box(0.0, 0.0, width, height, style, tip)
    texts = [Text(PADDING, 4.0 + LINE * (i + 0.5), tuple(words), "start") for i, words in enumerate(header)]
    out = [wire(((x, top), (x, 0.0))) for x in inner.outlets]
    into = [wire(((x, height), (x, height - bottom)), panel.arrow) for x in inner.inlets if bottom]
    return Panel(width, height, (frame, *texts, *out, *into, *inner.marks), inner.inlets, inner.outlets,
                 ports=inner.ports)  # fmt: skip


def point(port: str = "") -> Panel:
    """A point of the stream, with no extent."""
    return Panel(0.0, 0.0, (), (0.0,), (0.0,), ports=((port, 0.0, 0.0),) if port else ())


def ring(product: bool = False) -> Panel:
    """A residual sum, or the product of gate and up."""
    middle = RADIUS
    mark = Ring(middle, middle, product)
    ports = () if product else (("sum", middle, middle),)
    return Panel(2 * middle, 2 * middle, (mark,), (middle,), (middle,), arrow=not product, ports=ports)


def labelled(
    lines: Sequence[Words], style: str, tip: tuple[str, ...] = (), width: float = 0.0, height: float = 0.0
) -> Panel:
    """A box with centred lines of text."""
    width = max([width, *(length_of(words) + 14 for words in lines)])
    height = max(height, LINE * len(lines) + 8)
    top = (height - LINE * len(lines)) / 2
    texts = [Text(width / 2, top + LINE * (i + 0.5), tuple(words)) for i, words in enumerate(lines)]
    radius = height / 2 if style.startswith("norm") else 3.0
    box = Box(0.0, 0.0, width, height, style, tip, radius)
    return Panel(width, height, (box, *texts), (width / 2,), (width / 2,), arrow=True)


def labelled_text(text: str, style: str) -> Panel:
    """A line of text without a box."""
    width = TITLE * cells_of(text)
    return Panel(width, LINE + 3, (Text(width / 2, LINE / 2 + 1, ((style, text),)),), (), (width / 2,))


def all_marks(panels: Iterable[Panel]) -> tuple[Mark, ...]:
    return tuple(mark for panel in panels for mark in panel.marks)
