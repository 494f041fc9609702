"""LoHa as Hugging Face PEFT stores it.

ΔW = (alpha / r) (w1_a w1_b) ⊙ (w2_a w2_b)
"""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import COMMON, TARGETS, Array, Config, Entry, Format, own_rows, ranked
from peltc.compiler.importers.peft.targets import OVERLAP, rank_and_alpha
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """Rank and alpha at a module."""
    return Entry("loha", tuple(rank_and_alpha(config, module, "alpha").items()))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """Both products' factors [O, r] and [r, I]; of a fused map, a site's own rows of the former."""
    return {name: own_rows(array, site) if name.endswith("_a") else array for name, array in tensors.items()}


LOHA = Format(
    kind="LOHA",
    tensors={f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b")},
    read={**TARGETS, **ranked("alpha")},
    inert=COMMON | {"rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
    quirks=(OVERLAP,),
)  # fmt: skip
