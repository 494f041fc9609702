"""The panels of a layer: its maps, its attention, its sub-layers beside the residual stream."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from peltc.compiler.picture.marks import Box, Text, wire
from peltc.compiler.picture.panels import Panel, column, framed, labelled, point, ring, row
from peltc.compiler.picture.style import (
    GUTTER,
    LINE,
    RADIUS,
    Words,
    labels,
    part_text,
    row_text,
    short_name,
    size_text,
    style_of,
    tooltip,
)
from peltc.compiler.survey.anatomy import Site

ENTRY = ("query", "key", "value", "gate", "up")
EXIT = ("output", "down")
MEMORY = ("key", "value")


def site_panel(site: Site, width: float = 0.0, height: float = 0.0) -> Panel:
    """A site as a box with its role and sizes."""
    name = ("name", short_name(site.role))
    if site.kind == "norm":
        return labelled(
            [[name, ("size", size_text(site)), *labels(site)]], style_of(site), tooltip(site), width, height
        )
    lines: list[Words] = [[name], [("size", size_text(site))]]
    if site.rows is not None:
        lines.append([("size", row_text(site.rows))])
    lines.append(labels(site))
    return labelled([line for line in lines if line and line[0][1]], style_of(site), tooltip(site), width, height)


def fused_panel(sites: Sequence[Site], width: float, height: float) -> Panel:
    """Sites that own rows of one weight, as slices of one box."""
    slices = row([site_panel(site, width, height) for site in sites], 0.0)
    owned = [limits for site in sites for limits in site.rows or ()]
    caption = f"one weight, rows {min(start for start, _ in owned)}:{max(stop for _, stop in owned)}"
    height = slices.height + LINE + 3
    base = Box(0.0, 0.0, slices.width, height, "linear", (sites[0].parameters.get("weight", ""),))
    outline = Box(0.0, 0.0, slices.width, height, "fused")
    text = Text(slices.width / 2, slices.height + LINE / 2 + 1, (("size", caption),))
    return Panel(
        slices.width, height, (base, *slices.marks, outline, text), (slices.width / 2,), slices.outlets, arrow=True
    )


def linear_row(sites: Sequence[Site], width: float = 0.0) -> Panel:
    """Linear maps side by side, as large as each other; those that share a weight as one box."""
    width = max([width, *(site_panel(site).width for site in sites)])
    height = max(site_panel(site).height for site in sites)
    panels = []
    for group in _by_weight(sites):
        if len(group) > 1:
            panels.append(fused_panel(sorted(group, key=lambda s: s.rows or ()), width, height))
        else:
            panels.append(site_panel(group[0], width, height))
    return row(panels)


def _by_weight(sites: Sequence[Site]) -> list[list[Site]]:
    groups: dict[str | int, list[Site]] = {}
    for position, site in enumerate(sites):
        weight = site.parameters.get("weight") if site.rows else None
        groups.setdefault(weight or position, []).append(site)
    return list(groups.values())


def cross_row(sites: Sequence[Site]) -> Panel:
    """Linear maps of a cross-attention: keys and values read the encoder's output, which comes in from the left."""
    memory = [site for site in sites if part_text(site) in MEMORY]
    stream = [site for site in sites if part_text(site) not in MEMORY]
    if not memory or not stream:
        return linear_row(sites)
    width = max(site_panel(site).width for site in sites)
    left = linear_row(memory, width)
    boxes = row([left, linear_row(stream, width)])
    fed, read = boxes.inlets[: len(left.inlets)], boxes.inlets[len(left.inlets) :]
    bar, bottom = boxes.height + 10, boxes.height + 14
    wires = [wire(((0.0, bar), (x, bar), (x, boxes.height)), True) for x in fed]
    wires += [wire(((x, bottom), (x, boxes.height)), True) for x in read]
    return Panel(boxes.width, bottom, (*wires, *boxes.marks), read, boxes.outlets, ports=(("memory", 0.0, bar),))


