"""From an adapter's folder and its base to a spec and its tensors: every tensor is used once and every target is there,
or the import is refused with what is left.

The spec is written first, from the names of the tensors; then it is planned like any other, and each tensor of the plan
is filled from the module that its site is. So an import that is wrong anywhere does not fit the plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.adapter.identity import BaseRecord, public_name
from peltc.compiler.adapter.mathematics import mathematics
from peltc.compiler.adapter.mismatch import names
from peltc.compiler.adapter.provenance import provenance
from peltc.compiler.adapter.weights import sound
from peltc.compiler.base.base import Base
from peltc.compiler.base.opening import open_base
from peltc.compiler.base.source import find_model, read_config
from peltc.compiler.files.talk import Talk, logged
from peltc.compiler.importers.adapters_library import read_adapter
from peltc.compiler.importers.folder import Folder, read_folder
from peltc.compiler.importers.formats import CLASSIFIERS, Array, Format
from peltc.compiler.importers.hf_peft import FORMATS
from peltc.compiler.importers.keys import check_config
from peltc.compiler.importers.modules import Read, attachments, fill
from peltc.compiler.importers.parts import ADAPTER, OWN, Part, Placed, parts_of, placed
from peltc.compiler.importers.targets import targeted
from peltc.compiler.importers.ties import kept, owner, owners
from peltc.compiler.importers.tokens import other_tokens
from peltc.compiler.importers.wording import name_of, spec_content
from peltc.compiler.importers.wrapped import named_owners, named_weights, unwrapped
from peltc.compiler.plan.claims import Plan
from peltc.compiler.plan.planner import make_plan
from peltc.spec.diagnostics import Place, fail, one_of, wrong_type
from peltc.spec.document import dump
from peltc.spec.foreign import ADAPTERS, recognised
from peltc.spec.specification import ModelChoice, Spec, load_spec

TASKS = {
    "SEQ_CLS": ("ForSequenceClassification",), "TOKEN_CLS": ("ForTokenClassification",),
    "CAUSAL_LM": ("ForCausalLM", "LMHeadModel"), "SEQ_2_SEQ_LM": ("ForConditionalGeneration",),
    "QUESTION_ANS": ("ForQuestionAnswering",),
}  # fmt: skip
"""How the classes of `transformers` for PEFT's tasks end."""
ORIGIN = "Imported from"
"""What the first line of an imported spec begins with."""
Reading = Callable[[str], str]
"""From a name in the adapter to the name in the model."""


@dataclass(frozen=True)
class Imported:
    """An adapter in our own words.

    Attributes:
        spec: the spec.
        content: the spec as plain data.
        tensors: the adapter's tensors by our names, float32.
        metadata: what their file says of how they were trained.
        base: the model's folder or hub id.
        origin: where it came from, in words.
        plan: the spec's on the model.
    """

    spec: Spec
    content: Mapping[str, Any]
    tensors: Mapping[str, Array]
    metadata: Mapping[str, str]
    base: str
    origin: str
    plan: Plan

    def text(self, weights: str = "") -> str:
        """The spec's YAML, with where it came from.

        Args:
            weights: the name of the tensors' file, beside the spec.
        """
        content = {**self.content, **({"weights": weights} if weights else {})}
        return f"# {self.origin}\n{dump(content)}"


def import_adapter(path: Path, model: Any = None, *, base: Base | None = None, talk: Talk = logged) -> Imported:
    """Read an adapter's folder for a model.

    Args:
        model: the base's folder or hub id; the one that the adapter names where absent.
        base: the base, where it is known already.

    Raises:
        PeltError: E216 a model that is no folder; E430 what is wrong with the adapter's; E431 what of it has no
            counterpart here; E432 modules that the model does not have, or that the file has no tensors of; E433
            tensors that are left; E5xx the model.
    """
    if model is not None and not isinstance(model, (str, Path)):
        raise wrong_type("the base of an adapter's folder", model, "the folder or hub id that it was loaded from")
    given = recognised(path) if path.is_dir() else None
    if given is not None and given.library == ADAPTERS:
        return imported(read_adapter(path, model, base, talk))
    folder = read_folder(path)
    known = FORMATS.get(folder.kind)
    if known is None:
        raise fail("E431", f"adapters of PEFT's method {folder.kind} are not imported yet", folder.place,
                   one_of(sorted(FORMATS)))  # fmt: skip
    check_keys(folder, known)
    named = model or folder.base or (base.folder if base is not None else "")
    if not named:
        raise fail("E430", "the adapter names no base model", folder.place, "the model after the adapter's folder")
    parts = parts_of(folder, known)
    base = base or base_of(folder, named, parts, talk)
    check_saved(folder, parts, base)
    if note := other_tokens(folder.path, base):
        talk(f"warning: {note}")
    others = owners(base) if known.tied else {*named_owners(folder.config, base.parameters)}
    read = shift(folder, parts, base, others)
    adapted = [part.module for part in parts if part.role == ADAPTER and part.module]
    weights = named_weights(folder, base.parameters, adapted, read)
    if known.sites is None:
        check_targets(folder, known, base, {read(module) for module in adapted if module not in weights})
    if known.tied:
        once = kept({part.module: part.tensors for part in parts if part.role == ADAPTER}, read, base, folder)
        parts = [part for part in parts if part.role != ADAPTER or part.module in once]
    found: list[Placed] = []
    for part in parts:
        found += placed(part, read(part.module), folder, known, base, weights.get(part.module, ""))
    content = spec_content(folder, base, found)
    spec = load_spec(content)
    plan = make_plan(spec, base.anatomy, base.fingerprint)
    tensors = filled(plan, found, folder)
    said = provenance(mathematics(plan), BaseRecord(base.architecture, public_name(folder.base)))
    version = folder.config.get("peft_version")
    told = f" {version}" if isinstance(version, str) and re.fullmatch(r"[\w.+-]{1,40}", version) else ""
    origin = f"{ORIGIN} '{spec.name}', an adapter of Hugging Face PEFT{told} ({folder.kind})"
    return Imported(spec, content, tensors, said.metadata(), str(named), origin, plan)


