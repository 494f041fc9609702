"""Folders of Hugging Face PEFT: their modules, each at its site, and the base that they are for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

from peltc.compiler.adapter.mismatch import names
from peltc.compiler.base.base import Base
from peltc.compiler.base.opening import open_base
from peltc.compiler.base.source import find_model, read_config, vocabulary_of
from peltc.compiler.files.talk import Talk
from peltc.compiler.importers.formats import CLASSIFIERS, Format
from peltc.compiler.importers.keys import check_config
from peltc.compiler.importers.modules import Module, Read, name_of
from peltc.compiler.importers.peft.folder import Folder, read_folder
from peltc.compiler.importers.peft.methods import FORMATS
from peltc.compiler.importers.peft.parts import ADAPTER, OWN, Part, Placed, parts_of, placed
from peltc.compiler.importers.peft.targets import targeted
from peltc.compiler.importers.peft.ties import kept, owner, owners
from peltc.compiler.importers.peft.tokens import other_tokens
from peltc.compiler.importers.peft.wrapped import named_owners, named_weights, unwrapped
from peltc.compiler.importers.quirks import Quirks
from peltc.spec.diagnostics import Place, fail, one_of
from peltc.spec.foreign import PEFT
from peltc.spec.specification import ModelChoice

TASKS = {
    "SEQ_CLS": ("ForSequenceClassification",), "TOKEN_CLS": ("ForTokenClassification",),
    "CAUSAL_LM": ("ForCausalLM", "LMHeadModel"), "SEQ_2_SEQ_LM": ("ForConditionalGeneration",),
    "QUESTION_ANS": ("ForQuestionAnswering",),
}  # fmt: skip
"""How the classes of `transformers` for PEFT's tasks end."""
Reading = Callable[[str], str]
"""From a name in the adapter to the name in the model."""


def read_adapter(path: Path, model: Any, base: Base | None, quirks: Quirks, talk: Talk) -> Read:
    """An adapter's modules and the base that they are for.

    Args:
        model: the base's folder or hub id; the one that the adapter names where absent.
        base: the base, where it is known already.
        quirks: what becomes of them; those of the adapter are noted.

    Raises:
        PeltError: E430 to E433 and E437, as `import_adapter`.
    """
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
        found += placed(part, read(part.module), folder, known, base, quirks, weights.get(part.module, ""))
    version = folder.config.get("peft_version")
    told = f" {version}" if isinstance(version, str) and re.fullmatch(r"[\w.+-]{1,40}", version) else ""
    origin = f"'{name_of(folder.path)}', an adapter of {PEFT}{told} ({folder.kind})"
    return Read(tuple(modules_of(folder, found)), base, folder.base, str(named), origin, Place(str(folder.path)),
                model_key(folder, base, found))  # fmt: skip


def labels_in(path: Path, weight: str) -> int | None:
    """How many labels the head has that an adapter's folder brings; None where it brings none.

    Args:
        weight: the name of the head's weight in the model.
    """
    found = [tensor.shape for name, tensor in read_folder(path).tensors.items() if f".{name}".endswith(f".{weight}")]
    return int(found[0][0]) if found and len(found[0]) == 2 else None


def modules_of(folder: Folder, found: Sequence[Placed]) -> Iterator[Module]:
    """The modules, each at its site.

    What a method adds to a map of which a parameter was trained beside, it adds to the map as it was trained. Parts of
    a fused map are apart where modules share tensors, of which each has its own rows.
    """
    carrying = {site.key for here in found if here.part.role != OWN for site in here.sites}
    for here in found:
        first = here.part.role == OWN and any(site.key in carrying for site in here.sites)
        stored = {parameter: folder.values(tensor) for parameter, tensor in here.part.tensors.items()}
        for site in here.sites:
            group = repr(site.rows) if here.shared else ""
            source = here.part.module or folder.kind
            yield Module(site, here.entry, here.values(stored, site), source, group, first, here.shared)


def model_key(folder: Folder, base: Base, found: Sequence[Placed]) -> dict[str, Any]:
    """The spec's `model:`, where the base is of another class than its config says, or has other labels or tokens."""
    model: dict[str, Any] = {}
    if base.changed:
        model["architecture"] = base.architecture
        labels = base.config.get("id2label")
        if labels and folder.config.get("task_type") in CLASSIFIERS and any(h.part.role == OWN for h in found):
            model["labels"] = len(labels)
        if (rows := vocabulary_of(base.config)) != vocabulary_of(read_config(base.folder)):
            model["vocabulary"] = rows
    return {"model": model} if model else {}


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
