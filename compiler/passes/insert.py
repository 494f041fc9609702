"""Insertion: claims that are not absorbed become nodes beside, before or after the values of their sites.

    linear     y ──────────► y + delta(x, y)         block     y ──► y + delta(x, y, r, norm)
    attention  k ──► concat(more, k)                 mask ──► mask that shows the new positions

Every node carries `pelt.attachment`, `pelt.method` and `pelt.site` in its metadata; taking out what is so marked
gives the base graph back, but for a bias that is added to all experts' results at once and is added to each here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from peltc.compiler.passes.absent import hide
from peltc.compiler.passes.insert_attention import Inserter
from peltc.compiler.passes.insertion import Array
from peltc.compiler.plan.claims import LEVELS, Claim
from peltc.compiler.survey.anatomy import Site


def insert(
    model: ir.Model,
    claims: Iterable[Claim],
    sites: Mapping[str, Site],
    tensors: Mapping[str, Array],
    keeps: bool = False,
    heads: Iterable[Claim] = (),
    exchange: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Array]:
    """Write claims into a graph, in place.

    Args:
        sites: the graph's own sites by key.
        tensors: the adapter's tensors by name.
        keeps: whether what claims make of a whole text is kept from the prompt on; see `keep`.
        heads: claims whose labels a profile may have fewer of; see `absent`.
        exchange: where profiles bring anything, so that the graph itself begins its caches: how many keys before the
            text they bring, by attachment; see `numbers`.

    Returns:
        In a graph with a cache of keys and values, what each cache begins with [1, H, P, Dh], by its input's name: keys
        and values that stand before the text's are there before the first token.
    """
    inserter = Inserter(model, tensors, keeps, exchange)
    groups: dict[str, list[Claim]] = {}
    for claim in claims:  # the plan was made on the graph of token ids, whose values have other names
        groups.setdefault(claim.site.key, []).append(replace(claim, site=sites[claim.site.key]))
    ordered = sorted(groups, key=lambda key: (LEVELS[sites[key].kind], sites[key].role == "layer"))
    for key in ordered:
        getattr(inserter, sites[key].kind)(sites[key], groups[key])
    hide(inserter, (replace(claim, site=sites[claim.site.key]) for claim in heads), tensors)
    inserter.count_text()
    if inserter.keeper is not None:
        inserter.keeper.close()
    model.graph.sort()
    return inserter.starts
