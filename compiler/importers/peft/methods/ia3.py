"""(IA)³ as Hugging Face PEFT stores it: one vector for each module, which scales what a feed-forward module reads and
what any other writes, its bias included."""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import COMMON, NAMES, TARGETS, Array, Config, Entry, Format, own_rows
from peltc.compiler.importers.peft.targets import means
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The side of the map that is scaled."""
    inside = means(config.get("feedforward_modules"), module)
    return Entry("ia3", (("position", "input"),) if inside else ())


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """l [O] from [O, 1], or l [I] from [1, I]; of a fused map, a site's own rows of the former."""
    vector = tensors["l"]
    return {"l": vector.reshape(-1) if vector.shape[:1] == (1,) else own_rows(vector.reshape(-1), site)}


IA3 = Format(
    kind="IA3",
    tensors={"ia3_l": "l"},
    read={**TARGETS, "feedforward_modules": NAMES},
    inert=COMMON | {"fan_in_fan_out", "init_ia3_weights"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
)
