"""`peltc.survey` and `peltc.plan`: looking before compiling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peltc.compiler.anatomy import Anatomy
from peltc.compiler.base import open_base, survey_model
from peltc.compiler.plan import Plan, make_plan
from peltc.spec.specification import Spec, load_spec


def survey(model: str | Path | Any, *, architecture: str | None = None) -> Anatomy:
    """The sites of a model.

    Args:
        model: a model folder, a hub id, or a torch model of `transformers`.
        architecture: a class of `transformers` in place of the config's, for folders and hub ids.

    Raises:
        PeltError: E5xx what is wrong with the model, or why it cannot be exported.
    """
    if isinstance(model, (str, Path)):
        return open_base(model, architecture=architecture).anatomy
    return survey_model(model)[0]


def plan(
    spec: Spec | str | Path | Mapping[str, Any], model: str | Path | Any, *, architecture: str | None = None
) -> Plan:
    """Every decision about a spec on a model, before anything is written.

    Raises:
        PeltError: what is wrong with either, or keeps them from fitting.
    """
    if not isinstance(spec, Spec):
        spec = load_spec(spec)
    if isinstance(model, (str, Path)):
        base = open_base(model, architecture=architecture, precision=spec.precision)
        return make_plan(spec, base.anatomy, base.fingerprint)
    anatomy, fingerprint = survey_model(model)
    return make_plan(spec, anatomy, fingerprint)
