"""The anatomy as a picture: one SVG with the sites, their names and their sizes, as a spec's selectors mean them.

The picture is laid out from the inside out. A `Panel` is a finished piece of it, with its size and the places where
the stream enters at its bottom and leaves at its top; panels are put beside each other (`row`), on each other
(`column`, which also draws the wires between them) and into frames (`framed`). Only the outermost panel becomes XML.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from peltc.compiler.survey.anatomy import Anatomy, Rows, Site

CHARACTER = 6.7  # width of one character of a box's text: monospace fonts advance by 0.6 em
TITLE = 8.6  # the same in headings
LONGEST = 40  # characters of a name; the whole of it is in the tooltip
SPACE = 8.0  # between words of different styles
LINE = 13.0
GAP = 16.0
GUTTER = 20.0  # beside a sub-layer, where the bypass runs
PADDING = 10.0  # of a frame
MARGIN = 16.0  # of the page
BETWEEN = 36.0  # stacks, where the encoder's output runs
RADIUS = 7.0
UNSHOWN = "\N{REPLACEMENT CHARACTER}"
ENTRY = ("query", "key", "value", "gate", "up")
EXIT = ("output", "down")
MEMORY = ("key", "value")

STYLE = """
.anatomy .page{fill:#fff}
.anatomy text{font-family:'DejaVu Sans Mono',Menlo,Consolas,'Liberation Mono',monospace;font-size:11px;fill:#4b5563}
.anatomy .name{fill:#111827;font-weight:bold}
.anatomy .count,.anatomy .stack,.anatomy .note{font-family:'DejaVu Sans',Helvetica,Arial,sans-serif}
.anatomy .title{font-size:14px;font-weight:bold;fill:#111827}
.anatomy .count{font-size:12px;font-weight:bold;fill:#111827}
.anatomy .stack{font-size:13px;font-weight:bold;fill:#111827}
.anatomy .linear{fill:#e8eef6;stroke:#64748b}
.anatomy .norm{fill:#f6f0e1;stroke:#8d7c53}
.anatomy .attention{fill:#e7f1ea;stroke:#5f8069}
.anatomy .embedding{fill:#f0eaf4;stroke:#7c6a8a}
.anatomy .fused{fill:none;stroke:#334155;stroke-width:2}
.anatomy .block{fill:#fff;stroke:#9ca3af;stroke-dasharray:4 3}
.anatomy .layer{fill:#f5f6f7;stroke:#6b7280}
.anatomy .wire{fill:none;stroke:#374151;stroke-width:1.2}
.anatomy .tip{fill:#374151}
.anatomy .ring{fill:#fff;stroke:#374151;stroke-width:1.2}
@media screen and (prefers-color-scheme:dark){
.anatomy .page{fill:#14171b}
.anatomy text{fill:#aeb6c1}
.anatomy .name,.anatomy .title,.anatomy .count,.anatomy .stack{fill:#f1f4f8}
.anatomy .linear{fill:#243142;stroke:#7f92ab}
.anatomy .norm{fill:#37301e;stroke:#a8966a}
.anatomy .attention{fill:#21352a;stroke:#7da389}
.anatomy .embedding{fill:#322839;stroke:#9c88ac}
.anatomy .fused{fill:none;stroke:#cbd5e1}
.anatomy .block{fill:#14171b;stroke:#6b7280}
.anatomy .layer{fill:#1d2126;stroke:#8b939e}
.anatomy .wire{stroke:#b6bec9}
.anatomy .tip{fill:#b6bec9}
.anatomy .ring{fill:#14171b;stroke:#b6bec9}
}
"""


INKS = (
    ("#1d5fa8", "#7db4f0"), ("#b8400e", "#f39a6b"), ("#1a7a4c", "#62c796"), ("#8a3a94", "#d592dd"),
    ("#8a6a00", "#dcb84a"), ("#a3244f", "#f08bab"), ("#0f7480", "#5cc4d0"), ("#5b4a9c", "#ac9ff0"),
)  # fmt: skip
"""The colours of modules, on light and on dark; a ninth module has the first one's again."""


@dataclass(frozen=True)
class Attached:
    """Modules of one name in the picture.

    Attributes:
        about: what the legend says of them.
        sites: the names of their sites.
    """

    name: str
    about: str
    sites: frozenset[str]


def draw(anatomy: Anatomy, title: str = "", modules: Sequence[Attached] = ()) -> str:
    """Draw the reference architecture with the sizes of a model.

    Runs of equal layers are drawn once, so that the picture's size follows the model's variety, not its depth.

    Args:
        anatomy: the model's sites.
        title: a heading, as a rule the model's name.
        modules: what to show at its sites, each in a colour of its own, with a legend.

    Returns:
        A standalone SVG document.
    """
    carrying = replace(anatomy, sites=tuple(_carrier(site, modules) for site in anatomy.sites))
    style = STYLE + _inks(len(modules)) if modules else STYLE
    return _document(_page(carrying, title, modules), title or "anatomy", style)


# modules at their sites


@dataclass(frozen=True)
class Carrier(Site):
    """A site with modules: the style and name of each."""

    modules: tuple[tuple[str, str], ...] = ()


def _carrier(site: Site, modules: Sequence[Attached]) -> Site:
    """The site with those modules that are its own."""
    own = tuple((_ink(i), module.name) for i, module in enumerate(modules) if site.name in module.sites)
    return Carrier(**vars(site), modules=own) if own else site


def _ink(position: int) -> str:
    """The class of a module's colour."""
    return f"ink{position % len(INKS)}"


def _inks(count: int) -> str:
    """The style sheet of the colours that are used."""

    def sheet(dark: bool) -> str:
        rules = []
        for position, ink in enumerate(INKS[:count]):
            box, name = f".anatomy rect.{_ink(position)}", f".anatomy tspan.{_ink(position)}"
            rules.append(f"{box}{{stroke:{ink[dark]};stroke-width:2.2}}\n{box}.swatch{{fill:{ink[dark]}}}\n")
            rules.append(f"{name}{{fill:{ink[dark]};font-weight:bold}}\n")
        return "".join(rules)

    return f"{sheet(False)}@media screen and (prefers-color-scheme:dark){{\n{sheet(True)}}}\n"


def _labels(site: Site) -> tuple[tuple[str, str], ...]:
    """The words that name a site's modules."""
    return tuple((ink, _shortened(name)) for ink, name in site.modules) if isinstance(site, Carrier) else ()


def legend(modules: Sequence[Attached], width: float) -> Panel:
    """The modules' names with their colours, one on a line."""
    marks: list[Mark] = []
    widest = 0.0
    for i, module in enumerate(modules):
        about = _clipped(module.about, max(int(width / CHARACTER) - _cells(module.name) - 4, LONGEST))
        words = ((_ink(i), _shortened(module.name)), ("size", about))
        middle = (LINE + 4) * (i + 0.5)
        marks.append(Box(0.0, middle - 4, 10.0, 8.0, f"{_ink(i)} swatch"))
        marks.append(Text(10.0 + SPACE, middle, words, "start"))
        widest = max(widest, 10.0 + SPACE + _length(words))
    return Panel(widest, (LINE + 4) * len(modules), tuple(marks))


# marks: what a picture is made of


Point = tuple[float, float]
Words = Sequence[tuple[str, str]]  # style and text


@dataclass(frozen=True)
class Mark:
    """Something to draw, at a place."""

    x: float
    y: float

    def moved(self, dx: float, dy: float) -> Mark:
        """The same elsewhere."""
        return replace(self, x=self.x + dx, y=self.y + dy)

    def write(self, parent: ET.Element) -> None:
        """Append it to an SVG element."""
        raise NotImplementedError


@dataclass(frozen=True)
class Box(Mark):
    """A rectangle; `tip` appears where a viewer points at it."""

    width: float
    height: float
    style: str
    tip: tuple[str, ...] = ()
    radius: float = 3.0

    def write(self, parent: ET.Element) -> None:
        """As `rect`."""
        place = {"x": self.x, "y": self.y, "width": self.width, "height": self.height, "rx": self.radius}
        rectangle = _child(parent, "rect", {"class": self.style}, place)
        if self.tip:
            _child(rectangle, "title", {}).text = "\n".join(map(_clean, self.tip))


@dataclass(frozen=True)
class Text(Mark):
    """A line of text in words of different styles; `y` is its middle."""

    words: Words
    anchor: str = "middle"

    def write(self, parent: ET.Element) -> None:
        """As `text`, with a `tspan` for each word."""
        line = _child(parent, "text", {"text-anchor": self.anchor}, {"x": self.x, "y": self.y + 4})
        for position, (style, word) in enumerate(self.words):
            _child(line, "tspan", {"class": style}, {"dx": SPACE} if position else None).text = _clean(word)


@dataclass(frozen=True)
class Ring(Mark):
    """Where values meet: a circle around a plus, or around a dot for a product."""

    product: bool = False

    def write(self, parent: ET.Element) -> None:
        """As `circle`, with its sign."""
        _child(parent, "circle", {"class": "ring"}, {"cx": self.x, "cy": self.y, "r": RADIUS})
        if self.product:
            _child(parent, "circle", {"class": "tip"}, {"cx": self.x, "cy": self.y, "r": 2})
            return
        for dx, dy in ((RADIUS, 0.0), (0.0, RADIUS)):
            wire(((self.x - dx, self.y - dy), (self.x + dx, self.y + dy))).write(parent)


@dataclass(frozen=True)
class Wire(Mark):
    """A path of the stream, through corners relative to its place."""

    corners: tuple[Point, ...]
    arrow: bool = False

    def write(self, parent: ET.Element) -> None:
        """As `polyline`."""
        corners = " ".join(f"{_number(self.x + x)},{_number(self.y + y)}" for x, y in self.corners)
        arrow = {"marker-end": "url(#tip)"} if self.arrow else {}
        _child(parent, "polyline", {"class": "wire", "points": corners, **arrow})


@dataclass(frozen=True)
class Group(Mark):
    """Marks that belong together, relative to its place."""

    style: str
    marks: tuple[Mark, ...]

    def write(self, parent: ET.Element) -> None:
        """As `g`."""
        inner = _child(parent, "g", {"class": self.style})
        for mark in self.marks:
            mark.moved(self.x, self.y).write(inner)


def wire(corners: tuple[Point, ...], arrow: bool = False) -> Wire:
    """A wire through points of its panel."""
    return Wire(0.0, 0.0, corners, arrow)


# panels: pieces with places for wires


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
        (*_all_marks(placed), *leads),
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
        (*wires, *_all_marks(placed)),
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
    half = max(_length(words) for words in header) + RADIUS
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
    width = max([width, *(_length(words) + 14 for words in lines)])
    height = max(height, LINE * len(lines) + 8)
    top = (height - LINE * len(lines)) / 2
    texts = [Text(width / 2, top + LINE * (i + 0.5), tuple(words)) for i, words in enumerate(lines)]
    radius = height / 2 if style.startswith("norm") else 3.0
    box = Box(0.0, 0.0, width, height, style, tip, radius)
    return Panel(width, height, (box, *texts), (width / 2,), (width / 2,), arrow=True)


# sites as panels


def site_panel(site: Site, width: float = 0.0, height: float = 0.0) -> Panel:
    """A site as a box with its role and sizes."""
    name = ("name", _shortened(site.role))
    if site.kind == "norm":
        return labelled([[name, ("size", _sizes(site)), *_labels(site)]], _style(site), _about(site), width, height)
    lines: list[Words] = [[name], [("size", _sizes(site))]]
    if site.rows is not None:
        lines.append([("size", _rows(site.rows))])
    lines.append(_labels(site))
    return labelled([line for line in lines if line and line[0][1]], _style(site), _about(site), width, height)


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
    memory = [site for site in sites if _part(site) in MEMORY]
    stream = [site for site in sites if _part(site) not in MEMORY]
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


# sub-layers and layers


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
    last = [site for site in maps if _part(site) in EXIT]
    first = sorted((site for site in maps if site not in last), key=_entry)
    parts = [point()]
    if first:
        parts.append(cross_row(first) if sublayer.name == "cross_attention" else linear_row(first))
    cores = [site for site in sublayer.sites if site.kind == "attention"]
    parts += [replace(site_panel(site, parts[-1].width), wide=bool(first)) for site in cores]
    if {"gate", "up"} <= {_part(site) for site in first}:
        parts.append(ring(product=True))
    parts += [site_panel(site) for site in (*last, *sublayer.norms("inside"))]
    if len(parts[-1].outlets) > 1:
        parts.append(point())
    block = sublayer.block
    if block is None:
        return framed(column(parts), "block", [[("size", _shortened(sublayer.name))]], width=width)
    header = [("name", _shortened(block.role)), *_labels(block)]
    return framed(column(parts), _style(block), [header], _about(block), width=width)


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


Layer = Sequence[Site]


def runs(layers: Iterable[Layer]) -> list[list[Layer]]:
    """Consecutive layers that look the same, together."""
    found: list[list[Layer]] = []
    for layer in layers:
        last = found[-1][-1] if found else None
        if last and layer[0].layer == (last[0].layer or 0) + 1 and _look(layer) == _look(last):
            found[-1].append(layer)
        else:
            found.append([layer])
    return found


def _look(layer: Layer) -> object:
    """What tells layers apart in the picture."""
    sites = [(site.role, site.kind, sorted(site.sizes.items()), site.rows, _labels(site)) for site in layer]
    places = [[(sub.name, [sub.place(norm) for norm in sub.norms()]) for sub in group] for group in sublayers(layer)]
    return sites, places


def run_panel(run: Sequence[Layer]) -> Panel:
    """Equal layers, drawn once."""
    first, last = run[0], run[-1]
    numbers = f"layer {first[0].layer}" if len(run) == 1 else f"layers {first[0].layer}-{last[0].layer}"
    whole = next((site for site in first if site.role == "layer"), None)
    path = ("size", re.sub(r"\d+$", "N", first[0].layer_path) if len(run) > 1 else first[0].layer_path)
    header: list[Words] = [
        [("count", f"× {len(run)}  ({numbers})")],
        [("name", "layer"), path, *_labels(whole)] if whole else [path],
    ]
    if len(run) > 1 and {path for site in run[1] for path in site.shared} & {site.path for site in first}:
        header.append([("size", "the layers share their weights")])
    groups = sublayers(first)
    width = max((residual_panel(group).width - 2 * GUTTER for group in groups), default=0.0)
    parts = [point(), *(residual_panel(group, width) for group in groups)]
    panel = framed(column(parts, 8.0), _inked("layer", whole), header, _about(whole) if whole else ())
    return replace(panel, marks=(Group(0.0, 0.0, "run", panel.marks),))


# stacks and the page


def stack_panel(name: str, sites: Sequence[Site]) -> Panel:
    """A stack from its embedding to what reads its last layer."""
    layers: dict[int, list[Site]] = {}
    for site in sites:
        if site.layer is not None:
            layers.setdefault(site.layer, []).append(site)
    outside = [site for site in sites if site.layer is None]
    bottom = [site for site in outside if site.role.split(".", 1)[0] == "embedding"]
    parts = [labelled_text(name or "model", "stack")]
    if bottom:
        parts.append(embedding_panel(bottom))
    parts += [run_panel(run) for run in runs(layers[number] for number in sorted(layers))]
    parts += [site_panel(site) for site in _upwards([site for site in outside if site not in bottom])]
    return column(parts)


def embedding_panel(sites: Sequence[Site]) -> Panel:
    """The tables of embeddings side by side, and their norm, in the frame of the site that stands for all."""
    whole = next((site for site in sites if site.role == "embedding"), None)
    tables = [site for site in sites if site.kind == "table"]
    apart = [site for site in sites if site.kind != "embedding" or site.path not in {table.path for table in tables}]
    inner = sorted((site for site in apart if site is not whole and site not in tables), key=lambda s: s.kind == "norm")
    parts = [row([site_panel(site) for site in tables])] if tables else []
    parts += [site_panel(site) for site in inner]
    if whole is None or not parts:
        return column([*parts, *([site_panel(whole)] if whole else [])])
    header = [("name", "embedding"), ("size", str(whole.sizes.get("d", ""))), *_labels(whole)]
    return framed(column(parts), _inked("layer", whole), [header], _about(whole), bottom=12.0)


def _upwards(sites: Sequence[Site]) -> list[Site]:
    """The sites after the last layer, each norm before the map that reads it."""
    maps = [site for site in sites if site.kind != "norm"]
    for norm in (site for site in sites if site.kind == "norm"):
        written = norm.values.get("y")
        readers = [i for i, site in enumerate(maps) if written and site.values.get("x") == written]
        first = 0 if norm.role == "final_norm" else max(len(maps) - 1, 0)
        maps.insert(readers[0] if readers else first, norm)
    return maps


def stacks(anatomy: Anatomy) -> dict[str, list[Site]]:
    """The named sites by stack. Sites outside the stacks belong to the first where they embed, else to the last."""
    names = {site.stack for site in anatomy.named if site.layer is not None or site.stack} or {""}
    ordered = sorted(names, key=("encoder", "", "decoder").index)
    found: dict[str, list[Site]] = {name: [] for name in ordered}
    for site in anatomy.named:
        embeds = site.role.split(".", 1)[0] == "embedding"
        home = site.stack if site.stack in found else ordered[0] if embeds else ordered[-1]
        found[home].append(site)
    return {name: sites for name, sites in found.items() if sites}


def _page(anatomy: Anatomy, title: str, modules: Sequence[Attached]) -> Panel:
    """All stacks side by side on a page with margins, the title and the legend above and notes below."""
    panels = {name: stack_panel(name, sites) for name, sites in stacks(anatomy).items()}
    body = _side_by_side(panels)
    notes = [] if panels else ["no site has a role"]
    if count := len(anatomy.unnamed):
        notes.append(f"+ {count} linear map{'s' if count > 1 else ''} without a role, selected by parameter")
    parts = [*(labelled_text(note, "note") for note in reversed(notes)), body]
    if modules:
        parts.append(legend(modules, max(body.width, 480.0)))
    if title:
        parts.append(labelled_text(_clipped(title, int(max(body.width, 360.0) / TITLE)), "title"))
    stacked = column([replace(part, inlets=(), outlets=()) for part in parts], 12.0)
    return replace(stacked.moved(MARGIN, MARGIN), width=stacked.width + 2 * MARGIN, height=stacked.height + 2 * MARGIN)


def _side_by_side(panels: Mapping[str, Panel]) -> Panel:
    """The stacks on one base line, and the encoder's output on its way into the decoder's cross-attentions."""
    height = max((panel.height for panel in panels.values()), default=0.0) + GAP
    left = 0.0
    marks: list[Mark] = []
    source: Point | None = None
    for panel in panels.values():
        left += BETWEEN if left or panel.port("memory") else 0.0
        placed = panel.moved(left, height - panel.height)
        lane = left - BETWEEN / 2
        way: tuple[Point, ...] = ()
        if source:
            way = (source, (source[0], source[1] - GAP / 2), (lane, source[1] - GAP / 2))
        marks += [*placed.marks, *(wire((*way, (lane, y), (x, y))) for x, y in placed.port("memory"))]
        source = (placed.outlets[0], height - panel.height) if placed.outlets else None
        left += panel.width
    if source:
        marks.append(wire((source, (source[0], source[1] - GAP)), True))
    return Panel(left, height, tuple(marks))


# words


def labelled_text(text: str, style: str) -> Panel:
    """A line of text without a box."""
    width = TITLE * _cells(text)
    return Panel(width, LINE + 3, (Text(width / 2, LINE / 2 + 1, ((style, text),)),), (), (width / 2,))


def _sizes(site: Site) -> str:
    """The sizes of a site, as its kind has them."""
    sizes = site.sizes
    if site.kind == "attention":
        heads, kv_heads = sizes.get("heads", 0), sizes.get("kv_heads", 0)
        groups = f" / {kv_heads} kv heads" if kv_heads not in (0, heads) else ""
        return f"{heads} heads{groups} × {sizes.get('head_dim', 0)}" if heads else "heads not known"
    if site.kind == "table" or "vocab" in sizes:
        return f"{sizes.get('vocab', sizes.get('in'))} × {sizes.get('d', sizes.get('out', ''))}"
    if "in" in sizes and "out" in sizes:
        return f"{sizes['in']} → {sizes['out']}"
    return str(sizes.get("d", ""))


def _rows(rows: Rows) -> str:
    """Row ranges, shortened: models that interleave heads have one for each head."""
    words = [f"{start}:{stop}" for start, stop in rows]
    return "rows " + (", ".join(words) if len(words) < 3 else f"{words[0]}, … {len(words)} ranges")


def _about(site: Site) -> tuple[str, ...]:
    """What a viewer shows where it points at a site: its path and parameters, in full."""
    return (site.path, *(f"{role}: {name}" for role, name in site.parameters.items()))


def _style(site: Site) -> str:
    """The class of a site's box; a kind that the picture does not know is drawn like a block."""
    kind = "embedding" if site.kind == "table" else site.kind
    return _inked(kind if kind in ("linear", "norm", "attention", "embedding") else "block", site)


def _inked(style: str, site: Site | None) -> str:
    """A class, with that of the colour of the site's first module."""
    return f"{style} {site.modules[0][0]}" if isinstance(site, Carrier) else style


def _part(site: Site) -> str:
    """The last word of a role: query, down."""
    part: str = site.role.rpartition(".")[2]
    return part


def _entry(site: Site) -> int:
    return ENTRY.index(_part(site)) if _part(site) in ENTRY else len(ENTRY)


def _shortened(role: str) -> str:
    return _clipped(role, LONGEST)


def _clipped(text: str, cells: int) -> str:
    if _cells(text) <= cells:
        return text
    widths = itertools.accumulate(_cells(character) for character in text)
    return text[: sum(width < cells for width in widths)] + "…"


def _cells(text: str) -> int:
    """How many characters' widths a text takes: ideographs, and what stands for a character not shown, take two."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF" or _clean(c) == UNSHOWN) for c in text)


def _length(words: Words) -> float:
    """How wide a line of text is, about."""
    return sum(CHARACTER * _cells(word) for _, word in words) + SPACE * (len(words) - 1)


def _all_marks(panels: Iterable[Panel]) -> tuple[Mark, ...]:
    return tuple(mark for panel in panels for mark in panel.marks)


# XML


def _document(page: Panel, name: str, style: str) -> str:
    """A panel as an SVG document."""
    size = {"width": _number(page.width), "height": _number(page.height)}
    box = f"0 0 {size['width']} {size['height']}"
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "anatomy", "role": "img", **size,
                              "viewBox": box})  # fmt: skip
    _child(root, "title", {}).text = _clean(name)
    _child(root, "style", {}).text = style
    place = {"refX": 6.5, "refY": 3.5, "markerWidth": 7, "markerHeight": 7}
    kind = {"id": "tip", "orient": "auto", "markerUnits": "userSpaceOnUse"}
    marker = _child(_child(root, "defs", {}), "marker", kind, place)
    _child(marker, "path", {"class": "tip", "d": "M0 0.5L7 3.5L0 6.5z"})
    Box(0.0, 0.0, page.width, page.height, "page", radius=0.0).write(root)
    for mark in page.marks:
        mark.write(root)
    text: str = ET.tostring(root, encoding="unicode")
    return text + "\n"


def _child(
    parent: ET.Element, tag: str, attributes: dict[str, str], place: Mapping[str, float] | None = None
) -> ET.Element:
    """Append an element, on a line of its own where that adds no space to a text."""
    element = ET.SubElement(parent, tag, attributes | {key: _number(value) for key, value in (place or {}).items()})
    element.tail = None if tag == "tspan" else "\n"
    return element


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _clean(text: str) -> str:
    """The text without characters that XML forbids or that change how their neighbours are shown."""
    return "".join(UNSHOWN if unicodedata.category(c).startswith("C") else c for c in text)
