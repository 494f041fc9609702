"""`prototype:` lets all sites share one module, of which each site keeps some elements.

W_l = W ⊙ top_k(|s_l|)        (ProPETL)
"""

from __future__ import annotations

from dataclasses import replace

from peltc.spec.combinators.combinator import Combinator, Settings, add, formula, number, option, refused
from peltc.spec.diagnostics import Place
from peltc.spec.formula.syntax import Call, Expr, Items
from peltc.spec.method import Method


def rewrite(method: Method, settings: Settings, place: Place) -> Method:
    """The method whose matrices are parts of shared ones."""
    matrices = [p for p in method.parameters if len(p.shape) > 1 and p.scope == "site" and not p.frozen]
    if not matrices:
        raise refused("prototype", method, "it has no matrices of its own at each site", place)
    parameters, let = [], []
    for p in matrices:
        count = product(p.shape)
        parameters.append(replace(p, name=f"{p.name}_prototype", scope="model"))
        parameters.append(replace(p, name=f"{p.name}_scores", init=formula("kaiming_uniform"), part="mask"))
        flat = Call("reshape", (formula(f"abs({p.name}_scores)"), Items((count,))))
        dropped = Call("floor", (Call("multiply", (count, number(1 - settings["keep"]))),))
        kept = Call("subtract", (count, dropped), (), f"{settings['keep']:.0%} of {count.text}")
        mask = Call("reshape", (Call("top_k_mask", (flat, kept)), Items(p.shape)))
        text = f"{p.name}_prototype * top_k_mask(abs({p.name}_scores), {settings['keep']:.0%})"
        let.append((p.name, Call("multiply", (formula(f"{p.name}_prototype"), mask), (), text)))
    whole = tuple(p if p in matrices or p.frozen else replace(p, scope="model") for p in method.parameters)
    shared = replace(method, parameters=whole)
    return add(shared, tuple(parameters), tuple(let), place, frozenset(p.name for p in matrices))


def product(shape: tuple[Expr, ...]) -> Expr:
    """The number of elements of a shape."""
    total = shape[0]
    for size in shape[1:]:
        total = Call("multiply", (total, size), (), f"({total.text}) * ({size.text})")
    return total


PROTOTYPE = Combinator(
    "prototype",
    "one shared module, of which each site keeps some elements",
    "arXiv:2305.17682, section 3; the authors' code: the largest absolute scores, straight-through",
    (option("keep", "the share of elements that a site keeps; the authors' code calls it sparsity", 0.5, type="number",
            minimum=1e-6, maximum=1),),
    rewrite,
    notes="All sites share the biases too, which are not masked. Of n elements n - ⌊(1 - keep) n⌋ are kept.",
    excludes={"generate": "both say where the parameters come from"},
)  # fmt: skip
