"""`experts:` trains several modules in each other's place, and deploys the average of their weights.

training    y + Wu_k φ(Wd_j x)     j, k drawn anew in each forward pass, independently; by each site, or once for the
                                   sites of a layer
deployment  y + Wū φ(Wd̄ x)        Wd̄ = mean_j Wd_j, Wū = mean_k Wu_k        (AdaMix)
"""

from __future__ import annotations

from dataclasses import replace

from peltc.spec.combinators.combinator import Combinator, Settings, add, formula, groups, number, option, refused
from peltc.spec.diagnostics import Place, nearest
from peltc.spec.formula.functions import SCOPES
from peltc.spec.method import Method


def rewrite(method: Method, settings: Settings, place: Place) -> Method:
    """The method with a stack of experts for each parameter that is trained and not shared."""
    lead = groups(method)
    shared = settings["share"]
    if shared and shared not in lead:
        raise refused("experts", method, f"it has no parameter '{shared}' to share", place, nearest(shared, lead))
    split = [p for p in method.parameters if lead[p.name] != lead.get(shared) and not p.frozen]
    if not split:
        raise refused("experts", method, "nothing is left that the experts do not share", place)
    draws = list(dict.fromkeys(lead[p.name] for p in split))
    stacks = tuple(replace(p, name=f"{p.name}_experts", shape=(number(settings["count"]), *p.shape)) for p in split)
    scope = f", '{settings['draw']}'" * (settings["draw"] != "site")
    let = tuple((p.name, formula(f"choose({p.name}_experts, {draws.index(lead[p.name])}{scope})")) for p in split)
    return add(method, stacks, let, place, frozenset(p.name for p in split))


EXPERTS = Combinator(
    "experts",
    "a mixture of modules, averaged into one",
    "arXiv:2205.12410, section 3; the authors' code: one draw for each map and forward pass",
    (
        option("count", "number of experts", 4, type="integer", minimum=1, maximum=256),
        option("share", "a parameter that all experts share, with its map's bias; empty: none", "", type="string"),
        option("draw", "what draws its own experts in training: each site, or each layer, whose sites then use the same"
               " ones", "site", enum=list(SCOPES)),
    ),
    rewrite,
    notes="Weights are averaged, never outputs and never products: for LoRA the mean of B times the mean of A, which is"
    " what the expectation over independent draws is. A map's weight and bias are drawn together, different"
    " maps of a module apart. `draw` acts in training alone.",
    training=("draw",),
)  # fmt: skip
