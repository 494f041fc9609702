"""Prediction heads that the `adapters` library saved beside an adapter.

A class of `transformers` has its own head, by the names of its own modules; what of it has the base's own values, as a
language model's head that nobody trained, is left out. The library's own classes have heads of layers by their numbers,
`heads.NAME.1.weight`: such a head is imported where the graph of a class of `transformers` computes the same, map by
map and activation by activation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peltc.compiler.base.base import Base
from peltc.compiler.importers.adapters.folder import AdapterFolder, Head
from peltc.compiler.importers.adapters.structure import reads_first, reads_stream, through
from peltc.compiler.importers.formats import Array, Entry, own_rows
from peltc.compiler.importers.modules import Module
from peltc.compiler.importers.stored import Stored
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import PeltError, fail
from peltc.spec.specification import ModelChoice

OWN_CLASSES = ("AdapterModel", "ModelWithHeads")
"""How the library's own classes end."""
ENDINGS = {"classification": "ForSequenceClassification", "multilabel_classification": "ForSequenceClassification",
           "tagging": "ForTokenClassification", "question_answering": "ForQuestionAnswering"}  # fmt: skip
"""How the classes of `transformers` end that may compute the same as the library's heads."""
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
HINT = "save the adapter with `with_head=False`, or train it on a class of transformers, after `adapters.init(model)`"
MAX_LABELS = 2**20


def choice_of(folder: AdapterFolder, config: Mapping[str, Any]) -> ModelChoice:
    """The class that the head is of, and how many labels it has.

    Args:
        config: the base's.

    Raises:
        PeltError: E430 a head that names no class; E431 one that no class of transformers has.
    """
    if folder.head is None:
        return ModelChoice()
    head = folder.head
    said = head.config.get("model_class")
    if not isinstance(said, str) or not said.isidentifier():
        raise fail("E430", "the head's config names no class", head.place, "a key 'model_class'")
    wanted, labels = said, head.config.get("num_labels")
    if own := next((ending for ending in OWN_CLASSES if said.endswith(ending)), ""):
        flexible = flexible_config(head)
        wanted, labels = said.removesuffix(own) + ENDINGS[flexible["head_type"]], flexible.get("num_labels")
    if not wanted.endswith(CLASSIFIERS):
        labels = None
    if labels is not None and (not isinstance(labels, int) or isinstance(labels, bool) or not 0 < labels <= MAX_LABELS):
        raise fail("E430", f"'num_labels' is {labels!r:.60}", head.place, "how many labels there are")
    named = config.get("architectures") or []
    own_class = str(named[0]) if isinstance(named, list) and named else ""
    return ModelChoice("" if wanted == own_class else wanted, labels)


def flexible_config(head: Head) -> Mapping[str, Any]:
    """What a head of the library's own says of itself.

    Raises:
        PeltError: E431 it is of a kind that no class of transformers is known to have.
    """
    config = head.config.get("config")
    kind = config.get("head_type") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or kind not in ENDINGS:
        raise fail("E431", f"a head of the kind {kind!r:.60} in the library's own class", head.place,
                   f"one of {', '.join(ENDINGS)}", HINT)  # fmt: skip
    return config


def head_modules(folder: AdapterFolder, base: Base) -> list[Module]:
    """The modules of a folder's head.

    Raises:
        PeltError: E431 a head that the model does not compute; E433 tensors that are no map's of the model, and not the
            base's own.
    """
    if folder.head is None:
        return []
    if str(folder.head.config.get("model_class")).endswith(OWN_CLASSES):
        return _flexible(folder.head, base)
    found: list[Module] = []
    for module, tensors in _by_module(folder.head.tensors).items():
        arrays = {leaf: np.asarray(stored.array(), np.float32) for leaf, stored in tensors.items()}
        if all(_same(base, f"{module}.{leaf}" if module else leaf, array) for leaf, array in arrays.items()):
            continue
        sites = [s for s in base.anatomy if s.kind == "linear" and s.parameters["weight"] == f"{module}.weight"]
        if not sites:
            told = f"'{module[:120]}' of the head is no linear map of the {base.architecture}, and was trained"
            raise fail("E433", told, folder.head.place, "a head of linear maps", HINT)
        found += [Module(site, Entry("replace"), _own(site, arrays), module) for site in sites]
    return found


