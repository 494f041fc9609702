"""C³A as Hugging Face PEFT stores it: a kernel for each circulant block of the change, which is divided by the number
of inputs."""

from __future__ import annotations

from collections.abc import Mapping

from peltc.compiler.importers.formats import (
    BIASES,
    COMMON,
    RANK,
    TARGETS,
    Array,
    Config,
    Entry,
    Format,
    own_groups,
    patterns_of,
)
from peltc.compiler.importers.peft.targets import dotted
from peltc.compiler.survey.anatomy import Site


def entry(config: Config, module: str) -> Entry:
    """The size of a module's blocks."""
    return Entry("c3a", (("block", dotted(config.get("block_size_pattern"), module, config.get("block_size", 256))),))


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """The kernels [O / b, I / b, b]; of a fused map, those of a site's own blocks of rows."""
    kernel = tensors["kernel"]
    return {"kernel": own_groups(kernel, site, kernel.shape[-1])}


C3A = Format(
    kind="C3A",
    tensors={"c3a_kernel": "kernel"},
    read={**TARGETS, "bias": BIASES, "block_size": RANK, "block_size_pattern": patterns_of(RANK)},
    inert=COMMON | {"init_weights"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
)
