"""Prefixes as Hugging Face PEFT stores them: keys and values of all layers in one tensor, evaluated when it is saved.

    prompt_embeddings [P, 2 L H Dh]  →  K and V [H, P, Dh] of each layer

They are a cache that the text follows, so that they take positions. In a model with an encoder they stand before the
decoder's text; PEFT then reads the tensor twice over, in steps of four rows, the last two of which it drops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from peltc.compiler.importers.formats import COMMON, Array, Config, Entry, Format
from peltc.compiler.importers.peft.methods.prompt import COUNT, SHARED
from peltc.compiler.importers.quirks import Misread, Quirk, Shapes
from peltc.compiler.survey.anatomy import Anatomy, Site


def sites(config: Config, anatomy: Anatomy) -> Sequence[Site]:
    """The attention of every layer; of the decoder's, where there is one."""
    found = [site for site in anatomy if site.kind == "attention" and site.role == "attention"]
    return [site for site in found if site.stack == "decoder"] or found


def entry(config: Config, module: str) -> Entry:
    """How many tokens a prefix has."""
    return Entry("prefix", (("length", config.get("num_virtual_tokens")), ("reparameterise", False),
                            ("positions", "shifted")))  # fmt: skip


def twofold(config: Config, module: str, shapes: Shapes) -> bool:
    """Whether layers get what is stored for others."""
    return (config.get("num_transformer_submodules") or 1) > 1 and (config.get("num_layers") or 1) > 1


def plain(config: Config, module: str) -> Config:
    """A config by which each layer gets what is stored for it."""
    return {**config, "num_transformer_submodules": 1}


def layered(config: Config, tensors: Mapping[str, Array]) -> Mapping[str, Array]:
    """Keys and values by layer [L, 2, P, H Dh]; none where the tensor cannot be cut into them."""
    flat, layers, parts = tensors["P"], config.get("num_layers"), config.get("num_transformer_submodules") or 1
    if not layers or flat.ndim != 2 or flat.shape[1] % (2 * layers):
        return {}
    rows = flat.reshape(len(flat), 2 * layers, -1).swapaxes(0, 1)
    first = 2 * parts * np.arange(layers) % (2 * layers)
    return {"P": np.stack([rows[first], rows[(first + 1) % (2 * layers)]], 1)}


def parameters(tensors: Mapping[str, Array], site: Site) -> dict[str, Array]:
    """K and V [H, P, Dh] of a layer; none where it has none."""
    found, layer = tensors.get("P"), site.layer or 0
    if found is None or layer >= len(found):
        return {}
    heads, size = site.sizes["kv_heads"], site.sizes["head_dim"]
    if found.shape[3] != heads * size:
        return {"K": found[layer, 0], "V": found[layer, 1]}  # which does not fit, and is said to
    return {name: part.reshape(-1, heads, size).swapaxes(0, 1) for name, part in zip("KV", found[layer], strict=True)}


TWOFOLD = Misread(
    Quirk("prefix_of_another_layer",
          "with an encoder, layer l of L has the keys and values that are stored for layer 2 l modulo L",
          "each layer has its own", "arXiv:2101.00190, eq. 3; the shape that PEFT stores"),
    twofold,
    plain,
)  # fmt: skip
PREFIX = Format(
    kind="PREFIX_TUNING",
    tensors={"prompt_embeddings": "P"},
    read={**SHARED, "num_layers": COUNT},
    inert=COMMON | {"token_dim", "num_attention_heads", "prefix_projection", "encoder_hidden_size", "init_weights"},
    refused={},
    only={},
    entry=entry,
    parameters=parameters,
    sites=sites,
    evaluated=layered,
    quirks=(TWOFOLD,),
)
