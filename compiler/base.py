"""The base: a model's ONNX graph without its weights, and where each weight lies.

    MODEL (folder or hub id) ── config, headers ──► fingerprint ──► cache hit: read graph and anatomy (no torch)
                                                         └────────► miss: export on parameters without memory, survey

    torch module, example inputs ── export over its own memory, survey ──► the same, in a folder of the caller's

A cached base is a folder `<cache>/bases/<key>/` with `graph.onnx` (parameters are graph inputs there), `base.json`
and `anatomy.json`. Where the checkpoint's tensors are not the model's own (renamed, merged, pickled), they are
written once into `<cache>/weights/<key>/` and referenced from there. The base of a torch module that `transformers`
does not have is never cached: its code may change, so that only the exported graph itself could be the key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peltc.compiler.anatomy import Anatomy
from peltc.compiler.cache import BUILDING, cache_folder, tidy_cache, writable
from peltc.compiler.checkpoint import DTYPES, Checkpoint, StoredTensor, is_float, open_checkpoint, spellings
from peltc.compiler.integrity import digesting
from peltc.compiler.refusals import (
    beyond_text,
    check_reads,
    check_stored,
    check_text,
    model_class,
    through_text,
    towers,
)
from peltc.compiler.staging import staging
from peltc.spec.diagnostics import PeltError, Place, fail, nearest
from peltc.spec.foreign import refuse
from peltc.spec.specification import AS_IT_SAYS, ModelChoice

if TYPE_CHECKING:
    import onnx_ir as ir

    from peltc.compiler.export import Exported

FORMAT = 13
TOOLS = ("torch", "transformers", "onnx-ir", "onnxscript")
VOLATILE = ("_name_or_path", "transformers_version", "_attn_implementation", "torch_dtype", "dtype", "use_cache")
OPSET = 20
ALIASES = "tied.json"
IR_VERSION = 10

Talk = Callable[[str], None]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter of the model: its shape, and the name in the checkpoint of the tensor that holds it, which may have
    fewer rows; an empty name where no tensor does."""

    shape: tuple[int, ...]
    stored: str


@dataclass(frozen=True)
class Base:
    """What the compiler knows of a model.

    Attributes:
        folder: the model's folder (config, tokenizer).
        architecture: the class of `transformers`; with its module's path where it is another.
        config: the model's config, as JSON, with what was chosen in place of what the folder says; empty where it has
            none.
        precision: the type in which the graph computes, `float32`.
        variant: `ids` where the graph reads token ids, `embeds` where it reads embedded tokens.
        fingerprint: identifies architecture, config and weights.
        parameters: every parameter of the graph by its fully qualified name.
        checkpoint: where the weights lie.
        anatomy: the sites.
        export: what `transformers` recorded about the export.
        limits: what the graph can be given: see `limits.graph_limits`.
        graph_file: the graph; its parameters are inputs.
        converted: whether the weights had to be written out, and why.
        module: the live torch module, where the base is of one that `transformers` does not have.
        inputs: what the examples were like from which it was exported, by input name; see `describe_inputs`.
        changed: whether the config says something else than that in the folder.
        text_only: whether the model reads more than text, and its text alone was asked for.
    """

    folder: Path
    architecture: str
    config: Mapping[str, Any]
    precision: str
    variant: str
    fingerprint: str
    parameters: Mapping[str, ParameterInfo]
    checkpoint: Checkpoint
    anatomy: Anatomy
    export: Mapping[str, Any]
    limits: Mapping[str, Any]
    graph_file: Path
    converted: str = ""
    module: Any = None
    inputs: Mapping[str, Mapping[str, Any]] | None = None
    changed: bool = False
    text_only: bool = False

    def stored(self, name: str) -> StoredTensor:
        """Where a parameter's values lie; see `lacks`.

        Raises:
            PeltError: E504 the checkpoint has no such tensor.
        """
        found = self.checkpoint.tensors.get(self.parameters[name].stored)
        if found is None:
            raise missing_weights([name], self.checkpoint, self.folder)
        return found

    def lacks(self, name: str) -> range:
        """The rows of a parameter that the checkpoint does not hold: none, the last ones, or all of them."""
        parameter = self.parameters[name]
        stored = self.checkpoint.tensors.get(parameter.stored)
        rows = parameter.shape[0] if parameter.shape else 1
        return range(0 if stored is None else stored.shape[0] if stored.shape else 1, rows)

    def whole(self, name: str) -> Array:
        """A parameter's values, all of which the checkpoint holds.

        Raises:
            PeltError: E504 it does not.
        """
        if self.lacks(name):
            raise missing_weights([name], self.checkpoint, self.folder)
        return self.stored(name).array()

    def array(self, name: str, fill: float = 0.0) -> Array:
        """A parameter's values, mapped from the file; a copy with `fill` in the rows that the checkpoint lacks."""
        parameter, lacking = self.parameters[name], self.lacks(name)
        if not lacking:
            return self.stored(name).array()
        if not lacking.start:
            return np.full(parameter.shape, fill, np.float32)
        held = self.stored(name).array()
        return np.concatenate([held, np.full((len(lacking), *parameter.shape[1:]), fill, held.dtype)])

    def load_graph(self) -> ir.Model:
        """A fresh copy of the graph, to rewrite. Its parameters are graph inputs."""
        import onnx_ir as ir

        from peltc.compiler.wide import unhold

        model = ir.load(self.graph_file)
        unhold(model.graph)
        return model


