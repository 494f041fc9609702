"""The base: a model's ONNX graph without its weights, and where each weight lies.

    MODEL (folder or hub id) ── config, headers ──► fingerprint ──► cache hit: read graph and anatomy (no torch)
                                                         └────────► miss: export on parameters without memory, survey

A cached base is a folder `<cache>/bases/<key>/` with `graph.onnx` (parameters are graph inputs there), `base.json`
and `anatomy.json`. Where the checkpoint's tensors are not the model's own (renamed, merged, pickled), they are
written once into `<cache>/weights/<key>/` and referenced from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peltc.compiler.anatomy import Anatomy
from peltc.compiler.checkpoint import Checkpoint, StoredTensor, is_float, open_checkpoint, spellings
from peltc.spec.diagnostics import Place, fail, nearest

if TYPE_CHECKING:
    import onnx_ir as ir

FORMAT = 7
TOOLS = ("torch", "transformers", "onnx-ir", "onnxscript")
VOLATILE = ("_name_or_path", "transformers_version", "_attn_implementation", "torch_dtype", "dtype", "use_cache")
OPSET = 20
IR_VERSION = 10

Talk = Callable[[str], None]


def cache_folder() -> Path:
    """`$PELTC_CACHE`, or `peltc` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PELTC_CACHE") or Path(home) / "peltc")


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter of the model: its shape, and the name in the checkpoint of the tensor that holds it."""

    shape: tuple[int, ...]
    stored: str


@dataclass(frozen=True)
class Base:
    """What the compiler knows of a model.

    Attributes:
        folder: the model's folder (config, tokenizer).
        architecture: the class of `transformers`.
        config: the model's config, as JSON.
        precision: the type in which the graph computes, `float32`.
        variant: `ids` where the graph reads token ids, `embeds` where it reads embedded tokens.
        fingerprint: identifies architecture, config and weights.
        parameters: every parameter of the graph by its fully qualified name.
        checkpoint: where the weights lie.
        anatomy: the sites.
        export: what `transformers` recorded about the export.
        graph_file: the graph; its parameters are inputs.
        converted: whether the weights had to be written out, and why.
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
    graph_file: Path
    converted: str = ""

    def stored(self, name: str) -> StoredTensor:
        """Where a parameter's values lie."""
        return self.checkpoint.tensors[self.parameters[name].stored]

    def load_graph(self) -> ir.Model:
        """A fresh copy of the graph, to rewrite. Its parameters are graph inputs."""
        import onnx_ir as ir

        return ir.load(self.graph_file)


