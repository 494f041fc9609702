"""From a plan and its tensors to the folder that Hugging Face PEFT loads: each claim is told by its formula, and what
PEFT has no words for is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.base.base import Base
from peltc.compiler.exporters.forms import computed, fits
from peltc.compiler.exporters.hf_peft import FORMS, Form, Part, Stored, config
from peltc.compiler.exporters.naming import endings, every_module, patterns, targets
from peltc.compiler.files.manifest import write_whole
from peltc.compiler.importers.formats import CLASSIFIERS
from peltc.compiler.importers.peft.folder import PREFIX, TENSORS
from peltc.compiler.importers.peft.library import TASKS
from peltc.compiler.plan.claims import Claim, Plan
from peltc.compiler.survey.anatomy import places_of
from peltc.spec.diagnostics import Diagnostic, PeltError, Place, fail
from peltc.spec.foreign import CONFIG
from peltc.spec.formula.syntax import shown

Array = np.ndarray[Any, Any]
WEIGHT = ".weight"


@dataclass(frozen=True)
class Exported:
    """An adapter in PEFT's words: its config, and its tensors by the names in its file."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Array]

    def write(self, folder: Path) -> None:
        """Write both files.

        Raises:
            PeltError: E601 something stands there.
        """
        from safetensors.numpy import save

        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise fail("E601", "the output path is taken", Place(str(folder)), "a folder that is new or empty")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / TENSORS, save(dict(self.tensors), {"format": "pt"}))
        write_whole(folder / CONFIG, (json.dumps(self.config, indent=2, sort_keys=True) + "\n").encode())


def export(plan: Plan, base: Base, tensors: Mapping[str, Array], model: str = "") -> Exported:
    """Say a plan's modules in PEFT's words.

    Args:
        tensors: the plan's.
        model: what the config calls the base.

    Raises:
        PeltError: E434, a finding for each attachment that PEFT cannot express.
    """
    told = forms_of(plan)
    parts: dict[str, list[tuple[Claim, Form, Part]]] = {}
    for claim, form, bound in told:
        name = claim.site.parameters["weight"].removesuffix(WEIGHT)
        values = {key: tensors[claim.tensors[own].name] if isinstance(own, str) else own
                  for key, own in bound.items()}  # fmt: skip
        parts.setdefault(name, []).append((claim, form, Part(rows_of(claim, base), values, claim.options)))
    modules: dict[str, Stored] = {}
    whole: dict[str, Stored] = {}
    findings: list[Diagnostic] = []
    for name, found in parts.items():
        stored = _module(name, found, base)
        if isinstance(stored, Diagnostic):
            findings.append(stored)
        else:
            (modules if found[0][1].kind else whole)[name] = stored
    kinds = list(dict.fromkeys((form.kind, form.variant) for _, form, _ in told if form.kind))
    if len(kinds) != 1:
        what = " and ".join(" ".join(filter(None, kind)) for kind in kinds) or "whole maps alone"
        findings.append(_refused(plan, f"{what} in one spec; one config of PEFT has one method"))
    if findings:
        raise PeltError(findings)
    (kind, variant), every = kinds[0], every_module(base.parameters)
    said = config(kind, variant, modules, any(claim.site.transposed for claim, form, _ in told if form.kind))
    saved = outermost(whole, base.parameters)
    where = targets(modules, every, saved, said.pop("feedforward_modules", None))
    if not where:
        raise PeltError([_refused(plan, "modules that PEFT's config cannot tell from others")])
    for key in ("rank_pattern", "alpha_pattern"):
        if key in said:
            said[key] = patterns(said[key], list(modules))
    content = {"peft_type": kind, "base_model_name_or_path": model or None, "task_type": task(base, bool(saved)),
               "inference_mode": True, "modules_to_save": endings(saved, every) or None, **where, **said}  # fmt: skip
    stored_tensors = {
        f"{PREFIX}{name}.{suffix}": np.ascontiguousarray(array, np.float32)
        for name, module in {**modules, **whole}.items()
        for suffix, array in module.tensors.items()
    }
    return Exported(content, stored_tensors)