def find_model(model: str | Path) -> Path:
    """The folder of a model: a local one, or a snapshot of a hub repository.

    Raises:
        PeltError: E501 neither a folder nor to be had from the hub; E410 another library's adapter.
    """
    refuse(model, "the model")
    folder = Path(model)
    if folder.is_dir():
        return folder.resolve()
    if folder.exists() or str(model).startswith((".", "/", "~")):
        raise fail("E501", "there is no such model folder", Place(str(model)), "a folder with a config.json")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "pytorch_model*.bin"]
        folder = Path(snapshot_download(str(model), allow_patterns=patterns))
    except Exception as error:
        detail = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise fail(
            "E501",
            f"'{model}' is neither a folder nor to be had from the hub: {detail}",
            expected="a model folder, or a hub id such as 'organisation/model'",
        ) from None
    refuse(folder, "the model", Place(str(model)))
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.

    Raises:
        PeltError: E502 missing or malformed.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise fail(
            "E502", f"cannot read the model's config: {error.strerror}", Place(str(file)), "a model folder"
        ) from None
    except (ValueError, RecursionError) as error:
        raise fail("E502", f"the model's config is not JSON: {error}", Place(str(file)), "JSON") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise fail("E502", "the model's config names no model type", Place(str(file)), "a key 'model_type'")
    return config


def open_base(
    model: str | Path,
    *,
    architecture: str | None = None,
    choice: ModelChoice = AS_IT_SAYS,
    precision: str = "checkpoint",
    variant: str = "ids",
    text_only: bool = False,
    talk: Talk = lambda line: None,
) -> Base:
    """The base of a model, from the cache or built now.

    The checkpoint need not hold every parameter of the architecture: `Base.lacks` tells which are for modules to bring.

    Args:
        model: a model folder or a hub id.
        architecture: a class of `transformers`; that of the choice, or the config's own, where absent.
        choice: what the model is, where its config does not say it.
        precision: `checkpoint` keeps the stored type (bfloat16 is computed in float32), or a float type's name.
        variant: `ids`, `embeds` for a graph that reads embedded tokens, `decode` or `encoder` for those that generation
            takes. These share the parameters of `ids`, which alone says where all of them lie.
        text_only: compile a model that reads more than text through its text alone.
        talk: told what takes time.

    Raises:
        PeltError: E5xx what is wrong with the model, or why it cannot be exported.
    """
    folder = find_model(model)
    config = read_config(folder)
    check_stored(config, folder)
    named = config.get("architectures") or []
    own = str(named[0]) if isinstance(named, list) and named else None
    wanted = architecture or choice.architecture or None
    architecture, chosen = wanted or own, wanted not in (None, own)
    if architecture is None:
        raise fail(
            "E502",
            "the model's config names no architecture, so its task is not known",
            Place(str(folder / "config.json")),
            "a key 'architectures'",
            "give the class of transformers by --architecture",
        )
    before, config = config, chosen_config(config, architecture, choice)
    tidy_cache()
    checkpoint, converted = _checkpoint(folder, talk)
    stored = str(checkpoint.float_dtype)
    computed = {"checkpoint": "float32" if stored in ("bfloat16", "float64") else stored}.get(precision, precision)
    stable = {k: v for k, v in config.items() if k not in VOLATILE}
    versions = {tool: metadata.version(tool) for tool in TOOLS}
    facts = [FORMAT, OPSET, architecture, stable, computed, variant, checkpoint.header_digest, versions]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    home = cache_folder() / "bases" / key
    if not (home / "base.json").is_file():
        _build(folder, config, architecture, chosen, computed, variant, checkpoint, home, text_only, talk)
    record = json.loads((home / "base.json").read_text(encoding="utf-8"))
    beyond, parts = record["beyond"]
    check_text(architecture, beyond, parts, text_only, Place(str(folder)))
    if record["materialise"] and variant in ("ids", "embeds"):
        checkpoint, converted = _materialise(folder, architecture, checkpoint, record["materialise"], talk)
    stable_text = json.dumps(stable, sort_keys=True)
    return _read(
        home,
        folder=folder,
        architecture=architecture,
        config=config,
        precision=computed,
        variant=variant,
        fingerprint=hashlib.sha256((architecture + stable_text + checkpoint.fingerprint).encode()).hexdigest(),
        checkpoint=checkpoint,
        converted=converted,
        changed=config != before,
        text_only=bool(beyond),
    )


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """How many rows the table of words has, by a model's config."""
    inner = config.get("text_config")
    found = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, Mapping) else None)
    return found if isinstance(found, int) else None


