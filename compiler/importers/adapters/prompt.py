"""Prompt tuning as the `adapters` library stores it: tokens that join what leaves the embedding, without a position."""

from __future__ import annotations

from collections.abc import Sequence

from peltc.compiler.importers.adapters.formats import COUNT, INERT, Facts, values
from peltc.compiler.importers.adapters.places import Places
from peltc.compiler.importers.formats import Config, Entry
from peltc.compiler.importers.modules import Module
from peltc.spec.diagnostics import Place, fail

TENSORS = {"prompt_embedding.weight": "P"}


def modules(configs: Sequence[Config], places: Places) -> list[Module]:
    """The one module of a folder's prompt.

    Raises:
        PeltError: E432 none, or several; a model without a place for it.
    """
    (config,) = configs  # a union has one at most
    parts = places.folder.of("prompt_tunings")
    sites = [site for site in places.base.anatomy if site.kind == "embedding" and site.role == "embedding"]
    if len(parts) != 1 or not sites:
        raise fail("E432", f"the adapter has {len(parts)} prompts, for {len(sites)} embeddings",
                   Place(str(places.folder.path)), "one prompt, and a model with an embedding")  # fmt: skip
    entry = Entry("prompt", (("length", config.get("prompt_length", 10)),))
    return [Module(sites[0], entry, values(parts[0].tensors, TENSORS, parts[0], places.folder), parts[0].source)]


PROMPT = Facts(
    name="prompt_tuning",
    kinds=("prompt_tunings",),
    read={"prompt_length": COUNT},
    inert=INERT | {"prompt_init", "prompt_init_text", "random_uniform_scale"},
    refused={},
    only={"combine": (("prefix",), "tokens behind the text's first have no place in `prompt`")},
    modules=modules,
)
