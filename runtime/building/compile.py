"""`peltc.compile`: from a spec and a model to a verified artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.adapter.weights import inside, load_tensors
from peltc.compiler.artifact import (
    free,
    staged,
    tidy,
)
from peltc.compiler.base.base import Base
from peltc.compiler.base.opening import open_base
from peltc.compiler.base.source import check_order, find_model, read_config
from peltc.compiler.earlier import check_model, replacing
from peltc.compiler.export.exported import stages
from peltc.compiler.files.integrity import check_record, check_unchanged
from peltc.compiler.files.manifest import ADAPTER, GIVEN, GROWN, KEPT, MANIFEST, PROFILES, read_manifest, write_manifest
from peltc.compiler.files.talk import Talk, logged
from peltc.compiler.importers.importing import import_adapter, imports
from peltc.compiler.importers.recorded import recorded
from peltc.compiler.pipeline import build
from peltc.compiler.plan.choice import choice_of
from peltc.compiler.plan.claims import Plan
from peltc.compiler.plan.provided import plan_on
from peltc.runtime.building.begun import begin
from peltc.runtime.building.blocks import blocks_of
from peltc.runtime.building.opened import opened
from peltc.runtime.building.trained import (
    Array,
    Weights,
    adapter_tensors,
    check_sources,
    kept_provenance,
    save_adapter,
    told,
    told_by,
    weights_file,
)
from peltc.spec.diagnostics import Place, fail
from peltc.spec.document import parse
from peltc.spec.foreign import AS_TRAINED, refuse
from peltc.spec.quantising import quantised_to
from peltc.spec.specification import Spec, build_spec, load_spec


def plan_for(
    spec: Spec,
    model: str | Path,
    weights: str | Path | None = None,
    *,
    architecture: str | None = None,
    mode: str | None = None,
    text_only: bool = False,
    talk: Talk = logged,
) -> tuple[Plan, Base]:
    """The plan of a spec on a model, and the model's base. A file of weights, the spec's own where none is given, is
    read and held against it.

    Raises:
        PeltError: what is wrong with the model or keeps the spec from fitting it; E4xx what is wrong with the weights;
            E507 the model is an artifact.
    """
    check_model(model)
    file = weights_file(spec, weights)
    refuse(file, "weights")
    folder = find_model(model)
    choice = choice_of(spec, told(spec, weights), read_config(folder))
    base = open_base(folder, architecture=architecture, choice=choice, precision=spec.precision,
                     provider=spec.provider, text_only=text_only, talk=talk)  # fmt: skip
    plan = plan_on(spec, base, mode)
    if file is not None:
        adapter_tensors(plan, base, file, talk)
    return plan, base


def compile(
    spec: Spec | str | Path | Mapping[str, Any],
    model: str | Path | Any,
    out: str | Path,
    weights: str | Path | Mapping[str, Array] | None = None,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    mode: str | None = None,
    generation: bool | None = None,
    provider: str | None = None,
    quantise: str | None = None,
    verify: bool | str = True,
    self_contained: bool = False,
    text_only: bool = False,
    quirks: str | None = None,
    talk: Talk = logged,
) -> dict[str, Any]:
    """Compile a spec on a model into an artifact.

    Args:
        spec: a spec, its file, or its content; or the folder of an adapter that `pelt import` reads, whose own base
            is the model where that is None.
        model: a model folder, a hub id, a torch model of `transformers`, or any other torch module. Where modules are
            attached to it, their tensors are taken.
        out: the artifact's folder; an artifact that is there is replaced when all went well.
        weights: a safetensors file or arrays by tensor name, in place of the spec's own.
        example_inputs: for a module that `transformers` does not have: example inputs by name, as its forward takes
            them. Axis 0 is the batch; axis 1, where there is one, a length, which inputs of equal example lengths
            share; both are of any size in the artifact, and at least 2 here. Verification draws inputs of the same
            kinds and ranges of values, none longer than these.
        architecture: a class of `transformers` in place of the config's.
        mode: `fold`, `static` or `swappable`, in place of the spec's.
        generation: add the graphs that `Session.generate` runs, in place of what the spec says.
        provider: what the artifact is to run on, `any`, `cuda` or `cpu`, in place of the spec's.
        quantise: the type that weights of the base's maps are quantised to, `int4` or `int8`, in place of the spec's.
        verify: hold the artifact against PyTorch before it takes its place. In half precision that is two steps;
            `function` or `arithmetic` is one of them alone.
        self_contained: copy the checkpoint into the artifact rather than link it.
        text_only: compile a model that reads more than text through its text alone.
        quirks: of an adapter's folder of another library: `as_trained` where absent, or `fixed` to compute what the
            methods say where the library computes something else.
        talk: told, line by line, what happens and what to know.

    Returns:
        The manifest.

    Raises:
        PeltError: whatever the spec, the model, the weights or the disk do not allow; and E701 to E705 where
            verification fails. `out` is left as it was.
    """
    place = free(Path(out))  # before anything takes time
    imported: dict[str, Any] | None = None
    if isinstance(spec, (str, Path)) and imports(spec):
        if weights is not None:
            raise fail("E410", "an adapter's folder is given as the spec, and weights beside", Place(str(spec)),
                       "the folder alone, which holds its own")  # fmt: skip
        if model is not None:
            check_model(model, Path(out))
        found = import_adapter(Path(spec), model, quirks=AS_TRAINED if quirks is None else quirks, talk=talk)
        spec, weights, model, imported = found.spec, found.tensors, found.base, found.record
    elif quirks is not None:
        raise fail("E437", "a spec has no quirks: it says itself what is computed", expected="`quirks` with a folder"
                   " of another library")  # fmt: skip
    check_order(spec, model)
    if not isinstance(spec, Spec):
        spec = load_spec(spec)
    if generation is not None:
        spec = replace(spec, generation=generation)
    if provider is not None:
        spec = spec.on(provider)
    if quantise is not None:
        spec = replace(spec, quantise=quantised_to(quantise, spec.quantise))
    check_model(model, Path(out))
    refuse(weights if weights is not None or not spec.weights else inside(spec.folder, spec.weights, spec.path),
           "weights")  # fmt: skip
    tidy(place)
    known = told(spec, weights)
    if imported is None and not isinstance(weights, Mapping) and (file := weights_file(spec, weights)) is not None:
        imported = recorded(file)
    with opened(model, Path(out), spec, known, example_inputs, architecture, talk, text_only) as (base_of, attached):
        return _compile(spec, base_of, Path(out), attached if weights is None else weights, mode, verify,
                        self_contained, imported, talk)  # fmt: skip


def _compile(
    spec: Spec,
    base_of: Callable[[str], Base],
    out: Path,
    weights: Weights,
    mode: str | None,
    verify: bool | str,
    self_contained: bool,
    imported: dict[str, Any] | None,
    talk: Talk,
) -> dict[str, Any]:
    """Compile on a model's base, by variant."""
    base = base_of("ids")
    plan = plan_on(spec, base, mode)
    if base.converted:
        talk(f"the checkpoint cannot be referenced where it lies: {base.converted}")
    for line in plan.notes:
        talk(line)
    if line := replacing(out, spec, base):
        talk(line)
    tensors, source, own = adapter_tensors(plan, base, weights, talk)
    check_sources(plan, base, own)
    gates = None
    if plan.spec.freeze_gates:
        from peltc.runtime.building.freeze import freeze_for

        talk("measuring gates on the calibration texts")
        frozen = freeze_for(plan, base, tensors, mode)
        plan, tensors, gates = frozen.plan, frozen.tensors, frozen.report
        talk(f"warning: {len(gates['gates'])} gates are frozen; outputs on the calibration texts differ by up to"
             f" {gates['difference']:.1%} of the largest value")  # fmt: skip
    embeds = base_of("embeds") if plan.prepends else None
    staged_bases = {name: base_of(name) for name in stages(base.config)} if spec.generation else {}
    with staged(out) as folder:
        manifest = build(plan, base, tensors, folder, embeds=embeds, stages=staged_bases, weights_from=source,
                         self_contained=self_contained, pack=blocks_of)  # fmt: skip
        if "decode" in staged_bases and plan.prepends:
            manifest["tokens_before"] = begin(folder, plan, tensors, staged_bases["decode"], talk)
        manifest["frozen_gates"], manifest["imported"] = gates, imported
        manifest["kept"] = kept_record(plan) if "decode" in staged_bases else None
        write_manifest(folder, manifest)
        tell_left(plan, manifest["quantised"], talk)
        save_adapter(folder, plan, tensors, own, self_contained, kept_provenance(plan, base, weights, own))
        if manifest["profiles"]:
            first_profile(folder, plan, tensors)
        for entry in manifest["folded"]:
            if entry["warning"]:
                talk(
                    f"warning: storing '{entry['parameter']}' in {base.precision} takes {entry['rounding_loss']:.0%} of"
                    f" the change; `mode: static` keeps it, and so does `precision: float32`"
                )
        if verify:
            from peltc.runtime.verification.bare import not_bare
            from peltc.runtime.verification.verify import verify_folder

            talk("verifying against PyTorch")
            step = None if verify is True else verify
            manifest["verification"] = verify_folder(folder, plan, base, tensors, str(out), step=step)
            tell_open(manifest["verification"], talk)
            if why := not_bare(folder, manifest, plan, base, tensors):
                manifest["profiles"]["no_bare_base"] = manifest["profiles"]["one_length"] = why
                talk(f"warning: every text needs a profile of full length: {why}")
            write_manifest(folder, manifest)
        for each in (base, *((embeds,) if embeds else ()), *staged_bases.values()):
            check_unchanged(each.checkpoint.stamps)
    return manifest