def chosen_config(config: Mapping[str, Any], architecture: str, choice: ModelChoice) -> dict[str, Any]:
    """A model's config with what was chosen in place of what it says."""
    found = {**config, "architectures": [architecture]}
    if choice.label_names is not None:
        found["id2label"] = {str(i): name for i, name in enumerate(choice.label_names)}
        found["label2id"] = {name: i for i, name in enumerate(choice.label_names)}
        found.pop("num_labels", None)
    if choice.vocabulary is not None:
        inner = found.get("text_config")
        if "vocab_size" not in found and isinstance(inner, Mapping):
            found["text_config"] = {**inner, "vocab_size": choice.vocabulary}
        else:
            found["vocab_size"] = choice.vocabulary
    return found


def _read(home: Path, **known: Any) -> Base:
    """The base whose graph, anatomy and record lie in a folder; the rest is `known`."""
    record = json.loads((home / "base.json").read_text(encoding="utf-8"))
    return Base(
        parameters={n: ParameterInfo(tuple(p["shape"]), p["stored"]) for n, p in record["parameters"].items()},
        anatomy=Anatomy.from_json(json.loads((home / "anatomy.json").read_text(encoding="utf-8"))),
        export=record["export"],
        limits=record["limits"],
        graph_file=home / "graph.onnx",
        **known,
    )


def is_known(model: Any) -> bool:
    """Whether a torch model's class is one of `transformers`, by its name there: its graph is known by its config."""
    import transformers

    cls = type(model)
    return getattr(transformers, cls.__name__, None) is cls and hasattr(cls, "_from_config")


