"""BOFT as Hugging Face PEFT stores it.

W' = s ⊙ W Rᵀ        R a product of block-diagonal rotations, whose blocks' halves are permuted

How large the blocks are and how many factors there are stands in the shape of the tensors: PEFT takes one factor,
whatever the config says, where it cannot compile its own kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peltc.compiler.importers.formats import BIASES, COMMON, TARGETS, Array, Config, Entry, Format, Shapes, own_rows
from peltc.compiler.importers.quirks import Misread, Quirk
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The method; its options are in the tensors' shapes."""
    return Entry("boft")


def measured(shapes: Shapes, site: Site) -> dict[str, Any]:
    """The size of the blocks and the number of factors, of R [M, K, b, b]."""
    found = shapes.get("R", ())
    return {"block": found[3], "factors": found[0]} if len(found) == 4 and 0 not in found else {}


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """R, which all rows of a fused map share, and s [O, 1], of which a site has its own rows."""
    return {name: own_rows(array, site) if name == "s" else array for name, array in tensors.items()}


def fewer(config: Config, module: str, shapes: Shapes) -> bool:
    """Whether there are fewer factors than the config says."""
    found = shapes.get("R", ())
    return len(found) == 4 and found[0] < config.get("boft_n_butterfly_factor", 1)


FEWER = Misread(
    Quirk("one_factor", "one factor is trained, whatever `boft_n_butterfly_factor` says, where PEFT cannot compile its"
          " own kernel", "", "the others were never there"),
    fewer,
)  # fmt: skip
SIZE = {"type": "integer", "minimum": 0}
BOFT = Format(
    kind="BOFT",
    tensors={"boft_R": "R", "boft_s": "s"},
    read={**TARGETS, "bias": BIASES, "boft_block_size": SIZE, "boft_block_num": SIZE, "boft_n_butterfly_factor": SIZE},
    inert=COMMON | {"boft_dropout", "fan_in_fan_out", "init_weights"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
    measured=measured,
    quirks=(FEWER,),
)
