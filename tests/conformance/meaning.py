"""What a spec means, on tiny models of a few families: everybody's results against those of the naive interpreter."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import models
import naive
import numpy as np
import torch

from peltc.compiler.base.base import Base
from peltc.compiler.base.opening import open_base
from peltc.compiler.pipeline import build
from peltc.compiler.plan.claims import Plan
from peltc.compiler.plan.planner import make_plan
from peltc.runtime.running.session import Session
from peltc.runtime.training.attach import attach_plan
from peltc.runtime.verification.verify import TOLERANCE, load_model
from peltc.spec.diagnostics import PeltError
from peltc.spec.formula.syntax import calls
from peltc.spec.interpreters.check import check_formulas
from peltc.spec.specification import load_spec

Array = np.ndarray[Any, Any]
FAMILIES = ("bert", "llama", "t5")
NOISE = 20
"""How many times the naive interpreter's own rounding, in float32 against float64, the others' may be: formulas that
divide by little or grow large lose as many digits everywhere."""


@cache
def opened(family: str, folder: Path) -> tuple[Base, Any, Any]:
    """A tiny model's base, and the model in both precisions."""
    base = open_base(models.save(family, folder / f"{family}-float32"))
    model = load_model(base)
    return base, model, copy.deepcopy(model).double()


def inputs(family: str) -> dict[str, Array]:
    """Three texts, one of them padded."""
    random = np.random.default_rng(3)
    mask = np.ones((3, 7), np.int64)
    mask[1, :2] = 0
    if family != "llama":
        mask[1] = mask[1, ::-1]
    found = {"input_ids": random.integers(2, 90, (3, 7)), "attention_mask": mask}
    if family == "bert":
        found["token_type_ids"] = random.integers(0, 2, (3, 7))
    if family == "t5":
        found["decoder_input_ids"] = random.integers(2, 90, (3, 5))
    return found


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def meaning(model: Any, family: str, plan: Plan, values: Mapping[str, Array], given: Mapping[str, Array]) -> Array:
    """What a plan says, evaluated naively in the model's own precision."""
    with precision(model.dtype):
        wide = {name: torch.as_tensor(value).to(model.dtype) for name, value in values.items()}
        with naive.attached(model, family, plan.claims, wide):
            return np.asarray(model(**{name: torch.as_tensor(value) for name, value in given.items()}).logits)


def disagreements(content: dict[str, Any], family: str, folder: Path) -> tuple[str, float, set[str]]:
    """Of a spec: "refused", "unbounded" where it has no finite value, or "equal"; the worst difference, as a share of
    what rounding may be; and the functions that it calls.

    Raises:
        AssertionError: who differs, and by how much.
    """
    base, model, exact = opened(family, folder)
    try:
        spec = load_spec(content)
        check_formulas(spec)
        plans = {mode: make_plan(spec, base.anatomy, base.fingerprint, mode) for mode in ("fold", "static")}
    except PeltError:
        return "refused", 0.0, set()
    plan = plans["fold"]
    random = np.random.default_rng(0)
    values = {name: random.normal(0, 0.2, t.shape).astype(np.float32) for name, t in plan.tensors.items()}
    given = inputs(family)
    seen = given["attention_mask"] > 0 if family == "llama" else slice(None)
    expected = meaning(exact, family, plan, values, given)[seen]
    size = np.abs(expected).max()
    if not np.isfinite(size) or size > 1e6:
        return "unbounded", 0.0, set()
    noise = np.abs(meaning(model, family, plan, values, given)[seen] - expected).max() / size
    limit = max(TOLERANCE["float32"], NOISE * float(noise))

    shares: list[float] = []

    def hold(who: str, found: Array) -> None:
        error = float(np.abs(found[seen] - expected).max() / size)
        shares.append(error / limit)
        assert error <= limit, f"{who} is off by {error:.2g}, at most {limit:.2g} is rounding: {json.dumps(content)}"

    attached = attach_plan(model, plan, values)
    try:
        with torch.no_grad():
            hold("torch", attached(**{name: torch.as_tensor(value) for name, value in given.items()}).logits.numpy())
    finally:
        attached.detach_adapter()
    for mode, each in plans.items():
        with tempfile.TemporaryDirectory() as out:
            build(each, base, values, Path(out))
            hold(f"the graph ({mode})", Session(out, ["CPUExecutionProvider"], threads=1)(**given)["logits"])
    formulas = [expr for claim in plan.claims for _, expr in (*claim.effects.items(), *claim.method.let)]
    return "equal", max(shares), {name for expr in formulas for name in calls(expr)}
