"""An adapter with its plan and its base, whatever holds it: an artifact, a spec with its tensors, or another library's
folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peltc.compiler.base.base import Base
from peltc.compiler.base.opening import open_base
from peltc.compiler.base.source import check_order, find_model, read_config
from peltc.compiler.earlier import check_model
from peltc.compiler.files.manifest import ADAPTER, MANIFEST, read_manifest
from peltc.compiler.files.talk import Talk, logged
from peltc.compiler.importers.importing import import_adapter, imports
from peltc.compiler.plan.choice import choice_of
from peltc.compiler.plan.claims import Plan
from peltc.compiler.plan.provided import plan_on
from peltc.runtime.building.trained import adapter_tensors, told, weights_file
from peltc.spec.diagnostics import Place, fail, wrong_type
from peltc.spec.document import parse
from peltc.spec.foreign import refuse
from peltc.spec.specification import Spec, build_spec, load_spec

if TYPE_CHECKING:
    from peltc.compiler.combining.combining import Combined

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Adapter:
    """A trained adapter: what its modules are, on which base, and their tensors. `model` is the base as it was named,
    and `label` what the adapter is called in messages."""

    plan: Plan
    base: Base
    tensors: Mapping[str, Array]
    model: str
    label: str


def read_adapter(
    given: Spec | str | Path | Mapping[str, Any],
    model: str | Path | None = None,
    weights: str | Path | Mapping[str, Array] | None = None,
    *,
    mode: str | None = None,
    talk: Talk = logged,
) -> Adapter:
    """Read an adapter for a model.

    Args:
        given: an artifact's folder, a spec, or the folder of an adapter that `pelt import` reads.
        model: the base's folder or hub id; what the artifact or the other library's folder names where absent.
        weights: the spec's tensors, in place of those that it names.
        mode: in place of the spec's.

    Raises:
        PeltError: whatever is wrong with either; E216 no model is named; E410 weights beside a folder that has its own;
            E608 another model than the artifact's; E610 an artifact of a module that `transformers` does not have.
    """
    if model is not None and not isinstance(model, (str, Path)):
        raise wrong_type("the base of an adapter", model, "the folder or hub id that it was loaded from")
    path = Path(given) if isinstance(given, (str, Path)) else Path()
    label, known = _label(given), dict[str, Any]()
    compiled = isinstance(given, (str, Path)) and (path / MANIFEST).is_file()
    if (compiled or (isinstance(given, (str, Path)) and imports(path))) and weights is not None:
        raise fail("E410", "a folder that holds its own tensors is given, and weights beside", Place(str(path)),
                   "the folder alone")  # fmt: skip
    named = str(model or "")
    if compiled:
        manifest = read_manifest(path)
        spec = build_spec(parse(manifest["spec"], f"{path / MANIFEST}"), manifest["spec"])
        weights, known = path / ADAPTER, manifest["base"]
        spec = replace(spec, precision=known["precision"])  # whoever decided it
        if known.get("inputs") is not None:
            raise fail("E610", f"the artifact was compiled from a live torch module, {known['architecture']}",
                       Place(str(path)), "an artifact of a model of transformers")  # fmt: skip
        folder = path if model is None else Path(model)
    elif isinstance(given, (str, Path)) and imports(path):
        found = import_adapter(path, model, talk=talk)
        spec, weights, folder, named = found.spec, found.tensors, Path(found.base), found.base
    else:
        check_order(given, model)
        spec = given if isinstance(given, Spec) else load_spec(given)
        if model is None:
            raise wrong_type("the base of a spec", model, "the folder or hub id of the model, after the spec")
        folder = Path(model)
    if not compiled or model is not None:
        check_model(str(folder))
    file = None if isinstance(weights, Mapping) else weights_file(spec, weights)
    refuse(file, "weights")
    at = find_model(str(model) if model is not None else folder)
    choice = choice_of(spec, told(spec, weights), read_config(at))
    base = open_base(at, architecture=known.get("architecture"), choice=choice, precision=spec.precision,
                     provider=spec.provider, text_only=bool(known.get("text_only")), talk=talk)  # fmt: skip
    if known and base.fingerprint != known["fingerprint"]:
        raise fail("E608", f"'{model or path}' is not the model that this artifact was compiled from", Place(str(path)),
                   f"the base with the fingerprint {known['fingerprint'][:12]}...")  # fmt: skip
    plan = plan_on(spec, base, mode)
    tensors, _, _ = adapter_tensors(plan, base, weights, talk)
    return Adapter(plan, base, tensors, named, label or plan.spec.name)


def _label(given: Any) -> str:
    return Path(given).name if isinstance(given, (str, Path)) else str(getattr(given, "name", ""))


def export_peft(
    adapter: Spec | str | Path | Mapping[str, Any],
    model: str | Path | None,
    out: str | Path,
    weights: str | Path | Mapping[str, Array] | None = None,
    *,
    talk: Talk = logged,
) -> dict[str, Any]:
    """Write an adapter as a folder that Hugging Face PEFT loads.

    Args:
        adapter: an artifact's folder, or a spec.
        model: the base's folder or hub id, which the config names; the artifact's own where None.
        out: the folder to write.
        weights: the spec's tensors, in place of those that it names.

    Returns:
        The config.

    Raises:
        PeltError: as `read_adapter`; E434 what PEFT cannot express; E601 `out` is taken.
    """
    from peltc.compiler.exporters.exporting import export

    found = read_adapter(adapter, model, weights, talk=talk)
    exported = export(found.plan, found.base, found.tensors, found.model)
    exported.write(Path(out))
    return dict(exported.config)


def combine(
    adapters: Sequence[Spec | str | Path | Mapping[str, Any]],
    model: str | Path,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    how: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    talk: Talk = logged,
) -> Combined:
    """Make one adapter of several on one base: a spec and its tensors, in a folder.

    Args:
        adapters: artifacts, specs with their tensors, folders of adapters that `pelt import` reads.
        out: the folder of the spec.
        weights: a factor for each; ones where absent.
        how: `cat`, the sum; `svd`, the sum cut to a rank; `ties` or `dare`, which keep a share of the values.
        rank: for `svd`; the others keep whatever rank the result has where absent.
        density: the share that `ties` and `dare` keep.
        seed: decides which values `dare` keeps.

    Raises:
        PeltError: as `read_adapter`; E435 what cannot be combined; E601 the folder holds another spec.
    """
    from peltc.compiler.combining.changes import Changes
    from peltc.compiler.combining.combining import ORIGIN, Combination
    from peltc.compiler.combining.combining import combine as combine_changes
    from peltc.compiler.importers.written import write_spec

    asked = Combination(tuple(weights) if weights is not None else (1.0,) * len(adapters), how, rank, density, seed)
    asked.check(len(adapters))
    changes = []
    for adapter in adapters:
        found = read_adapter(adapter, model, mode="fold", talk=talk)
        changes.append(Changes(found.label, found.plan, found.base, found.tensors))
    made = combine_changes(changes, asked, talk)
    write_spec(Path(out), ORIGIN, made.text, made.tensors, made.metadata)
    return made
