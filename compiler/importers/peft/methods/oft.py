"""OFT as Hugging Face PEFT stores it: block-diagonal rotations of the input, by the upper triangles of skew-symmetric
blocks."""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import BIASES, COMMON, NUMBER, SWITCH, TARGETS, Array, Config, Entry, Format
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The size of the blocks, and which form the rotation has."""
    neumann = config.get("use_cayley_neumann", True)
    return Entry("oft", (("block", config.get("oft_block_size", 32)), *(() if neumann else (("neumann", False),))))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """The triangles [I / b, b (b - 1) / 2], which all rows of a fused map share."""
    return dict(tensors)


BY_RANK = "blocks are given by their size here; the adapter has it in the shape of its tensors"
OFT = Format(
    kind="OFT",
    tensors={"oft_R.weight": "R"},
    read={
        **TARGETS,
        "oft_block_size": {"type": "integer", "minimum": 2},
        "use_cayley_neumann": SWITCH,
        "eps": NUMBER,
        "bias": BIASES,
    },
    inert=COMMON | {"module_dropout", "fan_in_fan_out", "init_weights"},
    refused={"block_share": "one block for all is not known here", "coft": "its constraint is not known here"},
    only={
        "r": ((0, None), BY_RANK),
        "num_cayley_neumann_terms": ((5,), "the series has five terms here"),
    },
    entry=entry,
    parameters=parameters,
)