def kept_record(plan: Plan) -> dict[str, Any] | None:
    """What the graph that generates keeps from the prompt: how many values for a text, by module; None where nothing
    is kept."""
    modules = {
        f"{claim.attachment}.{claim.site.name}": sum(
            prod(sizes) for found in claim.summaries.values() for sizes in found.values()
        )
        for claim in plan.held
    }
    names = {"input": GIVEN + KEPT, "output": GROWN + KEPT}
    return {"at": plan.spec.gates, **names, "values": sum(modules.values()), "modules": modules} if modules else None


def first_profile(folder: Path, plan: Plan, tensors: Mapping[str, Array]) -> None:
    """Write what a compilation was given as the artifact's first profile, named like the spec."""
    from peltc.compiler.linking.linker import Linker
    from peltc.runtime.running.form import SUFFIX, write_profile

    linker = Linker(folder)
    file = folder / PROFILES / f"{plan.spec.name}{SUFFIX}"
    write_profile(file, linker.link(tensors), linker.record["fingerprint"])


def tell_left(plan: Plan, record: Mapping[str, Any] | None, talk: Talk) -> None:
    """Say which weights are not quantised although the plan named them."""
    known = plan.quantised.left if plan.quantised else {}
    for name, reason in record["left"].items() if record else ():
        if name not in known:
            talk(f"'{name}' is not quantised: {reason}")


