"""LoKr as Hugging Face PEFT stores it.

ΔW = (alpha / r) w1 ⊗ w2        each a matrix, or a product of rank r

Which of them are products, and how large they are, follows from the rank, `decompose_both` and `decompose_factor`, and
stands in the shapes of the tensors. The scale is alpha / r even where neither is a product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peltc.compiler.importers.formats import (
    COMMON,
    SWITCH,
    TARGETS,
    Array,
    Config,
    Entry,
    Format,
    Shapes,
    ranked,
    whole_blocks,
)
from peltc.compiler.importers.peft.targets import OVERLAP, rank_and_alpha
from peltc.compiler.importers.quirks import Misread, Quirk
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import fail


def entry(config: Config, module: str) -> Entry:
    """Rank and alpha at a module."""
    return Entry("lokr", tuple(rank_and_alpha(config, module, "alpha").items()))


def measured(shapes: Shapes, site: Site) -> dict[str, Any]:
    """The size of w1, and which of both factors are products; tensors that make no two matrices will be found not to
    fit."""
    rows, columns = shapes.get("w1_a", shapes.get("w1", ())), shapes.get("w1_b", shapes.get("w1", ()))
    large = shapes.get("w2_a", shapes.get("w2", ()))
    if not rows or not columns or not large or 0 in (rows[0], columns[-1], large[0]):
        return {}
    options = {"factor": len(rows_of_small(site, large[0])), "factor_in": columns[-1]}
    return options | {name: True for name, key in (("full", "w2"), ("decompose_both", "w1_a")) if key in shapes}


def rows_of_small(site: Site, size: int) -> list[int]:
    """Which rows of w1 make a site's own features.

    Args:
        size: how many features one row of w1 makes.

    Raises:
        PeltError: E431 a site that is a part of a fused map and owns parts of such blocks.
    """
    found = whole_blocks(site, size)
    if found is None:
        raise fail("E431", f"{site.name} is a part of a fused map, and the Kronecker product over the whole map cuts it"
                   f" into blocks of {size} rows, which it does not own as a whole")  # fmt: skip
    return found


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """w1 [F, G] or its factors [F, r] and [r, G], w2 [O / F, I / G] or its factors; of a fused map, a site's own rows
    of the former."""
    large = tensors.get("w2_a", tensors.get("w2"))
    if site.rows is None or large is None or not large.size:
        return dict(tensors)
    own = rows_of_small(site, len(large))
    return {
        name: array[own] if name in ("w1", "w1_a") and max(own) < len(array) else array
        for name, array in tensors.items()
    }


def scaled(config: Config, module: str, shapes: Shapes) -> bool:
    """Whether a change of which no factor is a product is scaled."""
    said = rank_and_alpha(config, module, "alpha")
    return {"w1", "w2"} <= shapes.keys() and said["alpha"] != said["r"]


def unscaled(config: Config, module: str) -> Config:
    """A config whose scale at a module is 1."""
    return {**config, "alpha": rank_and_alpha(config, module, "alpha")["r"], "alpha_pattern": None}


SCALED = Misread(
    Quirk("scale_of_whole_factors", "w1 ⊗ w2 is scaled by alpha / r where both are whole, and have no rank r",
          "(alpha / r) is left out there",
          "arXiv:2309.14859; the authors' code, LyCORIS, sets alpha to r there"),
    scaled,
    unscaled,
)  # fmt: skip
LOKR = Format(
    kind="LOKR",
    tensors={f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    read={**TARGETS, **ranked("alpha"), "decompose_both": SWITCH, "decompose_factor": {"type": "integer"}},
    inert=COMMON | {"rank_dropout", "rank_dropout_scale", "module_dropout", "init_weights", "use_effective_conv2d"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
    measured=measured,
    quirks=(OVERLAP, SCALED),
)
