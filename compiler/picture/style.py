"""How the picture looks: sizes, colours, and words cut to what a box holds."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence

from peltc.compiler.picture.modules import Carrier
from peltc.compiler.survey.anatomy import Rows, Site

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


def ink_of(position: int) -> str:
    """The class of a module's colour."""
    return f"ink{position % len(INKS)}"


def ink_styles(count: int) -> str:
    """The style sheet of the colours that are used."""

    def sheet(dark: bool) -> str:
        rules = []
        for position, ink in enumerate(INKS[:count]):
            box, name = f".anatomy rect.{ink_of(position)}", f".anatomy tspan.{ink_of(position)}"
            rules.append(f"{box}{{stroke:{ink[dark]};stroke-width:2.2}}\n{box}.swatch{{fill:{ink[dark]}}}\n")
            rules.append(f"{name}{{fill:{ink[dark]};font-weight:bold}}\n")
        return "".join(rules)

    return f"{sheet(False)}@media screen and (prefers-color-scheme:dark){{\n{sheet(True)}}}\n"


def labels(site: Site) -> tuple[tuple[str, str], ...]:
    """The words that name a site's modules."""
    return tuple((ink, short_name(name)) for ink, name in site.modules) if isinstance(site, Carrier) else ()


Words = Sequence[tuple[str, str]]  # style and text


def size_text(site: Site) -> str:
    """The sizes of a site, as its kind has them."""
    sizes = site.sizes
    if site.kind == "attention":
        heads, kv_heads = sizes.get("heads", 0), sizes.get("kv_heads", 0)
        groups = f" / {kv_heads} kv heads" if kv_heads not in (0, heads) else ""
        return f"{heads} heads{groups} × {sizes.get('head_dim', 0)}" if heads else "heads not known"
    if site.kind == "table" or "vocab" in sizes:
        return f"{sizes.get('vocab', sizes.get('in'))} × {sizes.get('d', sizes.get('out', ''))}"
    if "in" in sizes and "out" in sizes:
        several = f"{sizes['experts']} × " if "experts" in sizes else ""
        return f"{several}{sizes['in']} → {sizes['out']}"
    return str(sizes.get("d", ""))


def row_text(rows: Rows) -> str:
    """Row ranges, shortened: models that interleave heads have one for each head."""
    words = [f"{start}:{stop}" for start, stop in rows]
    return "rows " + (", ".join(words) if len(words) < 3 else f"{words[0]}, … {len(words)} ranges")


def tooltip(site: Site) -> tuple[str, ...]:
    """What a viewer shows where it points at a site: its path and parameters, in full."""
    return (site.path, *(f"{role}: {name}" for role, name in site.parameters.items()))


def style_of(site: Site) -> str:
    """The class of a site's box; a kind that the picture does not know is drawn like a block."""
    kind = {"table": "embedding", "experts": "linear"}.get(site.kind, site.kind)
    return inked(kind if kind in ("linear", "norm", "attention", "embedding") else "block", site)


def inked(style: str, site: Site | None) -> str:
    """A class, with that of the colour of the site's first module."""
    return f"{style} {site.modules[0][0]}" if isinstance(site, Carrier) else style


def part_text(site: Site) -> str:
    """The last word of a role: query, down."""
    part: str = site.role.rpartition(".")[2]
    return part


def short_name(role: str) -> str:
    return clipped(role, LONGEST)


def clipped(text: str, cells: int) -> str:
    if cells_of(text) <= cells:
        return text
    widths = itertools.accumulate(cells_of(character) for character in text)
    return text[: sum(width < cells for width in widths)] + "…"


def cells_of(text: str) -> int:
    """How many characters' widths a text takes: ideographs, and what stands for a character not shown, take two."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF" or clean(c) == UNSHOWN) for c in text)


def length_of(words: Words) -> float:
    """How wide a line of text is, about."""
    return sum(CHARACTER * cells_of(word) for _, word in words) + SPACE * (len(words) - 1)


def clean(text: str) -> str:
    """The text without characters that XML forbids or that change how their neighbours are shown."""
    return "".join(UNSHOWN if unicodedata.category(c).startswith("C") else c for c in text)
