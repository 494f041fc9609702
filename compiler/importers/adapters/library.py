"""From a folder of the `adapters` library to its modules: its config is a method's, or a union of several, each of
which takes its own kinds of parts; every part is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peltc.compiler.adapter.mismatch import names
from peltc.compiler.base.base import Base
from peltc.compiler.base.opening import open_base
from peltc.compiler.base.source import find_model, read_config
from peltc.compiler.files.talk import Talk
from peltc.compiler.importers.adapters.bottleneck import BOTTLENECK
from peltc.compiler.importers.adapters.folder import LIBRARY, AdapterFolder, named, read_adapter_folder
from peltc.compiler.importers.adapters.formats import Facts
from peltc.compiler.importers.adapters.heads import choice_of, head_modules
from peltc.compiler.importers.adapters.lora import LORA
from peltc.compiler.importers.adapters.places import Places
from peltc.compiler.importers.adapters.prefix import PREFIX
from peltc.compiler.importers.adapters.prompt import PROMPT
from peltc.compiler.importers.adapters.reft import REFT
from peltc.compiler.importers.adapters.setup import Setup
from peltc.compiler.importers.formats import Config
from peltc.compiler.importers.keys import check_config
from peltc.compiler.importers.modules import Module, Read, name_of
from peltc.compiler.importers.peft.folder import only
from peltc.compiler.importers.quirks import Quirks
from peltc.spec.diagnostics import Place, fail, one_of
from peltc.spec.foreign import SETUP

FACTS = {facts.name: facts for facts in (BOTTLENECK, LORA, PREFIX, PROMPT, REFT)}
UNION, SHARED = "union", "shared_parameters"


def read_adapter(path: Path, model: Any, base: Base | None, quirks: Quirks, talk: Talk) -> Read:
    """An adapter's modules, or those of a setup of several, and the base that they are for.

    Args:
        model: the base's folder or hub id; the one that the adapter names where absent.
        base: the base, where it is known already.
        quirks: what becomes of them; those of the adapter are noted.

    Raises:
        PeltError: E430 to E433 and E437, as `import_adapter`.
    """
    setup = Setup(path, quirks) if (path / SETUP).is_file() else None
    path = path if setup else only(path)
    folders = setup.folders if setup else [read_adapter_folder(path)]
    each = [configs_of(folder) for folder in folders]
    last = setup.whole if setup else folders[0]
    given = model or last.base or (base.folder if base is not None else "")
    if not given:
        raise fail("E430", "the adapter names no base model", last.place, "the model after the adapter's folder")
    if base is None:
        found = find_model(given)
        base = open_base(found, choice=choice_of(last, read_config(found)), talk=talk)
    parts = [modules_of(folder, configs, base, quirks) for folder, configs in zip(folders, each, strict=True)]
    modules = [*(setup.together(parts) if setup else parts[0]), *head_modules(last, base)]
    known = dict.fromkeys(facts for configs in each for facts in configs)
    kinds = ", ".join([setup.kind] if setup else [facts.name or "bottleneck" for facts in known])
    notes = dict.fromkeys(facts.note(one) for configs in each for facts, of in configs.items() for one in of)
    told = "".join(f"; {note}" for note in notes if note)
    origin = f"'{name_of(path)}', an adapter of {LIBRARY} {last.version} ({kinds}){told}"
    return Read(tuple(modules), base, last.base, str(given), origin, Place(str(path)), model_key(base, modules))


def labels_in(path: Path, base: Base) -> int | None:
    """How many labels the head has that an adapter's folder brings; None where it brings none, or does not tell."""
    found = choice_of(read_adapter_folder(path), base.config).labels
    return found if isinstance(found, int) else None


def model_key(base: Base, modules: Sequence[Module]) -> dict[str, Any]:
    """The spec's `model:`, where the base is of another class than its config says, or has other labels."""
    if not base.changed:
        return {}
    labels = base.config.get("id2label")
    heads = any(module.site.role.startswith("head") for module in modules)
    return {"model": {"architecture": base.architecture, **({"labels": len(labels)} if heads and labels else {})}}


def configs_of(folder: AdapterFolder) -> dict[Facts, list[Config]]:
    """The configs of a folder's methods, each with what is known of it.

    Raises:
        PeltError: E430 a value that is none of its key; E431 a method or a key that is not known.
    """
    parts = folder.config.get("configs") if folder.config.get("architecture") == UNION else [folder.config]
    if not isinstance(parts, list) or not parts or not all(isinstance(part, Mapping) for part in parts):
        raise fail("E430", "the union names no methods", folder.place, "a list 'configs'")
    found: dict[str, list[Config]] = {}
    for config in parts:
        name = config.get("architecture") or ""
        facts = FACTS.get(name) if isinstance(name, str) else None
        if facts is None:
            raise fail("E431", f"adapters of the method {name!r:.60} are not imported yet", folder.place,
                       one_of([n or "bottleneck" for n in FACTS]))  # fmt: skip
        check_config(config, facts, folder.place, LIBRARY)
        if absent := [key for key in facts.needed if key not in config]:
            raise fail("E430", f"the config of '{name or 'bottleneck'}' has no '{absent[0]}'", folder.place,
                       f"keys {', '.join(facts.needed)}")  # fmt: skip
        found.setdefault(name, []).append(config)
    for name in (LORA.name, PREFIX.name, PROMPT.name, REFT.name):
        if len(found.get(name, ())) > 1:
            raise fail("E431", f"the union has several configs of '{name}'", folder.place, "one of each at most")
    return {FACTS[name]: configs for name, configs in found.items()}


def modules_of(
    folder: AdapterFolder, configs: Mapping[Facts, list[Config]], base: Base, quirks: Quirks
) -> list[Module]:
    """All modules of a folder, its head left aside.

    Raises:
        PeltError: E432, E433, E437.
    """
    kinds = {kind for facts in configs for kind in facts.kinds} | {SHARED}
    if left := [part for part in folder.parts if part.kind not in kinds]:
        raise fail("E433", f"{len(left)} parts are of no method that the config names: {named(left)}",
                   Place(str(folder.path)), "a file each of whose tensors is used once")  # fmt: skip
    shared = {name for facts, of in configs.items() for config in of for name in facts.shared(config)}
    if extra := [name for part in folder.of(SHARED) for name in part.tensors if name not in shared]:
        raise fail("E433", f"{len(extra)} shared tensors are none of what the config says: {names(extra)}",
                   Place(str(folder.path)), "a file each of whose tensors is used once")  # fmt: skip
    places = Places(folder, base, quirks)
    return [module for facts, of in configs.items() for module in facts.modules(of, places)]
