"""Labels that a profile does not have: a head has room for the most labels, and those that are not a profile's are far
below all others.

    head ─► y [B, L]        becomes        head ─► y + absent [L]        absent: 0 where there is a label, FAR elsewhere

So the largest value, a softmax and a sigmoid are those of the profile's own labels alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from peltc.compiler.files.labels import FAR
from peltc.compiler.interpreters.emitter import Emitter
from peltc.compiler.passes.insertion import Array, Insertion
from peltc.compiler.plan.claims import Claim, Plan
from peltc.spec.modes import EXCHANGED

ABSENT = "pelt.absent"
"""What says it among the tensors by name, and the metadata of its constant in a graph."""


def heads_of(plan: Plan) -> tuple[Claim, ...]:
    """The claims of whose outputs, which are labels, profiles may have fewer."""
    if not plan.spec.fewer_labels:
        return ()
    return tuple(c for c in plan.claims if (c.site.role, c.site.kind) == ("head", "linear") and c.mode in EXCHANGED)


def absent(count: int, labels: int) -> Array:
    """What is added to the outputs [L] of a head with room for `labels`, of which a profile has `count`."""
    found = np.zeros(labels, np.float32)
    found[count:] = FAR
    return found


def hide(insertion: Insertion, heads: Iterable[Claim], tensors: Mapping[str, Array]) -> None:
    """Let a profile hide labels of a graph, in place, after all modules have been put in."""
    for claim in heads:
        y = insertion.current(claim.site.values["y"])
        emitter: Emitter = insertion.emitter(claim, y)
        count = claim.site.sizes["out"]
        constant = emitter.constant(tensors.get(ABSENT, absent(count, count)), "absent")
        constant.metadata_props[ABSENT] = str(count)
        insertion.write(y, emitter.node("Add", [y, constant]), emitter.added)


def absent_of(model: ir.Model) -> str | None:
    """The constant of a graph that hides labels, by name; None where none does."""
    return next((n for n, value in model.graph.initializers.items() if ABSENT in value.metadata_props), None)
