"""Prediction heads that the `adapters` library saved beside an adapter: of a class of `transformers`, by the names of
its own modules. Modules whose values are the base's own, as a language model's head that nobody trained, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from peltc.compiler.base.base import Base
from peltc.compiler.importers.adapters_folder import AdapterFolder
from peltc.compiler.importers.formats import Array, Entry, own_rows
from peltc.compiler.importers.modules import Module
from peltc.compiler.importers.stored import Stored
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import fail
from peltc.spec.specification import ModelChoice

OWN_CLASSES = ("AdapterModel", "ModelWithHeads")
"""How the library's own classes end, whose heads are not those of `transformers`."""
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
FLEXIBLE = "its heads are built anew, and no class of transformers is known to compute the same"
HINT = "save the adapter with `with_head=False`, or train it on a class of transformers, after `adapters.init(model)`"


def choice_of(folder: AdapterFolder, config: Mapping[str, Any]) -> ModelChoice:
    """The class that the head is of, and how many labels it has.

    Args:
        config: the base's.

    Raises:
        PeltError: E431 a head of a class of the library's own.
    """
    if folder.head is None:
        return ModelChoice()
    said = folder.head.config.get("model_class")
    if not isinstance(said, str) or not said.isidentifier():
        raise fail("E430", "the head's config names no class", folder.head.place, "a key 'model_class'")
    if said.endswith(OWN_CLASSES):
        raise fail("E431", f"the head is of the class {said[:60]}: {FLEXIBLE}", folder.head.place,
                   "a head of a class of transformers", HINT)  # fmt: skip
    named = config.get("architectures") or []
    own = str(named[0]) if isinstance(named, list) and named else ""
    labels = folder.head.config.get("num_labels") if said.endswith(CLASSIFIERS) else None
    if labels is not None and (not isinstance(labels, int) or isinstance(labels, bool) or not 0 < labels < 2**20):
        raise fail("E430", f"'num_labels' is {labels!r:.60}", folder.head.place, "how many labels there are")
    return ModelChoice("" if said == own else said, labels)


def head_modules(folder: AdapterFolder, base: Base) -> list[Module]:
    """The modules of a folder's head.

    Raises:
        PeltError: E433 tensors that are no map's of the model, and not the base's own.
    """
    if folder.head is None:
        return []
    by_module: dict[str, dict[str, Stored]] = {}
    for name, stored in folder.head.tensors.items():
        module, _, leaf = name.rpartition(".")
        by_module.setdefault(module, {})[leaf] = stored
    found: list[Module] = []
    for module, tensors in by_module.items():
        arrays = {leaf: np.asarray(stored.array(), np.float32) for leaf, stored in tensors.items()}
        if all(_same(base, f"{module}.{leaf}" if module else leaf, array) for leaf, array in arrays.items()):
            continue
        sites = _sites(base, module)
        if not sites:
            told = f"'{module[:120]}' of the head is no linear map of the {base.architecture}, and was trained"
            raise fail("E433", told, folder.head.place, "a head of linear maps", HINT)  # fmt: skip
        found += [Module(site, Entry("replace"), _own(site, arrays), module) for site in sites]
    return found


def _sites(base: Base, module: str) -> list[Site]:
    return [s for s in base.anatomy if s.kind == "linear" and s.parameters["weight"] == f"{module}.weight"]


def _own(site: Site, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """A map's own weight [O, I] and bias [O]; of a fused map, a site's own rows."""
    turned = {n: array.T if n == "weight" and site.transposed else array for n, array in arrays.items()}
    return {name: own_rows(array, site) for name, array in turned.items()}


def _same(base: Base, name: str, array: Array) -> bool:
    """Whether a parameter of the base has these values."""
    if name not in base.parameters or base.lacks(name):
        return False
    return bool(np.array_equal(np.asarray(base.stored(name).array(), np.float32), array))