def module_base(
    module: Any,
    inputs: Mapping[str, Any] | None,
    folder: Path,
    *,
    precision: str = "checkpoint",
    variant: str = "ids",
    text_only: bool = False,
    talk: Talk = lambda line: None,
) -> Base:
    """The base of a live torch module that `transformers` does not have, built in a folder.

    The module's parameters are written there once, and its config where it has one; it is not touched.

    Args:
        inputs: example inputs by name, [B, S, ...]; those of a model of `transformers` where absent.
        folder: an empty folder, or that of another variant's base of the same module.
        precision: `checkpoint` keeps the type of the parameters (float32 where it is another than float32 and
            float16, or where they are of several), or a float type's name.
        variant: `ids`, or `embeds` for a graph that reads embedded tokens.
        text_only: as for `open_base`.
        talk: told what takes time.

    Raises:
        PeltError: E505 why the module cannot be exported; E506 what is wrong with the example inputs.
    """
    from peltc.compiler.export import replica

    stored = {str(p.dtype).removeprefix("torch.") for p in module.parameters()}
    computed = precision
    if precision == "checkpoint":
        computed = next(iter(stored)) if stored in ({"float32"}, {"float16"}) else "float32"
    architecture = f"{type(module).__module__}.{type(module).__qualname__}"
    beyond = [] if inputs else beyond_text(type(module))
    check_text(architecture, beyond, towers(getattr(module, "config", None)), text_only, None)
    talk(f"exporting the graph of {architecture}")
    exported = _export_module(replica(module, computed), inputs, variant)
    talk(exported.repeats)
    if not (folder / "model.safetensors").is_file():
        write_tensors({name: p.detach() for name, p in module.named_parameters()}, folder / "model.safetensors")
    config: dict[str, Any] = {}
    if hasattr(getattr(module, "config", None), "to_json_string"):
        config = json.loads(module.config.to_json_string(use_diff=False)) | {"architectures": [type(module).__name__]}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    checkpoint = open_checkpoint(folder)
    parameters, lost = resolve(exported.parameters, exported.ties, "", checkpoint)
    assert not lost, lost
    home = folder / variant
    home.mkdir()
    anatomy = _write(exported, parameters, architecture, "", home)
    facts = architecture + _digest(home / "graph.onnx") + checkpoint.fingerprint
    return _read(
        home,
        folder=folder,
        architecture=architecture,
        config=config,
        precision=computed,
        variant=variant,
        fingerprint=hashlib.sha256(facts.encode()).hexdigest(),
        checkpoint=checkpoint,
        module=module,
        inputs=describe_inputs(inputs, anatomy) if inputs else {},
        text_only=bool(beyond),
    )


def _export_module(module: Any, inputs: Mapping[str, Any] | None, variant: str = "ids") -> Exported:
    """Export a replica of a torch module that `transformers` does not have."""
    import inspect

    from peltc.compiler.export import check_inputs, export_model, is_pretrained

    if variant == "embeds" and not (
        is_pretrained(module) and "inputs_embeds" in inspect.signature(module.forward).parameters
    ):
        raise fail("E505", f"{type(module).__name__} cannot be exported with embedded tokens as its input",
                   expected="a model of transformers whose forward takes 'inputs_embeds'",
                   hint="tokens before the sequence (`prepend`) need it; prefixes in the attention do not")  # fmt: skip
    if not inputs and is_pretrained(module):
        check_reads(type(module))
    if variant == "embeds" or (not inputs and is_pretrained(module)):
        return export_model(module, variant)
    return export_model(module, inputs=check_inputs(module, inputs))


def describe_inputs(inputs: Mapping[str, Any], anatomy: Anatomy) -> dict[str, dict[str, Any]]:
    """What example inputs are like, so that others like them can be drawn: type, shape, what the axes are called, and
    the range of the values, which for tokens is the vocabulary."""
    import torch

    from peltc.compiler.export import axis_names

    tensors = {name: torch.as_tensor(value) for name, value in inputs.items()}
    axes = axis_names(tensors)
    vocabularies = {site.values.get("x"): site.sizes["in"] for site in anatomy if site.kind == "table"}
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        low, high = (float(v) if tensor.is_floating_point() else int(v) for v in (tensor.min(), tensor.max()))
        if name in vocabularies:
            low, high = 0, vocabularies[name] - 1
        found[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape),
                       "axes": list(axes[name]), "low": low, "high": high}  # fmt: skip
    return found


def survey_model(model: Any, inputs: Mapping[str, Any] | None = None) -> tuple[Anatomy, str]:
    """The anatomy of a torch model, and what identifies its kind. Kept in the cache for classes of `transformers`.

    Args:
        inputs: example inputs by name, for a module that `transformers` does not have.

    Raises:
        PeltError: E505 the model cannot be exported; E506 what is wrong with the example inputs; E410 a model with
            another library's modules in it.
    """
    refuse(model, "the model")
    if inputs or not is_known(model):
        from peltc.compiler.export import replica

        exported = _export_module(replica(model), inputs)
        with tempfile.TemporaryDirectory() as home:
            return _write(exported, {}, "", "", Path(home)), _digest(Path(home) / "graph.onnx")
    config = json.loads(model.config.to_json_string(use_diff=False))
    stable = {k: v for k, v in config.items() if k not in VOLATILE}
    architecture = type(model).__name__
    versions = {tool: metadata.version(tool) for tool in TOOLS}
    facts = [FORMAT, OPSET, architecture, type(model).__module__, stable, versions]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    file = cache_folder() / "anatomies" / f"{key[:24]}.json"
    if not file.is_file():
        from peltc.compiler.export import export_like
        from peltc.compiler.survey import survey_graph

        check_reads(type(model))
        writable(file.parent)
        exported = export_like(model)
        anatomy = survey_graph(exported.model, exported.parameters, exported.ties)
        written = file.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(anatomy.to_json()), encoding="utf-8")
        written.replace(file)
    return Anatomy.from_json(json.loads(file.read_text(encoding="utf-8"))), key