def imports(given: str | Path) -> bool:
    """Whether what is given is an adapter's folder of a method that is imported."""
    found = recognised(given) if Path(given).is_dir() else None
    return found is not None and found.imported


def imported(read: Read) -> Imported:
    """An adapter whose modules are known, as a spec and its tensors.

    Raises:
        PeltError: E433 modules that the spec does not say, or values that do not fit it.
    """
    attach, owners = attachments(read.modules, read.base)
    content = {"pelt": 1, "name": name_of(Path(read.place.path)), **read.model, "attach": attach}
    spec = load_spec(content)
    plan = make_plan(spec, read.base.anatomy, read.base.fingerprint)
    tensors = fill(plan, owners, read.modules, read.place)
    said = provenance(mathematics(plan), BaseRecord(read.base.architecture, public_name(read.named)))
    return Imported(spec, content, tensors, said.metadata(), read.given, f"{ORIGIN} {read.origin}", plan)


def check_keys(folder: Folder, known: Format) -> None:
    """Whether each key of a config is understood, or off.

    Raises:
        PeltError: E430 a value that is none of the key; E431, a finding for each key that is not understood.
    """
    check_config(folder.config, known, folder.place, "PEFT")


def check_saved(folder: Folder, parts: Sequence[Part], base: Base) -> None:
    """Whether the file has the tensors of every module of the model that was trained as a whole; PEFT leaves a head
    that it does not find at random values. Names that the model does not have are of other models' heads.

    Raises:
        PeltError: E432 it has none of one.
    """
    held = [part.module for part in parts if part.role == OWN]
    for name in folder.config.get("modules_to_save") or ():
        there = any(f".{name}." in f".{parameter}" for parameter in base.parameters)
        if there and not any(f".{name}." in f".{module}." for module in held):
            raise fail("E432", f"the adapter has no tensors of '{name}', which its config says was trained",
                       Place(folder.place.path, key="modules_to_save"), "tensors of each of `modules_to_save`",
                       "leave out of the config what was not trained")  # fmt: skip


def base_of(folder: Folder, model: str | Path, parts: Sequence[Part], talk: Talk) -> Base:
    """The base, as the class of the adapter's task where the checkpoint is of another, with as many labels as the
    adapter's head has, and as many rows of the table of words as the adapter's own has."""
    found = find_model(model)
    config = read_config(found)
    architecture = class_for(folder, config)
    heads = [
        folder.tensors[part.tensors["weight"]].shape for part in parts if part.role == OWN and "weight" in part.tensors
    ]
    heads = [shape for shape in heads if len(shape) == 2]
    labels = heads[-1][0] if heads and folder.config.get("task_type") in CLASSIFIERS else None
    base = open_base(found, choice=ModelChoice(architecture, labels), talk=talk)
    words = next((site for site in base.anatomy if site.kind == "table" and site.role == "embedding.word"), None)
    if words is None or not heads:
        return base
    name = words.parameters["weight"]
    grown = max((folder.tensors[t].shape[0] for part in parts if part.role == OWN for leaf, t in part.tensors.items()
                 if f"{part.module}.{leaf}" == name), default=0)  # fmt: skip
    if grown <= base.parameters[name].shape[0]:
        return base
    return open_base(found, choice=ModelChoice(architecture, labels, grown), talk=talk)


def class_for(folder: Folder, config: Mapping[str, Any]) -> str:
    """The class of the adapter's task, where the checkpoint's own is another; "" for the checkpoint's own."""
    named = config.get("architectures") or []
    own = str(named[0]) if isinstance(named, list) and named else ""
    endings = TASKS.get(str(folder.config.get("task_type")), ())
    if not own or not endings or own.endswith(endings):
        return ""
    import transformers

    stem = own.partition("For")[0].removesuffix("Model").removesuffix("LMHead")
    return next((stem + ending for ending in endings if hasattr(transformers, stem + ending)), "")