def find_model(model: str | Path) -> Path:
    """The folder of a model: a local one, or a snapshot of a hub repository.

    Raises:
        PeltError: E501 neither a folder nor to be had from the hub.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder.resolve()
    if folder.exists() or str(model).startswith((".", "/", "~")):
        raise fail("E501", "there is no such model folder", Place(str(model)), "a folder with a config.json")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "pytorch_model*.bin"]
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except Exception as error:
        detail = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise fail(
            "E501",
            f"'{model}' is neither a folder nor to be had from the hub: {detail}",
            expected="a model folder, or a hub id such as 'organisation/model'",
        ) from None


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
    precision: str = "checkpoint",
    variant: str = "ids",
    talk: Talk = lambda line: None,
) -> Base:
    """The base of a model, from the cache or built now.

    Args:
        model: a model folder or a hub id.
        architecture: a class of `transformers`; the config's own where absent.
        precision: `checkpoint` keeps the stored type (bfloat16 is computed in float32), or a float type's name.
        variant: `ids`, or `embeds` for a graph that reads embedded tokens.
        talk: told what takes time.

    Raises:
        PeltError: E5xx what is wrong with the model, or why it cannot be exported.
    """
    folder = find_model(model)
    config = read_config(folder)
    named = config.get("architectures") or []
    architecture = architecture or (str(named[0]) if isinstance(named, list) and named else None)
    if architecture is None:
        raise fail(
            "E502",
            "the model's config names no architecture, so its task is not known",
            Place(str(folder / "config.json")),
            "a key 'architectures'",
            "give the class of transformers by --architecture",
        )
    checkpoint, converted = _checkpoint(folder, talk)
    stored = str(checkpoint.float_dtype)
    computed = {"checkpoint": "float32" if stored in ("bfloat16", "float64") else stored}.get(precision, precision)
    stable = {k: v for k, v in config.items() if k not in VOLATILE}
    versions = {tool: metadata.version(tool) for tool in TOOLS}
    facts = [FORMAT, OPSET, architecture, stable, computed, variant, checkpoint.header_digest, versions]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    home = cache_folder() / "bases" / key
    if not (home / "base.json").is_file():
        _build(folder, config, architecture, computed, variant, checkpoint, home, talk)
    record = json.loads((home / "base.json").read_text(encoding="utf-8"))
    if record["materialise"]:
        checkpoint, converted = _materialise(folder, architecture, checkpoint, key, record["materialise"], talk)
    return Base(
        folder=folder,
        architecture=architecture,
        config=config,
        precision=computed,
        variant=variant,
        fingerprint=hashlib.sha256(
            (architecture + json.dumps(stable, sort_keys=True) + checkpoint.fingerprint).encode()
        ).hexdigest(),
        parameters={n: ParameterInfo(tuple(p["shape"]), p["stored"]) for n, p in record["parameters"].items()},
        checkpoint=checkpoint,
        anatomy=Anatomy.from_json(json.loads((home / "anatomy.json").read_text(encoding="utf-8"))),
        export=record["export"],
        graph_file=home / "graph.onnx",
        converted=converted,
    )


def survey_model(model: Any) -> tuple[Anatomy, str]:
    """The anatomy of a torch model of `transformers`, and what identifies its kind. Kept in the cache.

    Raises:
        PeltError: E505 the model cannot be exported.
    """
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

        exported = export_like(model)
        anatomy = survey_graph(exported.model, exported.parameters)
        file.parent.mkdir(parents=True, exist_ok=True)
        staging = file.with_suffix(f".{os.getpid()}")
        staging.write_text(json.dumps(anatomy.to_json()), encoding="utf-8")
        staging.replace(file)
    return Anatomy.from_json(json.loads(file.read_text(encoding="utf-8"))), key


def _build(
    folder: Path,
    config: Mapping[str, Any],
    architecture: str,
    precision: str,
    variant: str,
    checkpoint: Checkpoint,
    home: Path,
    talk: Talk,
) -> None:
    """Export, clean, survey, and move the result into the cache in one step."""
    import onnx_ir as ir

    from peltc.compiler.export import export_graph
    from peltc.compiler.survey import survey_graph

    talk(f"no base of {architecture} in the cache: exporting its graph once")
    exported = export_graph(folder, config, architecture, precision, variant)
    talk(exported.repeats)
    parameters, unresolved = resolve(exported.parameters, exported.ties, exported.stem, checkpoint)
    reason = ""
    if unresolved:
        reason = f"{len(unresolved)} parameters are renamed or merged in the checkpoint, first '{unresolved[0]}'"
        parameters = {name: ParameterInfo(shape, name) for name, shape in exported.parameters.items()}
    anatomy = survey_graph(exported.model, exported.parameters)
    home.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(None, ".building-", home.parent))
    try:
        ir.save(exported.model, staging / "graph.onnx")
        (staging / "anatomy.json").write_text(json.dumps(anatomy.to_json()), encoding="utf-8")
        record = {
            "architecture": architecture,
            "parameters": {name: asdict(info) for name, info in parameters.items()},
            "materialise": reason,
            "export": exported.metadata,
            "repeats": exported.repeats,
        }
        (staging / "base.json").write_text(json.dumps(record), encoding="utf-8")
        try:
            staging.rename(home)
        except OSError:
            if not (home / "base.json").is_file():  # another process was first otherwise
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def resolve(
    shapes: Mapping[str, tuple[int, ...]],
    ties: Mapping[str, tuple[str, ...]],
    stem: str,
    checkpoint: Checkpoint,
) -> tuple[dict[str, ParameterInfo], list[str]]:
    """Which stored tensor holds each parameter, and the parameters that none holds as it is.

    Args:
        shapes: parameters of the model by name.
        ties: names that share one tensor with a parameter.
        stem: what precedes the base model's names in a task model.
    """
    found: dict[str, ParameterInfo] = {}
    missing = []
    for name, shape in shapes.items():
        names = [s for n in (name, *ties.get(name, ())) for s in spellings(n, stem)]
        held = [s for s in names if s in checkpoint.tensors and checkpoint.tensors[s].shape == shape]
        if held and is_float(checkpoint.tensors[held[0]].dtype):
            found[name] = ParameterInfo(shape, held[0])
        else:
            missing.append(name)
    return found, missing


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
    folder: Path, architecture: str, checkpoint: Checkpoint, base_key: str, reason: str, talk: Talk
) -> tuple[Checkpoint, str]:
    """Write the parameters as the model class has them, once."""
    key = hashlib.sha256((base_key + checkpoint.fingerprint).encode()).hexdigest()[:24]
    home = cache_folder() / "weights" / key
    if not home.is_dir():
        import transformers

        talk(f"{reason}: writing the model's own tensors once")
        cls = getattr(transformers, architecture)
        model, report = cls.from_pretrained(folder, output_loading_info=True, dtype="auto")
        if missing := sorted(report["missing_keys"]):
            raise missing_weights(missing, checkpoint, folder)
        _save({name: p.detach() for name, p in model.named_parameters()}, home)
    return open_checkpoint(home), f"{reason}: written once to {home}"


def missing_weights(missing: list[str], checkpoint: Checkpoint, folder: Path) -> Exception:
    """The error for parameters that a checkpoint lacks."""
    shown = ", ".join(missing[:6]) + (f", ... ({len(missing)} in all)" if len(missing) > 6 else "")
    return fail(
        "E504",
        f"the checkpoint lacks weights that the architecture needs: {shown}",
        Place(str(folder)),
        "a checkpoint of this architecture",
        nearest(missing[0], checkpoint.tensors) or "name the class that was trained by --architecture",
    )


def _save(tensors: Mapping[str, Any], home: Path) -> None:
    from safetensors.torch import save_file

    home.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(None, ".building-", home.parent))
    try:
        # Tied tensors are one in a model's memory, and safetensors stores each name by itself.
        save_file({n: t.contiguous().clone() for n, t in tensors.items()}, staging / "model.safetensors")
        staging.rename(home)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
