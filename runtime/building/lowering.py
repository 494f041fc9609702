"""What would compute the graphs of a plan, before anything is written."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from peltc.compiler.base.base import Base
from peltc.compiler.base.opening import open_base
from peltc.compiler.base.source import find_model, read_config
from peltc.compiler.export.exported import stages
from peltc.compiler.files.talk import Talk
from peltc.compiler.lowering.lower import Lowering
from peltc.compiler.pipeline import lowerings
from peltc.compiler.plan.choice import choice_of
from peltc.compiler.plan.claims import Plan
from peltc.runtime.building.trained import told


def lowering_for(
    plan: Plan,
    base: Base,
    model: str | Path,
    weights: str | Path | None,
    *,
    architecture: str | None,
    text_only: bool,
    talk: Talk,
) -> dict[str, Lowering]:
    """What would compute each attention core of a plan's graphs, by graph; see `lowerings`.

    Args:
        base: the plan's; the others that it takes are opened like it.
        model, weights, architecture, text_only, talk: as for `plan_for`.
    """
    folder = find_model(model)
    choice = choice_of(plan.spec, told(plan.spec, weights), read_config(folder))
    opening = partial(open_base, folder, architecture=architecture, choice=choice, precision=plan.spec.precision,
                      provider=plan.spec.provider, text_only=text_only, talk=talk)  # fmt: skip
    first = opening(variant="embeds") if plan.prepends else base
    graphs = stages(base.config) if plan.spec.generation else ()
    return lowerings(plan, first, {name: opening(variant=name) for name in graphs})