def _build(
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
    from peltc.compiler.export import export_graph, parse_config

    cls = model_class(architecture, config, folder, chosen)
    check_reads(cls, Place(str(folder)))
    beyond = beyond_text(cls)
    parts: list[str] = []
    if beyond:
        with contextlib.suppress(Exception):  # what is wrong with the config is told when the model is built
            parts = towers(parse_config(config))
    check_text(architecture, beyond, parts, text_only, Place(str(folder)))
    what = {"ids": "its graph", "embeds": "its graph on embedded tokens"}.get(variant, f"its {variant} graph")
    with staging(writable(home.parent), BUILDING) as built, digesting(checkpoint.files):
        talk(f"no base of {architecture} in the cache: exporting {what} once")
        with through_text(architecture, beyond):
            exported = export_graph(folder, config, cls, precision, variant)
        talk(exported.repeats)
        rows = vocabulary_of(config)
        parameters, unresolved = resolve(exported.parameters, exported.ties, exported.stem, checkpoint, rows)
        reason = ""
        if unresolved:
            absent = absent_parameters(folder, config, architecture, rows)
            if renamed := [name for name in unresolved if name not in absent]:
                reason = f"{len(renamed)} parameters are renamed or merged in the checkpoint, first '{renamed[0]}'"
                parameters = {name: ParameterInfo(shape, name) for name, shape in exported.parameters.items()}
            parameters |= {name: ParameterInfo(exported.parameters[name], "") for name in unresolved if name in absent}
        _write(exported, parameters, architecture, reason, built, (beyond, parts))
        try:
            built.rename(home)
        except OSError:
            if not (home / "base.json").is_file():  # another process was first otherwise
                raise


def _write(
    exported: Exported,
    parameters: Mapping[str, ParameterInfo],
    architecture: str,
    reason: str,
    home: Path,
    beyond: tuple[list[str], list[str]] = ([], []),
) -> Anatomy:
    """Survey an exported graph, and write it, its anatomy and the record into a folder.

    Args:
        reason: why the checkpoint's tensors are not the graph's parameters, or empty.
        beyond: inputs that the graph does not have since they are no text, and the parts of the config that read them.
    """
    import onnx_ir as ir

    from peltc.compiler.limits import graph_limits
    from peltc.compiler.survey import survey_graph
    from peltc.compiler.wide import hold

    anatomy = survey_graph(exported.model, exported.parameters, exported.ties)
    hold(exported.model.graph)
    ir.save(exported.model, home / "graph.onnx")
    (home / "anatomy.json").write_text(json.dumps(anatomy.to_json()), encoding="utf-8")
    record = {
        "architecture": architecture,
        "parameters": {name: asdict(info) for name, info in parameters.items()},
        "materialise": reason,
        "beyond": beyond,
        "export": exported.metadata,
        "limits": graph_limits(home / "graph.onnx", exported.parameters),
        "repeats": exported.repeats,
    }
    (home / "base.json").write_text(json.dumps(record), encoding="utf-8")
    return anatomy


def _digest(file: Path) -> str:
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


def absent_parameters(
    folder: Path, config: Mapping[str, Any], architecture: str, rows: int | None = None
) -> frozenset[str]:
    """The parameters of an architecture that a checkpoint does not hold, or holds in another shape, whatever they are
    called there: `transformers` knows. No weight is kept.

    Args:
        rows: how many rows a table may have that was made longer; such a table is there.

    Raises:
        PeltError: E504 `transformers` cannot load the checkpoint as this architecture.
    """
    import transformers

    from peltc.compiler.export import parse_config, quiet

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


def _checkpoint(folder: Path, talk: Talk) -> tuple[Checkpoint, str]:
    """The folder's safetensors, or its pickled checkpoint converted once."""
    pickled = [*folder.glob("pytorch_model*.bin")]
    if any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")) or not pickled:
        return open_checkpoint(folder), ""
    state = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(pickled)]
    key = hashlib.sha256(json.dumps([str(folder), state]).encode()).hexdigest()[:24]
    home = cache_folder() / "weights" / key
    why = "the checkpoint is pickled (.bin)"
    if not home.is_dir():
        import torch

        writable(home.parent)
        talk(f"{why}: converting it to safetensors once")
        tensors: dict[str, Any] = {}
        for file in sorted(pickled):
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
                if odd := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
                    raise TypeError(f"'{odd[0]}' is no tensor")
                tensors |= state
            except Exception as error:
                reason = (str(error) or type(error).__name__).splitlines()[0][:200]
                raise fail("E503", f"cannot read the pickled checkpoint: {reason}", Place(str(file)),
                           "plain tensors, which `weights_only` loading accepts") from None  # fmt: skip
        _save(tensors, home)
    return open_checkpoint(home), f"{why}: converted once to {home}"


