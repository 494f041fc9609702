"""The anatomy as a picture: one SVG with the sites, their names and their sizes, as a spec's selectors mean them.

The picture is laid out from the inside out. A `Panel` is a finished piece of it, with its size and the places where
the stream enters at its bottom and leaves at its top; panels are put beside each other (`row`), on each other
(`column`, which also draws the wires between them) and into frames (`framed`). Only the outermost panel becomes XML.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from peltc.compiler.picture.layers import residual_panel, site_panel, sublayers
from peltc.compiler.picture.marks import Box, Group, Mark, Point, Text, as_document, wire
from peltc.compiler.picture.modules import Attached, Carrier
from peltc.compiler.picture.panels import Panel, column, framed, labelled_text, point, row
from peltc.compiler.picture.style import (
    BETWEEN,
    CHARACTER,
    GAP,
    GUTTER,
    LINE,
    LONGEST,
    MARGIN,
    SPACE,
    STYLE,
    TITLE,
    Words,
    cells_of,
    clipped,
    ink_of,
    ink_styles,
    inked,
    labels,
    length_of,
    short_name,
    size_text,
    tooltip,
)
from peltc.compiler.survey.anatomy import Anatomy, Site
from peltc.spec.stacks import STACKS

DASHED = "dashed: a sub-layer; a module there changes what it adds to the stream"


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
    style = STYLE + ink_styles(len(modules)) if modules else STYLE
    page = _page(carrying, title, modules)
    return as_document(page.width, page.height, page.marks, title or "anatomy", style)


def _carrier(site: Site, modules: Sequence[Attached]) -> Site:
    """The site with those modules that are its own."""
    own = tuple((ink_of(i), module.name) for i, module in enumerate(modules) if site.name in module.sites)
    return Carrier(**vars(site), modules=own) if own else site


def legend(modules: Sequence[Attached], width: float) -> Panel:
    """The modules' names with their colours, one on a line."""
    marks: list[Mark] = []
    widest = 0.0
    for i, module in enumerate(modules):
        about = clipped(module.about, max(int(width / CHARACTER) - cells_of(module.name) - 4, LONGEST))
        words = ((ink_of(i), short_name(module.name)), ("size", about))
        middle = (LINE + 4) * (i + 0.5)
        marks.append(Box(0.0, middle - 4, 10.0, 8.0, f"{ink_of(i)} swatch"))
        marks.append(Text(10.0 + SPACE, middle, words, "start"))
        widest = max(widest, 10.0 + SPACE + length_of(words))
    return Panel(widest, (LINE + 4) * len(modules), tuple(marks))


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
    sites = [(site.role, site.kind, sorted(site.sizes.items()), site.rows, labels(site)) for site in layer]
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
        [("name", "layer"), path, *labels(whole)] if whole else [path],
    ]
    if len(run) > 1 and {path for site in run[1] for path in site.shared} & {site.path for site in first}:
        header.append([("size", "the layers share their weights")])
    groups = sublayers(first)
    width = max((residual_panel(group).width - 2 * GUTTER for group in groups), default=0.0)
    parts = [point(), *(residual_panel(group, width) for group in groups)]
    panel = framed(column(parts, 8.0), inked("layer", whole), header, tooltip(whole) if whole else ())
    return replace(panel, marks=(Group(0.0, 0.0, "run", panel.marks),))


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
    header = [("name", "embedding"), ("size", str(whole.sizes.get("d", ""))), *labels(whole)]
    return framed(column(parts), inked("layer", whole), [header], tooltip(whole), bottom=12.0)


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
    ordered = sorted(names, key=lambda name: STACKS.index(name) if name else -1)
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
    notes = [DASHED] if any(site.kind == "block" for site in anatomy.named) else []
    for site in [site for site in anatomy.named if site.kind == "experts"][:1]:
        notes.append(f"{size_text(site)}: a map for each of {site.sizes['experts']} experts, and a module for each map")
    notes += [] if panels else ["no site has a role"]
    if count := len(anatomy.unnamed):
        notes.append(f"+ {count} linear map{'s' if count > 1 else ''} without a role, selected by parameter")
    parts = [*(labelled_text(note, "note") for note in reversed(notes)), body]
    if modules:
        parts.append(legend(modules, max(body.width, 600.0)))
    if title:
        parts.append(labelled_text(clipped(title, int(max(body.width, 360.0) / TITLE)), "title"))
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
