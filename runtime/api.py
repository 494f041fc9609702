"""`peltc.survey` and `peltc.plan`: looking before compiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peltc.compiler.base.live import is_known, survey_model
from peltc.compiler.base.opening import open_base
from peltc.compiler.base.source import check_order
from peltc.compiler.earlier import check_model
from peltc.compiler.plan.claims import Plan
from peltc.compiler.plan.planner import make_plan
from peltc.compiler.survey.anatomy import Anatomy
from peltc.spec.specification import Spec, load_spec


def survey(
    model: str | Path | Any,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    text_only: bool = False,
) -> Anatomy:
    """The sites of a model.

    Args:
        model: a model folder, a hub id, a torch model of `transformers`, or any other torch module.
        example_inputs: example inputs by name for a module that `transformers` does not have; see `peltc.compile`.
        architecture: a class of `transformers` in place of the config's, for folders and hub ids.
        text_only: for folders and hub ids of models that read more than text; see `peltc.compile`.

    Raises:
        PeltError: E5xx what is wrong with the model, or why it cannot be exported.
    """
    check_model(model)
    if isinstance(model, (str, Path)):
        return open_base(model, architecture=architecture, text_only=text_only).anatomy
    return _surveyed(model, example_inputs)[0]


def plan(
    spec: Spec | str | Path | Mapping[str, Any],
    model: str | Path | Any,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    text_only: bool = False,
) -> Plan:
    """Every decision about a spec on a model, before anything is written.

    Raises:
        PeltError: what is wrong with either, or keeps them from fitting.
    """
    check_order(spec, model)
    if not isinstance(spec, Spec):
        spec = load_spec(spec)
    check_model(model)
    if isinstance(model, (str, Path)):
        from peltc.runtime.building.compile import plan_for

        return plan_for(spec, model, architecture=architecture, text_only=text_only)[0]
    anatomy, fingerprint = _surveyed(model, example_inputs)
    return make_plan(spec, anatomy, fingerprint)


def link(
    out: str | Path, weights: str | Path | Mapping[str, Any], *, labels: Sequence[str] | None = None
) -> dict[str, Any]:
    """A profile for an artifact whose modules are exchanged while it runs.

    Args:
        out: the artifact's folder.
        weights: an adapter's safetensors file, its arrays by tensor name, or a folder that `pelt import` reads.
        labels: the names of its labels, in an artifact whose profiles may have fewer than it; those that the adapter's
            file tells where absent.

    Returns:
        Arrays by the names of the graph's inputs, for `Session.add_profile`.

    Raises:
        PeltError: E603 no artifact; E624 its modules are fixed in it; E4xx what is wrong with the weights.
    """
    from peltc.compiler.linking.linker import Linker

    return Linker(out).link(weights, labels=labels)


def _surveyed(model: Any, inputs: Mapping[str, Any] | None) -> tuple[Anatomy, str]:
    """The anatomy of a torch model, modules that are attached to it apart, and what identifies its kind."""
    if inputs or not is_known(model):
        from peltc.runtime.training.attach import bare

        model = bare(model)
    return survey_model(model, inputs)