@dataclass(frozen=True)
class Sublayer:
    """The sites of one block of a layer.

    Attributes:
        name: attention, cross_attention, feed_forward.
        sites: all of them, in the anatomy's order.
    """

    name: str
    sites: tuple[Site, ...]

    @property
    def block(self) -> Site | None:
        """The site that stands for all of it."""
        return next((site for site in self.sites if site.kind == "block"), None)

    def value(self, role: str) -> str:
        """A value of the block's site; empty where it is not known."""
        return self.block.values.get(role, "") if self.block else ""

    def norms(self, *places: str) -> list[Site]:
        """The norms before the block, inside at its end, or after the sum; without places, all of them."""
        return [site for site in self.sites if site.kind == "norm" and (not places or self.place(site) in places)]

    def place(self, norm: Site) -> str:
        """Where a norm stands: what it reads and writes itself tells it better than the block's `norm_x`, which may
        speak of another norm of the block."""
        x, y = norm.values.get("x", self.value("norm_x")), norm.values.get("y", self.value("norm_y"))
        if (x and x == self.value("r")) or (y and y == self.value("x")):
            return "before"
        return "inside" if y and y == self.value("y") else "after"


def sublayers(layer: Sequence[Site]) -> list[list[Sublayer]]:
    """The blocks of a layer, in order; those that read the same residual stream, and so run in parallel, together."""
    named: dict[str, list[Site]] = {}
    for site in layer:
        if site.role != "layer":
            named.setdefault(site.role.split(".", 1)[0], []).append(site)
    groups: list[list[Sublayer]] = []
    for name, sites in named.items():
        found = Sublayer(name, tuple(sites))
        if groups and found.value("r") and found.value("r") == groups[-1][0].value("r"):
            groups[-1].append(found)
        else:
            groups.append([found])
    return groups


def block_panel(sublayer: Sublayer, width: float = 0.0) -> Panel:
    """The inside of a sub-layer, from what its first maps read to what is added to the stream."""
    maps = [site for site in sublayer.sites if site.kind not in ("norm", "block", "attention")]
    last = [site for site in maps if part_text(site) in EXIT]
    first = sorted((site for site in maps if site not in last), key=_entry)
    parts = [point()]
    if first:
        parts.append(cross_row(first) if sublayer.name == "cross_attention" else linear_row(first))
    cores = [site for site in sublayer.sites if site.kind == "attention"]
    parts += [replace(site_panel(site, parts[-1].width), wide=bool(first)) for site in cores]
    if {"gate", "up"} <= {part_text(site) for site in first}:
        parts.append(ring(product=True))
    parts += [site_panel(site) for site in (*last, *sublayer.norms("inside"))]
    if len(parts[-1].outlets) > 1:
        parts.append(point())
    block = sublayer.block
    if block is None:
        return framed(column(parts), "block", [[("size", short_name(sublayer.name))]], width=width)
    header = [("name", short_name(block.role)), *labels(block)]
    return framed(column(parts), style_of(block), [header], tooltip(block), width=width)


def residual_panel(group: Sequence[Sublayer], width: float = 0.0) -> Panel:
    """Sub-layers that are added to the stream together: the bypass, the norms at their places, and the sum."""
    blocks = [block_panel(sublayer, width if len(group) == 1 else 0.0) for sublayer in group]
    before = [[site_panel(norm) for norm in sublayer.norms("before")] for sublayer in group]
    parts = [point("split")]
    if len({sublayer.value("x") for sublayer in group}) == 1:
        parts += itertools.chain(*before)
    else:
        blocks = [column([*norms, block], 12.0) for norms, block in zip(before, blocks, strict=True)]
    parts += [row(blocks, 12.0), ring()]
    parts += [site_panel(norm) for sublayer in group for norm in sublayer.norms("after")]
    inner = column(parts)
    inner = inner.widened(inner.width + 2 * GUTTER)
    (x, start), (_, end) = inner.port("split")[0], inner.port("sum")[0]
    side = inner.width - GUTTER / 2
    bypass = wire(((x, start), (side, start), (side, end), (x + RADIUS, end)), True)
    return replace(inner, marks=(bypass, *inner.marks), ports=tuple(p for p in inner.ports if p[0] == "memory"))


def _entry(site: Site) -> int:
    return ENTRY.index(part_text(site)) if part_text(site) in ENTRY else len(ENTRY)
