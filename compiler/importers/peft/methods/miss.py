"""MiSS as Hugging Face PEFT stores it: one block for each module, whose mode is that of its start values.

ΔW = [D, D, ...]ᵀ        D [r, O], the last of them cut; with `mini`, D repeats a block of `mini_r` columns
W'ᵢⱼ = Wᵢⱼ + Wᵢⱼ Bᵢ + Bᵢ        with `bat`, for blocks of r by r
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peltc.compiler.importers.formats import (
    BIASES,
    COMMON,
    NUMBER,
    RANK,
    TARGETS,
    Array,
    Config,
    Entry,
    Format,
    Shapes,
    whole_blocks,
)
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import fail


def entry(config: Config, module: str) -> Entry:
    """The method of the mode, the rank, and the columns of the block where they are fewer than the outputs."""
    mode, rank = config.get("init_weights", True), config.get("r", 64)
    if mode == "bat":
        return Entry("bat", (("r", rank),))
    width = (("width", config.get("mini_r", 1)),) if mode == "mini" else ()
    dropout = (("dropout", config["miss_dropout"]),) if config.get("miss_dropout") else ()
    return Entry("miss", (("r", rank), *width, *dropout))


def measured(shapes: Shapes, site: Site) -> dict[str, Any]:
    """No options, where a site can have its own part of the block."""
    own_part(shapes.get("block", ()), site)
    return {}


def own_part(shape: tuple[int, ...], site: Site) -> list[int] | None:
    """Of a block of a fused map, the columns, or the blocks of rows, that a site owns; None for all, which repeat.

    Raises:
        PeltError: E431 a part of a fused map that owns parts of blocks.
    """
    if site.rows is None or len(shape) not in (2, 3) or 0 in shape:
        return None
    if len(shape) == 2 and shape[1] >= max(stop for _, stop in site.rows):
        return [column for start, stop in site.rows for column in range(start, stop)]
    size = shape[1]  # of a block of rows, or after how many outputs the columns repeat
    own = whole_blocks(site, size)
    if own is None:
        raise fail("E431", f"{site.name} is a part of a fused map, and the blocks of {size} rows over the whole map do"
                   " not end where it ends")  # fmt: skip
    return own if len(shape) == 3 and max(own) < shape[0] else None


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """D [r, O] or its first columns, or B [O / r, r, r]; of a fused map, a site's own columns, or blocks of rows."""
    found = tensors.get("block")
    own = None if found is None else own_part(found.shape, site)
    if found is None or own is None:
        return dict(tensors)
    return {"block": found[own] if found.ndim == 3 else found[:, own]}


MISS = Format(
    kind="MISS",
    tensors={"miss_block": "block"},
    read={**TARGETS, "bias": BIASES, "r": RANK, "mini_r": RANK, "miss_dropout": NUMBER,
          "init_weights": {"enum": [True, False, None, "bat", "mini"]}},
    inert=COMMON,
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
    measured=measured,
)  # fmt: skip
