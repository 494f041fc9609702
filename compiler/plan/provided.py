"""What a checkpoint lacks and modules bring: a head that is trained with them, rows of added tokens.

A parameter is brought where its new value does not depend on the values that are missing. This is tried: the missing
ones are no numbers, and whatever is made of them is none either.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from peltc.compiler.base.base import Base, missing_weights
from peltc.compiler.interpreters.numeric import NumericInterpreter
from peltc.compiler.plan.claims import Claim, Plan
from peltc.compiler.plan.planner import make_plan
from peltc.compiler.survey.anatomy import places_of
from peltc.spec.diagnostics import Diagnostic, PeltError, Place, fail
from peltc.spec.formula.interpreter import Deferred, EvaluationError
from peltc.spec.method import ROLES
from peltc.spec.modes import CUDA
from peltc.spec.quantising import BITS
from peltc.spec.specification import Spec

Array = np.ndarray[Any, Any]
SOME = np.float32(0.37)
"""What stands for an adapter's values: zeros would divide by zero."""


def plan_on(spec: Spec, base: Base, mode: str | None = None) -> Plan:
    """The plan of a spec on a base, which has, with the modules, every weight that it needs.

    Raises:
        PeltError: as `make_plan`; E208 a type that the checkpoint's numbers are not computed in; E504 weights that
            neither the checkpoint nor any module holds.
    """
    plan = make_plan(spec, base.anatomy, base.fingerprint, mode)
    check_provided(plan, base)
    stored = plan.quantised.how.to if plan.quantised else ""
    if stored and stored not in BITS and base.precision != "float32" and spec.provider != CUDA:
        told = f"products by {stored} are computed in float32 on the CPU, and the model is in {base.precision}"
        raise fail("E208", told, Place(spec.path, key="deploy.precision"), "float32, or `provider: cuda`")
    return plan


def check_provided(plan: Plan, base: Base) -> None:
    """Whether modules bring whatever the checkpoint lacks.

    Raises:
        PeltError: E504 what nobody brings.
    """
    left = {name: rows for name in base.parameters if base.lacks(name) and (rows := _left(plan, base, name))}
    if not left:
        return
    findings = [_short(base, name, rows) for name, rows in left.items() if base.lacks(name).start]
    if absent := sorted(name for name in left if not base.lacks(name).start):
        sites = {
            name: s.path for s in base.anatomy for name in s.parameters.values() if s.path and s.kind != "embedding"
        }
        owners = dict.fromkeys(sites[name] for name in absent if name in sites)
        findings += missing_weights(absent, base.checkpoint, base.folder, list(owners)).diagnostics
    raise PeltError(findings)


def _short(base: Base, name: str, rows: list[int]) -> Diagnostic:
    """The finding about rows of a table, or of a head, that nobody brings."""
    held, wanted = base.lacks(name).start, base.parameters[name].shape[0]
    site = next((s.path for s in base.anatomy if name in s.parameters.values() and s.path), "")
    return Diagnostic(
        "E504",
        f"the checkpoint holds {held} of the {wanted} rows of '{name}', and no module brings {_ranges(rows)}",
        Place(str(base.folder)),
        f"modules that bring these rows, at '{site}'" if site else "a checkpoint that holds them",
        "`method: trainable_tokens` brings single rows, `replace` all of them; `tied: together` lets a tied head follow"
        " its table",
    )


def _ranges(rows: list[int]) -> str:
    """Row numbers as a spec lists them: 3, 7-9."""
    starts = [i for i, row in enumerate(rows) if not i or rows[i - 1] != row - 1]
    parts = [rows[a:b] for a, b in zip(starts, [*starts[1:], len(rows)], strict=True)]
    words = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    return ", ".join(words[:8] + (["..."] if words[8:] else []))


def _left(plan: Plan, base: Base, name: str) -> list[int]:
    """The rows of a parameter that neither the checkpoint nor a module brings."""
    state = _all(base, name)
    for claim in plan.claims:
        for role, short in ROLES.items():
            if claim.site.parameters.get(role) == name and role in claim.effects:
                state = _changed(claim, role, short, state, base)
    return np.flatnonzero(~np.isfinite(state.reshape(len(state), -1)).all(1)).tolist()


def _all(base: Base, name: str) -> Array:
    """A parameter's values; none where the checkpoint lacks them."""
    return base.array(name, np.nan).astype(np.float32)


def _changed(claim: Claim, role: str, short: str, state: Array, base: Base) -> Array:
    """A parameter, as it is stored, after a claim."""
    site, numeric = claim.mirrors or claim.site, NumericInterpreter()
    turn = role == "weight" and site.transposed
    full = state.T if turn else state
    index = slice(None) if site.rows is None else places_of(site.rows)
    values: dict[str, Any] = {n: np.broadcast_to(SOME, t.shape) for n, t in claim.tensors.items()}
    values |= {s: Deferred(partial(_all, base, site.parameters[r])) for r, s in ROLES.items()
               if s != short and r in site.parameters}  # fmt: skip
    try:
        found = numeric.evaluate(claim.effects[role], claim.scope({**values, short: full[index]}, numeric))
    except EvaluationError:  # it reads what only runs
        return state
    changed = np.array(full)
    changed[index] = found
    return changed.T if turn else changed
