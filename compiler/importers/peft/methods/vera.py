"""VeRA as Hugging Face PEFT stores it.

ΔW = diag(b) B diag(d) A        A and B random, and the same for all modules

A and B are as large as the largest module needs; every module reads their first columns and rows. They are in the file
unless `save_projection` is off.
"""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import BIASES, COMMON, RANK, TARGETS, Array, Config, Entry, Format, own_rows
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The rank."""
    return Entry("vera", (("r", config.get("r", 256)),))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """d [r] and b [O], A [r, most I] and B [most O, r]; of a fused map, a site's own rows of b and B."""
    return {name: own_rows(array, site) if name in ("B", "b_scale") else array for name, array in tensors.items()}


OUTSIDE = (
    "its random matrices are not in the file; load it where it was trained, and save it again with"
    " `save_projection=True`"
)
VERA = Format(
    kind="VERA",
    tensors={"vera_lambda_d": "d", "vera_lambda_b": "b_scale"},
    shared={"vera_A": "A", "vera_B": "B"},
    read={**TARGETS, "bias": BIASES, "r": RANK},
    inert=COMMON | {"projection_prng_key", "vera_dropout", "d_initial", "fan_in_fan_out", "init_weights"},
    refused={},
    only={
        "save_projection": ((True,), OUTSIDE),
    },
    entry=entry,
    parameters=parameters,
)