def _materialise(
    folder: Path, architecture: str, checkpoint: Checkpoint, reason: str, talk: Talk
) -> tuple[Checkpoint, str]:
    """Write the parameters as the model class has them, once."""
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in map(Path.resolve, checkpoint.files)]
    facts = [FORMAT, architecture, checkpoint.fingerprint, state, {tool: metadata.version(tool) for tool in TOOLS}]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    home = cache_folder() / "weights" / key
    if not home.is_dir():
        import transformers

        writable(home.parent)
        talk(f"{reason}: writing the model's own tensors once")
        cls = getattr(transformers, architecture)
        model, report = cls.from_pretrained(folder, output_loading_info=True, dtype="auto")
        for name in report["missing_keys"]:  # what the architecture starts them with is nobody's
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = None
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        every = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        aliases = {name: kept for name, kept in every.items() if name != kept}
        _save({name: p.detach() for name, p in model.named_parameters()}, home, aliases)
    written = open_checkpoint(home)
    aliases = json.loads((home / ALIASES).read_text(encoding="utf-8"))
    tensors = {**written.tensors, **{name: written.tensors[kept] for name, kept in aliases.items()}}
    return replace(written, tensors=tensors), f"{reason}: written once to {home}"


def missing_weights(
    missing: list[str], checkpoint: Checkpoint, folder: Path, sites: Sequence[str] = ("head",)
) -> PeltError:
    """The error for parameters that a checkpoint lacks.

    Args:
        sites: where modules could bring them.
    """
    shown = ", ".join(missing[:6]) + (f", ... ({len(missing)} in all)" if len(missing) > 6 else "")
    where = ", ".join(f"'{site}'" for site in sites[:4])
    others = [name for name in checkpoint.tensors if name != missing[0]]
    return fail(
        "E504",
        f"the checkpoint lacks weights that the architecture needs: {shown}",
        Place(str(folder)),
        "a checkpoint of this architecture" + (f", or modules that bring these weights: `method: replace` at {where}"
                                               if where else ""),
        nearest(missing[0], others) or "name the class that was trained by --architecture",
    )  # fmt: skip


def _save(tensors: Mapping[str, Any], home: Path, aliases: Mapping[str, str] | None = None) -> None:
    """Write tensors into a new folder; `aliases` are other names of tied ones."""
    with staging(writable(home.parent), BUILDING) as folder:
        write_tensors(tensors, folder / "model.safetensors")
        (folder / ALIASES).write_text(json.dumps(dict(aliases or {})), encoding="utf-8")
        folder.rename(home)


def write_tensors(tensors: Mapping[str, Any], file: Path) -> None:
    """Write torch tensors as safetensors, one after the other: `safetensors` itself wants all of them at once, none
    sharing memory with another, and so a copy of each that does.

    Raises:
        PeltError: E503 a type that cannot be read back.
    """
    import torch

    names = {str(dtype): name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(
        tensors.items(), key=lambda entry: (-entry[1].element_size(), entry[0])
    )  # aligned, each by its size
    offset = 0
    for name, tensor in ordered:
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in names:
            raise fail("E503", f"the tensor '{name}' is of type {kind}", expected=", ".join(names))
        header[name] = {
            "dtype": names[kind],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
