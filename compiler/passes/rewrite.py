"""All that puts the modules of a plan into a graph, in order: insert, what stands before the text, stack."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from peltc.compiler.base.base import Base
from peltc.compiler.export.exported import DECODE, GRAPHS
from peltc.compiler.passes.absent import heads_of
from peltc.compiler.passes.begin import begin, follow
from peltc.compiler.passes.insert import insert
from peltc.compiler.passes.insertion import Array
from peltc.compiler.passes.prepend import prepend
from peltc.compiler.passes.stack import stack
from peltc.compiler.passes.stand_in import stand_in
from peltc.compiler.passes.uneven import numbers
from peltc.compiler.plan.claims import Plan
from peltc.compiler.survey.anatomy import Site


def rewritten(
    source: Base, plan: Plan, sites: Mapping[str, Site], tensors: Mapping[str, Array], base: Base
) -> tuple[ir.Model, dict[str, Array]]:
    """A base's graph with the claims of a plan that stay; those whose sites the graph does not have are left out.

    Args:
        source: whose graph it is.
        sites: the graph's own sites by key.
        tensors: the adapter's tensors by name.
        base: the base on token ids, whose table embeds the text where tokens are put before it.

    Returns:
        The graph, and what its caches of keys and values begin with; see `insert`.
    """
    model = source.load_graph()
    staying = [claim for claim in plan.claims if not claim.absorbed and claim.site.key in sites]
    generates = source.variant in GRAPHS
    inserted = [claim for claim in staying if "prepend" not in claim.effects]
    exchange = numbers(plan.claims) if plan.exchange else None
    starts = insert(model, inserted, sites, tensors, keeps=bool(plan.held) and source.variant == DECODE,
                    heads=heads_of(plan)[:1], exchange=exchange)  # fmt: skip
    if prepended := [claim for claim in plan.claims if "prepend" in claim.effects]:
        if generates:
            begin(model, source.variant, prepended, tensors, sites, base.config, bool(plan.exchange))
        else:
            prepend(model, prepended, tensors, sites, base)
    if taking := next((claim for claim in staying if claim.takes), None):
        if generates:
            follow(model, taking.takes, taking)
        else:
            stand_in(model, taking, sites, base.config)
    stack(model)
    return model, starts
