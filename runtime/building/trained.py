"""An adapter's tensors for a plan: from the spec's file, from another, from a live model; and what their file says."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.adapter.identity import BaseRecord, public_name, stored_record, stored_samples
from peltc.compiler.adapter.mathematics import Mathematics, mathematics, whole_digest
from peltc.compiler.adapter.provenance import (
    DIGEST,
    check_file,
    from_files,
    other_mathematics,
    provenance,
    read_provenance,
    silent_about,
)
from peltc.compiler.adapter.weights import check_arrays, inside, load_tensors, overridden, start_tensors
from peltc.compiler.artifact import (
    COMPANIONS,
    link,
)
from peltc.compiler.base.base import Base
from peltc.compiler.export.exported import GRAPHS
from peltc.compiler.files.checkpoint import MODULES, read_header
from peltc.compiler.files.manifest import ADAPTER, CACHE, MANIFEST
from peltc.compiler.files.talk import Talk
from peltc.compiler.passes.absent import heads_of
from peltc.compiler.plan.choice import Told
from peltc.compiler.plan.claims import Plan
from peltc.spec.diagnostics import PeltError, Place, fail
from peltc.spec.method import START
from peltc.spec.specification import Spec

Array = np.ndarray[Any, Any]
NEW = 0.02
"""The standard deviation of a new head, as `transformers` draws it."""


@dataclass(frozen=True)
class Live:
    """What a live model's attached modules hold and compute."""

    tensors: Mapping[str, Array]
    mathematics: Mathematics


Weights = str | Path | Mapping[str, Array] | Live | None


def told(spec: Spec, weights: str | Path | Mapping[str, Array] | None) -> Told:
    """What the modules' tensors tell of the model, as far as a file or arrays are given."""
    if isinstance(weights, Mapping):
        return Told({name: np.shape(array) for name, array in weights.items()})
    file = weights_file(spec, weights)
    return Told() if file is None else told_by(file)


def told_by(file: Path) -> Told:
    """What an adapter's file tells of the model."""
    said = read_provenance(file)
    labels = said.base.labels if said is not None and said.base is not None else ()
    return Told({name: tensor.shape for name, tensor in read_header(file).items()}, labels)


def weights_file(spec: Spec, weights: str | Path | None) -> Path | None:
    """The file with the weights: the one given, or the spec's own.

    Raises:
        PeltError: E406 the spec's leads out of its folder.
    """
    if weights is None and spec.weights:
        return inside(spec.folder, spec.weights, spec.path)
    return None if weights is None else Path(weights)


def adapter_tensors(
    plan: Plan, base: Base, weights: Weights, talk: Talk
) -> tuple[dict[str, Array], str, frozenset[str]]:
    """The adapter's tensors, where they come from, and which stand in place of the spec's own sources.

    Raises:
        PeltError: what is wrong with the tensors; E408 they were trained with other mathematics than the plan's.
    """
    if isinstance(weights, Live):
        own = mathematics(plan, frozenset(weights.tensors), from_files(plan))
        if own.digest != weights.mathematics.digest:
            raise PeltError(other_mathematics(plan, "the model with modules attached", weights.mathematics, own))
        weights = weights.tensors
    if isinstance(weights, Mapping):
        return check_arrays(plan, weights), "arrays", overridden(plan, weights)
    weights = weights_file(plan.spec, weights)
    if weights is not None:
        here = BaseRecord(base.architecture, public_name(str(base.folder)))
        sentences = check_file(plan, weights, here, stored_samples(base))
        tensors = load_tensors(plan, weights)
        for sentence in sentences:
            talk(f"warning: {sentence}")
        return tensors, weights.name, overridden(plan, read_header(weights))
    inside_model = {n.removeprefix(MODULES): t for n, t in base.checkpoint.tensors.items() if n.startswith(MODULES)}
    if inside_model:  # the model was saved with its modules attached
        talk("the modules' tensors are those in the checkpoint")
        digest = inside_model.pop(DIGEST, None)
        if digest is None:
            talk(f"warning: {silent_about(base.folder)}")
        elif np.asarray(digest.array()).tobytes().hex() != whole_digest(plan):
            raise PeltError(other_mathematics(plan, f"what '{base.folder.name}' holds", None, None))
        arrays = {n.replace("/", "."): t.array() for n, t in inside_model.items()}
        return check_arrays(plan, arrays), "checkpoint", overridden(plan, arrays)
    if plan.tensors:
        talk("warning: no weights given; the modules have their start values")
    return start_tensors(plan, partial(_held, base, plan)), "start values", frozenset()


