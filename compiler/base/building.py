"""A base that is built: exported, surveyed, its parameters found in the checkpoint, written to the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peltc.compiler.export.exported import Exported
from peltc.compiler.export.refusals import (
    beyond_text,
    check_variant,
    model_class,
    through_text,
)
from peltc.compiler.files.cache import BUILDING, writable
from peltc.compiler.files.checkpoint import Checkpoint, is_float, spellings
from peltc.compiler.files.integrity import digesting
from peltc.compiler.files.packed import QUANTISED, UNDONE
from peltc.compiler.files.staging import staging
from peltc.compiler.survey.anatomy import Anatomy
from peltc.spec.diagnostics import Place, fail

if TYPE_CHECKING:
    pass
from peltc.compiler.base.base import ParameterInfo
from peltc.compiler.base.source import vocabulary_of
from peltc.compiler.files.talk import Talk


def build_base(
    folder: Path,
    config: Mapping[str, Any],
    architecture: str,
    chosen: bool,
    precision: str,
    variant: str,
    checkpoint: Checkpoint,
    home: Path,
    text_only: bool,
    talk: Talk,
) -> None:
    """Export, clean, survey, and move the result into the cache in one step."""
    from peltc.compiler.export.graph import export_graph

    cls = model_class(architecture, config, folder, chosen)
    check_variant(cls, variant, text_only, Place(str(folder)))
    beyond = beyond_text(cls) if text_only else []
    what = {"ids": f"the graph of {architecture}", "embeds": f"the graph of {architecture} on embedded tokens"}
    with staging(writable(home.parent), BUILDING) as built, digesting(checkpoint.files):
        talk(f"exporting {what.get(variant, f'the {variant} graph of {architecture}')}, once: the cache has none")
        with through_text(architecture, beyond):
            exported = export_graph(folder, config, cls, precision, variant, text_only)
        talk(exported.repeats)
        rows = vocabulary_of(config)
        parameters, unresolved = resolve(exported.parameters, exported.ties, exported.stem, checkpoint, rows)
        reason = ""
        if unresolved and checkpoint.packed:
            check_whole(parameters, checkpoint, architecture)
            parameters |= {name: ParameterInfo(exported.parameters[name], "") for name in unresolved}
        elif unresolved:
            absent = absent_parameters(folder, config, architecture, rows)
            if renamed := [name for name in unresolved if name not in absent]:
                reason = f"{len(renamed)} parameters are renamed or merged in the checkpoint, first '{renamed[0]}'"
                parameters = {name: ParameterInfo(shape, name) for name, shape in exported.parameters.items()}
            parameters |= {name: ParameterInfo(exported.parameters[name], "") for name in unresolved if name in absent}
        write_base(exported, parameters, architecture, reason, built, beyond)
        try:
            built.rename(home)
        except OSError:
            if not (home / "base.json").is_file():  # another process was first otherwise
                raise


def write_base(
    exported: Exported,
    parameters: Mapping[str, ParameterInfo],
    architecture: str,
    reason: str,
    home: Path,
    beyond: Sequence[str] = (),
) -> Anatomy:
    """Survey an exported graph, and write it, its anatomy and the record into a folder.

    Args:
        reason: why the checkpoint's tensors are not the graph's parameters, or empty.
        beyond: inputs that the graph does not have since its text alone was asked for.
    """
    import onnx_ir as ir

    from peltc.compiler.base.limits import graph_limits
    from peltc.compiler.graphs.wide import hold
    from peltc.compiler.survey.sites import survey_graph

    anatomy = survey_graph(exported.model, exported.parameters, exported.ties, exported.senses)
    wide = {value.name for value in exported.model.graph.inputs if value.dtype == ir.DataType.FLOAT}
    hold(exported.model.graph)
    ir.save(exported.model, home / "graph.onnx")
    (home / "anatomy.json").write_text(json.dumps(anatomy.to_json()), encoding="utf-8")
    record = {
        "architecture": architecture,
        "parameters": {name: {**asdict(info), "wide": name in wide} for name, info in parameters.items()},
        "materialise": reason,
        "beyond": [*beyond],
        "reading": exported.reading.to_json() if exported.reading else None,
        "export": exported.metadata,
        "limits": graph_limits(home / "graph.onnx", exported.parameters),
        "repeats": exported.repeats,
    }
    (home / "base.json").write_text(json.dumps(record), encoding="utf-8")
    return anatomy


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def resolve(
    shapes: Mapping[str, tuple[int, ...]],
    ties: Mapping[str, tuple[str, ...]],
    stem: str,
    checkpoint: Checkpoint,
    rows: int | None = None,
) -> tuple[dict[str, ParameterInfo], list[str]]:
    """Which stored tensor holds each parameter, and the parameters that none holds as it is. A table that was made
    longer is held by a tensor with fewer rows.

    Args:
        shapes: parameters of the model by name.
        ties: names that share one tensor with a parameter.
        stem: what precedes the base model's names in a task model.
        rows: how many rows a table may have that was made longer.
    """
    found: dict[str, ParameterInfo] = {}
    missing = []
    for name, shape in shapes.items():
        names = [s for n in (name, *ties.get(name, ())) for s in spellings(n, stem)]
        there = [s for s in names if s in checkpoint.tensors]
        held = [s for s in there if checkpoint.tensors[s].shape == shape]
        held = held or [s for s in there if is_shorter(checkpoint.tensors[s].shape, shape, rows)]
        if held and is_float(checkpoint.tensors[held[0]].dtype):
            found[name] = ParameterInfo(shape, held[0])
        else:
            missing.append(name)
    return found, missing


def is_shorter(stored: tuple[int, ...], shape: tuple[int, ...], rows: int | None) -> bool:
    """Whether a stored shape is that of a table before it was made `rows` long."""
    return bool(stored) and stored[1:] == shape[1:] and stored[0] < shape[0] == rows


def check_whole(parameters: Mapping[str, ParameterInfo], checkpoint: Checkpoint, architecture: str) -> None:
    """Whether each packed weight of a checkpoint is a parameter as the model has it.

    Raises:
        PeltError: E508 one is renamed, merged with others, or of another shape there.
    """
    used = {info.stored for info in parameters.values()}
    lost = next((n for n, t in checkpoint.tensors.items() if isinstance(t, QUANTISED) and n not in used), None)
    if lost is not None:
        raise fail("E508", f"the checkpoint is quantised ({checkpoint.packed[0]}, {checkpoint.packed[2]} bits), and"
                   f" '{lost}' {list(checkpoint.tensors[lost].shape)} is no parameter of {architecture} as it is",
                   Place(str(checkpoint.folder)), "the model's own names and shapes", UNDONE)  # fmt: skip


def absent_parameters(
    folder: Path, config: Mapping[str, Any], architecture: str, rows: int | None = None
) -> frozenset[str]:
    """The parameters of an architecture that a checkpoint does not hold, or holds in another shape. `transformers`
    itself is asked, since a checkpoint may call them by other names. No weight is kept in memory.

    Args:
        rows: how many rows a table may have that was made longer; such a table is there.

    Raises:
        PeltError: E504 `transformers` cannot load the checkpoint as this architecture.
    """
    import transformers

    from peltc.compiler.export.torch_model import parse_config, quiet

    try:
        with quiet():
            _, report = getattr(transformers, architecture).from_pretrained(
                folder, config=parse_config(config), device_map="meta", ignore_mismatched_sizes=True,
                output_loading_info=True)  # fmt: skip
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise fail("E504", f"the checkpoint cannot be loaded as {architecture}: {reason}", Place(str(folder)),
                   "a checkpoint of this architecture", "name the class that was trained by --architecture"
                   ) from error  # fmt: skip
    shorter = {name for name, held, shape in report["mismatched_keys"] if is_shorter(tuple(held), tuple(shape), rows)}
    return frozenset(report["missing_keys"]) | {name for name, *_ in report["mismatched_keys"]} - shorter
