"""What a model is, as far as neither its config nor the spec says it: an adapter's own head tells its labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peltc.compiler.base.source import vocabulary_of
from peltc.spec.diagnostics import Place, fail
from peltc.spec.formula.syntax import Name
from peltc.spec.specification import ModelChoice, Spec

HEAD, TABLE = "head", "embedding.word"


@dataclass(frozen=True)
class Told:
    """What an adapter tells of the model: the shapes of its tensors by name, and what its head calls its classes."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()


def choice_of(spec: Spec, known: Told, config: Mapping[str, Any]) -> ModelChoice:
    """What a spec says of the model, and what an adapter tells besides.

    Args:
        config: the config of the model's checkpoint.

    Raises:
        PeltError: E221 a vocabulary below the model's, or labels in another order than the adapter's.
    """
    choice = spec.model
    found = _whole_maps(spec, known.shapes)
    rows, vocabulary = found.get(HEAD, (None,))[0], found.get(TABLE, (None, None))[1]
    if choice.vocabulary is None and vocabulary is not None:
        choice = replace(choice, vocabulary=vocabulary)
    held, place = vocabulary_of(config), spec.places.get("model", Place(spec.path))
    if choice.vocabulary is not None and held is not None and choice.vocabulary < held:
        message = f"the vocabulary is {choice.vocabulary}, and the model's table of words has {held} rows"
        raise fail("E221", message, place, f"at least {held}")
    check_names(spec, known.labels, "the adapter was trained with")
    words = choice.vocabulary or held
    if choice.labels is None and rows is not None and len(known.labels) == rows:
        choice = replace(choice, labels=known.labels)
    elif choice.labels is None and rows is not None and rows != words and rows != _labels(config):
        choice = replace(choice, labels=rows)
    return choice


def _whole_maps(spec: Spec, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes [out, in] of the maps that attachments bring whole, by role."""
    found: dict[str, tuple[int, ...]] = {}
    for entry in spec.attach:
        for parameter in entry.method.parameters:
            if [Name("out"), Name("in")] == list(parameter.shape) and parameter.scope == "site":
                for role in (HEAD, TABLE):
                    if len(shape := shapes.get(f"{entry.name}.{role}.{parameter.name}", ())) == 2:
                        found[role] = shape
    return found


def _labels(config: Mapping[str, Any]) -> int:
    """How many labels a config tells of; two where it says nothing, as in `transformers`."""
    named = config.get("id2label")
    return len(named) if isinstance(named, Mapping) else int(config.get("num_labels") or 2)


def check_names(spec: Spec, labels: Sequence[str], what: str) -> None:
    """Whether a spec calls classes what they were called in training, where they had names.

    Raises:
        PeltError: E221.
    """
    named = spec.model.labels
    if not isinstance(named, tuple) or len(named) != len(labels) or named == tuple(labels):
        return
    if any(name != f"LABEL_{i}" for i, name in enumerate(labels)):
        i = next(i for i, name in enumerate(labels) if name != named[i])
        raise fail("E221", f"class {i} is called '{named[i]}', and {what} '{labels[i]}' there",
                   spec.places.get("model", Place(spec.path)), f"labels: [{', '.join(labels)[:200]}]")  # fmt: skip


def check_choice(spec: Spec, architecture: str, config: Mapping[str, Any]) -> None:
    """Whether a live model is what a spec says that it is.

    Raises:
        PeltError: E221 another class, other labels or another vocabulary.
    """
    choice, place = spec.model, spec.places.get("model", Place(spec.path))
    if choice.architecture and choice.architecture != architecture:
        raise fail("E221", f"the model is a {architecture}", place, choice.architecture)
    if choice.labels is not None and (found := _labels(config)) != len(choice.label_names or ()):
        raise fail("E221", f"the model has {found} labels", place, f"{len(choice.label_names or ())} labels",
                   f"load it with num_labels={len(choice.label_names or ())}")  # fmt: skip
    names = config.get("id2label")
    if isinstance(names, Mapping):
        check_names(spec, [str(name) for name in names.values()], "the model calls it")
    if choice.vocabulary is not None and (words := vocabulary_of(config)) != choice.vocabulary:
        raise fail("E221", f"the model's table of words has {words} rows", place, f"{choice.vocabulary} rows",
                   f"model.resize_token_embeddings({choice.vocabulary}) before modules are attached")  # fmt: skip