def _held(base: Base, plan: Plan, name: str) -> Array:
    """A parameter that a start value reads. What the checkpoint lacks, a module of the plan brings: its trained values
    alone can stand there. A head with room for the labels of many profiles is nobody's: there it is random, as a new
    head is.

    Raises:
        PeltError: E504 the checkpoint lacks it.
    """
    if base.lacks(name) and name in {own for claim in heads_of(plan) for own in claim.site.parameters.values()}:
        draw = np.random.default_rng([plan.spec.seed, zlib.crc32(name.encode())])
        return draw.normal(0.0, NEW, base.parameters[name].shape).astype(np.float32)
    if base.lacks(name):
        raise fail("E504", f"the checkpoint lacks '{name}', which a module of the spec brings once it is trained",
                   Place(str(base.folder)), "the adapter's tensors, where the trained values are",
                   "give the trained adapter by --weights, or under `weights:` in the spec")  # fmt: skip
    return base.whole(name)


def kept_provenance(plan: Plan, base: Base, weights: Weights, own: frozenset[str]) -> dict[str, str]:
    """What the adapter's file in the artifact says of how it was trained: nothing where nobody knows."""
    held = frozenset(name for name, tensor in plan.tensors.items() if not tensor.source or name in own)
    trained_on = None
    if isinstance(weights, Live):
        trained_on = stored_record(base)
    elif not isinstance(weights, Mapping) and (file := weights_file(plan.spec, weights)) is not None:
        said = read_provenance(file)
        trained_on = said.base if said is not None else None
    if trained_on is None:
        return {}
    return provenance(mathematics(plan, held, from_files(plan)), trained_on).metadata()


def sources(plan: Plan, own: frozenset[str]) -> list[str]:
    """The files that a plan's tensors are read from."""
    return sorted({t.source for t in plan.tensors.values() if t.name not in own} - {"", START})


def check_sources(plan: Plan, base: Base, own: frozenset[str]) -> None:
    """Whether the files that a spec names can lie in an artifact, under their names.

    Raises:
        PeltError: E406.
    """
    taken = {ADAPTER, MANIFEST, "model.onnx", "model.onnx.data", "export.json", CACHE, *COMPANIONS}
    taken |= {f"{name}.onnx" for name in GRAPHS}
    taken |= {file.name for file in base.checkpoint.files}
    for name in sources(plan, own):
        if Path(name).is_absolute() or ".." in Path(name).parts or name in taken:
            raise fail("E406", f"the file '{name}' cannot be kept in the artifact under this name",
                       Place(plan.spec.path), "a relative path, and none that the artifact uses itself")  # fmt: skip


def save_adapter(
    folder: Path,
    plan: Plan,
    tensors: Mapping[str, Array],
    own: frozenset[str] = frozenset(),
    copy: bool = False,
    said: dict[str, str] | None = None,
) -> None:
    """Keep the adapter's tensors in the artifact, with what is `said` of how they were trained, and the files that the
    spec names: it can be verified again."""
    from safetensors.numpy import save

    kept = [name for name, t in plan.tensors.items() if not t.source or name in own]
    (folder / ADAPTER).write_bytes(save({name: np.ascontiguousarray(tensors[name]) for name in kept}, said or None))
    for name in sources(plan, own):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        link(inside(plan.spec.folder, name, plan.spec.path, "bank.file"), target, copy)