def tell_open(verification: Mapping[str, Any], talk: Talk) -> None:
    """Say what verification could not do here."""
    found = verification["arithmetic"]
    if found and found["status"] == "open":
        talk(f"warning: the arithmetic in {found['precision']} is not verified, for {', '.join(found['providers'])}"
             f" cannot compute it: {found['reason']}; `pelt verify --provider` does it where one can")  # fmt: skip


def verify(
    out: str | Path,
    model: str | Path | Any = None,
    *,
    step: str | None = None,
    providers: Sequence[str] | None = None,
    talk: Talk = logged,
) -> dict[str, Any]:
    """Hold an artifact against PyTorch once more, and write the figures into its manifest.

    Args:
        model: the base, as a folder, a hub id or a torch model; the checkpoint in the artifact where absent. An
            artifact of a module that `transformers` does not have needs the module.
        step: `function` or `arithmetic`, for one of the two steps of half precision; the figures of the other stay.
        providers: execution providers of the arithmetic in half precision; the CPU's where absent.

    Raises:
        PeltError: E603 no artifact; E604 an execution provider that is not there; E608 another base; E609 a changed
            file; E610 the model is needed; E701 to E705 what differs.
    """
    from peltc.compiler.artifact import digest
    from peltc.runtime.verification.verify import verify_folder

    folder = Path(out)
    manifest = read_manifest(folder)
    check_record(folder / MANIFEST, manifest)
    spec = build_spec(parse(manifest["spec"], f"{folder / MANIFEST}"), manifest["spec"])
    known = manifest["base"]
    spec = replace(spec, precision=known["precision"])  # whoever decided it: the spec, its provider, or an argument
    like, architecture = known.get("inputs"), known["architecture"]
    if like is not None and (model is None or isinstance(model, (str, Path))):
        raise fail("E610", f"the artifact was compiled from a live torch module, {architecture}", Place(str(folder)),
                   "the module itself, which no folder holds", "in Python: peltc.verify(out, module)")  # fmt: skip
    inputs = examples(like) if like else None
    if manifest.get("quantised") and model is None:
        raise fail("E610", "the artifact holds the base's weights quantised, and not as they were", Place(str(folder)),
                   "the model that it was compiled from", "`pelt verify OUT --model MODEL`")  # fmt: skip
    adapter, place = told_by(folder / ADAPTER), folder if model is None else model
    text_only = bool(known.get("text_only"))
    with opened(place, folder, spec, adapter, inputs, architecture, talk, text_only) as (base_of, _):
        base = base_of("ids")
        plan = plan_on(spec, base)
        if base.fingerprint != known["fingerprint"]:
            what = (
                f"'{model or out}'" if model is None or isinstance(model, (str, Path)) else f"the {base.architecture}"
            )
            raise fail(
                "E608",
                f"{what} is not the model that this artifact was compiled from",
                Place(str(folder)),
                f"the base with the fingerprint {known['fingerprint'][:12]}...",
                "" if like is None else "the fingerprint is of weights, code and the versions of the tools",
            )
        tensors = load_tensors(plan, folder / ADAPTER)
        for name, array in tensors.items():
            if digest(np.ascontiguousarray(array)) != manifest["weights"]["tensors"][name]["sha256"]:
                raise fail("E609", f"the tensor '{name}' has changed since the artifact was written",
                           Place(str(folder)))  # fmt: skip
        found = verify_folder(folder, plan, replace(base, inputs=like), tensors, step=step, providers=providers)
    if step is not None and (before := manifest["verification"]):
        found = {key: before.get(key) if value is None else value for key, value in found.items()}
    manifest["verification"] = found
    tell_open(found, talk)
    write_manifest(folder, manifest)
    return manifest


def examples(like: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Example inputs of the shapes and types that a manifest tells of."""
    import torch

    return {n: torch.full(entry["shape"], entry["low"], dtype=getattr(torch, entry["dtype"]))
            for n, entry in like.items()}  # fmt: skip