def forms_of(plan: Plan) -> list[tuple[Claim, Form, dict[str, Any]]]:
    """The claims with the form that each has, and what the form's names stand for. Of sites that share a module, the
    first stands for all.

    Raises:
        PeltError: E434, a finding for each attachment with a claim that has none.
    """
    told, findings = [], dict[str, Diagnostic]()
    for claim in plan.claims:
        if claim.follows and claim.mirrors is None:
            continue
        why = _unlike(claim)
        formulas = None if why else computed(claim)
        for form in FORMS if formulas is not None else ():
            bound = fits(form.formulas, formulas or {}, claim)
            if bound is not None:
                told.append((claim, form, bound))
                break
        else:
            entry = next(entry for entry in plan.spec.attach if entry.name == claim.attachment)
            said = "; ".join(f"{name}: {shown(e.text or str(e))}" for name, e in claim.effects.items())
            findings.setdefault(claim.attachment, Diagnostic(
                "E434", f"'{claim.attachment}' at {claim.site.name} cannot be said in PEFT's words:"
                        f" {why or f'it computes {said}'}",
                entry.place, "s * linear(linear(x, A), B), that with magnitudes, a vector that scales what a map reads"
                             " or writes, or a map that is trained whole",
                "leave the attachment out, or deploy the artifact"))  # fmt: skip
    if findings:
        raise PeltError(list(findings.values()))
    return told


def _unlike(claim: Claim) -> str:
    """Why a claim is no change of one torch module's map, whatever it computes."""
    site = claim.site
    if claim.mirrors is not None:
        return f"it changes {site.name} and {claim.mirrors.name} together"
    what = f"{'an' if site.kind[0] in 'ae' else 'a'} {site.kind}"
    if site.kind not in ("linear", "table", "norm") or not site.parameters.get("weight", "").endswith(WEIGHT):
        return f"it changes {what}, and PEFT maps and norms of torch modules"
    if site.kind != "linear" and set(claim.effects) - {"weight", "bias"}:
        return f"it changes {what}, which PEFT is told of where it is trained whole"
    return ""


def rows_of(claim: Claim, base: Base) -> Array:
    """Which rows of its module's map a site is."""
    rows = claim.site.rows
    return np.arange(height(claim, base)) if rows is None else places_of(rows)


def height(claim: Claim, base: Base) -> int:
    """How many outputs the module of a site has."""
    return base.parameters[claim.site.parameters["weight"]].shape[-1 if turned(claim) else 0]


def turned(claim: Claim) -> bool:
    """Whether the module stores its weight the other way round; a table does, whose ids pick rows."""
    return claim.site.transposed or claim.site.kind == "table"


def _module(name: str, found: list[tuple[Claim, Form, Part]], base: Base) -> Stored | Diagnostic:
    """One module's tensors, from all claims at its parts; or why PEFT has none for them."""
    claim, form, _ = found[0]
    rows = [part.rows for _, _, part in found]
    names = list(dict.fromkeys(c.attachment for c, _, _ in found))
    why = ""
    if len(np.unique(np.concatenate(rows))) < sum(map(len, rows)):
        why = f"{' and '.join(names)} act on the same rows; combine them first, or leave one out"
    elif any(other != form for _, other, _ in found):
        why = f"{' and '.join(names)} compute different things there"
    else:
        stored = form.store([part for _, _, part in found], height(claim, base))
        if isinstance(stored, Stored):
            turn = turned(claim) and not form.kind
            return Stored({n: a.T if turn and n == "weight" else a for n, a in stored.tensors.items()}, stored.said)
        why = stored
    return Diagnostic("E434", f"the module '{name}' cannot be said in PEFT's words: {why}",
                      expected="one method's tensors for the whole module")  # fmt: skip


def _refused(plan: Plan, what: str) -> Diagnostic:
    return Diagnostic("E434", f"PEFT has no words for {what}", Place(plan.spec.path),
                      "modules of one kind, and heads beside", "export the attachments one by one")  # fmt: skip


def outermost(whole: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[str]:
    """Modules that are trained whole by the outermost around them of which nothing is not: a head of two maps by its
    own name."""
    kept = {p for p in parameters if p.rpartition(".")[0] not in whole}
    found: dict[str, None] = {}
    for name in whole:
        parts = name.split(".")
        forms = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        found[next((f for f in forms if not any(p.startswith(f"{f}.") for p in kept)), name)] = None
    return list(found)


def task(base: Base, headed: bool) -> str | None:
    """PEFT's name of what the model's class is for. Of a classifier with the head that it had, none: PEFT would train
    and save that too."""
    named = (task for task, ends in TASKS.items() if base.architecture.endswith(ends))
    return next((task for task in named if headed or task not in CLASSIFIERS), None)