def _by_module(tensors: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    found: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        module, _, leaf = name.rpartition(".")
        found.setdefault(module, {})[leaf] = stored
    return found


def _flexible(head: Head, base: Base) -> list[Module]:
    """The maps of a head of the library's own, at the sites of the class that computes the same."""
    config = flexible_config(head)
    start = f"heads.{head.config.get('name')}."
    parts = _by_module(head.tensors)
    numbers = sorted(parts, key=lambda name: (len(name), name))
    if not all(name.startswith(start) and name.removeprefix(start).isdigit() for name in numbers):
        raise fail("E433", "the head has tensors that are none of its layers", head.place, f"'{start}NUMBER.weight'")
    sites = _same_head(config, base, head)
    if len(sites) != len(numbers):
        raise fail("E433", f"the head has {len(numbers)} maps", head.place, f"{len(sites)}, as its config says")
    found = []
    for name, site in zip(numbers, sites, strict=True):
        arrays = {leaf: np.asarray(stored.array(), np.float32) for leaf, stored in parts[name].items()}
        if "weight" in arrays and "bias" in site.parameters:
            arrays.setdefault("bias", np.zeros(arrays["weight"].shape[:1], np.float32))
        found.append(Module(site, Entry("replace"), _own(site, arrays), name))
    return found


def _same_head(config: Mapping[str, Any], base: Base, head: Head) -> Sequence[Site]:
    """The maps of the model that compute what a head of the library's own does, in their order.

    Raises:
        PeltError: E431 the model computes something else.
    """
    by_role = {site.role: site for site in base.anatomy if site.kind == "linear" and site.layer is None}
    last, dense = by_role.get("head"), by_role.get("pooler")
    if last is None:
        raise _other(base, head, "it has no head")
    graph, layers = base.load_graph().graph, config.get("layers")
    if ENDINGS[config["head_type"]] != "ForSequenceClassification":
        if layers != 1 or not reads_stream(graph, last, base):
            raise _other(base, head, "its head is not one map of each token")
        return [last]
    if config.get("use_pooler"):
        inner = next(iter(base.anatomy.select(["*attention.query"])), None)
        stem = inner.parameters["weight"].partition(".")[0] if inner else ""
        if layers != 1 or dense is None or not dense.parameters["weight"].startswith(f"{stem}."):
            raise _other(base, head, "its head is not one map behind the model's own pooler")
        return [last]
    if layers == 1 and reads_first(graph, last):
        return [last]
    if layers == 2 and dense is not None and reads_first(graph, dense):
        if through(graph, dense, last, config.get("activation_function")):
            return [dense, last]
        raise _other(base, head, f"no {config.get('activation_function')!r:.40} stands between its maps")
    raise _other(base, head, f"its head is not {layers!r:.40} maps of the first token")


def _other(base: Base, head: Head, why: str) -> PeltError:
    return fail("E431", f"the {base.architecture} does not compute what the head does: {why}", head.place,
                "a head that a class of transformers has", HINT)  # fmt: skip


def _own(site: Site, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """A map's own weight [O, I] and bias [O]; of a fused map, a site's own rows."""
    turned = {n: array.T if n == "weight" and site.transposed else array for n, array in arrays.items()}
    return {name: own_rows(array, site) for name, array in turned.items()}


def _same(base: Base, name: str, array: Array) -> bool:
    """Whether a parameter of the base has these values."""
    if name not in base.parameters or base.lacks(name):
        return False
    return bool(np.array_equal(np.asarray(base.stored(name).array(), np.float32), array))