def _without(stem: str, name: str) -> str:
    return name.removeprefix(stem)


def shift(folder: Folder, parts: Sequence[Part], base: Base, others: Set[str] = frozenset()) -> Reading:
    """How the adapter's names become the model's: as they are, or with the base model's own name put before or taken
    off, where the adapter was saved on an inner or an outer model.

    Args:
        others: modules that the model has beside those in its graph.

    Raises:
        PeltError: E432 no reading finds all modules, or several do.
    """
    modules = [unwrapped(part.module) for part in parts if part.module]
    held = {name.rpartition(".")[0] for name in base.parameters if name.endswith((".weight", ".bias"))} | others
    stems = sorted({f"{name.partition('.')[0]}." for name in held})
    readings: dict[str, Reading] = {"": str}
    readings |= {f"{stem} before": stem.__add__ for stem in stems}
    inner = [stem for stem in stems if all(name.startswith(stem) for name in modules)]
    readings |= {f"{stem} off": partial(_without, stem) for stem in inner}
    fitting = [read for read in readings.values() if all(read(name) in held for name in modules)]
    if len(fitting) == 1 or (fitting and fitting[0] is readings[""]):
        return fitting[0]
    missing = [name for name in modules if name not in held]
    raise fail("E432", f"{len(missing)} of the adapter's {len(modules)} modules are not in the {base.architecture}:"
                       f" {names(missing)}", Place(str(folder.path)), "an adapter of this model",
               f"it says that it is for '{folder.base[:120]}'" if folder.base else "")  # fmt: skip


def check_targets(folder: Folder, known: Format, base: Base, held: set[str]) -> None:
    """Whether the file has tensors of each module that the config means, and the config means each module that the file
    has tensors of: PEFT fills the former with random values and drops the latter, without a word.

    Raises:
        PeltError: E432.
    """
    sites = {s.parameters["weight"].removesuffix(".weight"): s for s in base.anatomy if s.kind in known.kinds}
    apart = [module for module, site in sites.items() if site.role == "head" or site.kind != "linear"]
    modules = [*sites, *(sorted(owners(base) - {*sites}) if known.tied else ())]
    wanted = set(targeted(folder.config, modules, apart))
    if known.tied:
        wanted, held = ({owner(base, module) for module in some} for some in (wanted, held))
    missing, left = sorted(wanted - held), sorted(held - wanted)
    for found, what in ((missing, "has no tensors of"), (left, "has tensors of, and its config does not mean,")):
        if found:
            raise fail("E432", f"the adapter {what} {len(found)} modules: {names(found)}", folder.place,
                       "`target_modules` that mean the modules in the file")  # fmt: skip


def filled(plan: Plan, found: Sequence[Placed], folder: Folder) -> dict[str, Array]:
    """The plan's tensors, from the modules that its sites are.

    Raises:
        PeltError: E433 a module that the plan does not have, or tensors that do not fit it; E404 values that are no
            numbers.
    """
    waiting = {(site.key, here.entry.method): here for here in found for site in here.sites}
    tensors: dict[str, Array] = {}
    for claim in plan.claims:
        here = waiting.pop((claim.site.key, claim.method.name), None)
        if here is None:
            if claim.mirrors is not None or claim.follows:  # it has the tensors of another
                continue
            raise fail("E433", f"the spec that was made of it means {claim.site.name}, which it does not have",
                       Place(str(folder.path)), hint="please report this")  # fmt: skip
        stored = {p: folder.values(t) for p, t in here.part.tensors.items()}
        values = dict(here.values(stored, claim.site))
        for parameter, tensor in claim.tensors.items():
            value = values.pop(parameter, None)
            if value is not None and parameter in here.shared and value.ndim == len(tensor.shape):
                value = value[tuple(map(slice, tensor.shape))]
            if value is None or value.shape != tensor.shape:
                what = "is missing" if value is None else f"has the shape {list(value.shape)}"
                of = here.part.module or folder.kind
                raise fail("E433", f"'{parameter}' of '{of}' {what}", Place(str(folder.path)),
                           f"the shape {list(tensor.shape)}")  # fmt: skip
            value = np.ascontiguousarray(value, np.float32)
            if not np.array_equal(tensors.setdefault(tensor.name, value), value):
                raise fail("E433", f"'{parameter}' of '{here.part.module}' differs from that of other modules, which"
                                   " share it", Place(str(folder.path)), "the same values")  # fmt: skip
        if values:
            raise fail("E433", f"'{next(iter(values))}' of '{here.part.module}' has no counterpart at"
                               f" {claim.site.name}", Place(str(folder.path)))  # fmt: skip
    if waiting:
        left = sorted(here.part.module for here in waiting.values())
        raise fail("E433", f"the spec that was made of it leaves out {names(left)}",
                   Place(str(folder.path)), hint="please report this")  # fmt: skip
    return sound(plan, tensors, Place(str(folder.path)))
