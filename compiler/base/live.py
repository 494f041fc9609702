"""The base of a torch module that is in memory."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peltc.compiler.export.exported import OPSET, Exported
from peltc.compiler.export.refusals import (
    beyond_text,
    check_variant,
)
from peltc.compiler.files.cache import cache_folder, writable
from peltc.compiler.files.checkpoint import open_checkpoint
from peltc.compiler.survey.anatomy import Anatomy
from peltc.spec.diagnostics import fail
from peltc.spec.foreign import refuse

if TYPE_CHECKING:
    pass
from peltc.compiler.base.base import Base
from peltc.compiler.base.building import digest, resolve, write_base
from peltc.compiler.base.conversion import write_tensors
from peltc.compiler.base.key import VOLATILE, key_of
from peltc.compiler.base.opening import read_base
from peltc.compiler.base.precision import computed
from peltc.compiler.files.talk import Talk, logged


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
    provider: str = "any",
    variant: str = "ids",
    text_only: bool = False,
    talk: Talk = logged,
) -> Base:
    """The base of a live torch module that `transformers` does not have, built in a folder.

    The module's parameters are written there once, and its config where it has one; it is not touched.

    Args:
        inputs: example inputs by name, [B, S, ...]; those of a model of `transformers` where absent.
        folder: an empty folder, or that of another variant's base of the same module.
        precision: `checkpoint` keeps the type of the parameters (float32 where it is another than float32 and
            float16, or for CUDA bfloat16, or where they are of several), or a float type's name.
        provider: as for `open_base`.
        variant: `ids`, or `embeds` for a graph that reads embedded tokens.
        text_only: as for `open_base`.
        talk: told what takes time.

    Raises:
        PeltError: E505 why the module cannot be exported; E506 what is wrong with the example inputs.
    """
    from peltc.compiler.export.torch_model import held, is_pretrained, replica

    stored = {str(p.dtype).removeprefix("torch.") for p in module.parameters()}
    computes = computed(next(iter(stored)) if len(stored) == 1 else "", precision, provider)
    architecture = f"{type(module).__module__}.{type(module).__qualname__}"
    if is_pretrained(module) and not inputs:
        check_variant(type(module), variant, text_only)
    beyond = beyond_text(type(module)) if text_only and not inputs else []
    talk(f"exporting the graph of {architecture}")
    exported = _export_module(lambda: replica(module, computes), inputs, variant, text_only)
    talk(exported.repeats)
    if not (folder / "model.safetensors").is_file():
        write_tensors({name: tensor.detach() for name, tensor in held(module).items()}, folder / "model.safetensors")
    config: dict[str, Any] = {}
    if hasattr(getattr(module, "config", None), "to_json_string"):
        config = json.loads(module.config.to_json_string(use_diff=False)) | {"architectures": [type(module).__name__]}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    checkpoint = open_checkpoint(folder)
    parameters, lost = resolve(exported.parameters, exported.ties, "", checkpoint)
    assert not lost, lost
    home = folder / variant
    home.mkdir()
    anatomy = write_base(exported, parameters, architecture, "", home, beyond)
    facts = architecture + digest(home / "graph.onnx") + checkpoint.fingerprint
    return read_base(
        home,
        folder=folder,
        architecture=architecture,
        config=config,
        precision=computes,
        variant=variant,
        fingerprint=hashlib.sha256(facts.encode()).hexdigest(),
        checkpoint=checkpoint,
        module=module,
        inputs=describe_inputs(inputs, anatomy) if inputs else {},
        text_only=bool(beyond),
    )


def _export_module(
    build: Callable[[], Any], inputs: Mapping[str, Any] | None, variant: str = "ids", text_only: bool = False
) -> Exported:
    """Export a torch module that `transformers` does not have.

    Args:
        build: makes a replica of it.
    """
    import inspect

    from peltc.compiler.export.inputs import check_inputs
    from peltc.compiler.export.torch_model import is_pretrained
    from peltc.compiler.export.whole import export_model, export_read

    module = build()
    if variant == "embeds" and not (
        is_pretrained(module) and "inputs_embeds" in inspect.signature(module.forward).parameters
    ):
        raise fail("E505", f"{type(module).__name__} cannot be exported with embedded tokens as its input",
                   expected="a model of transformers whose forward takes 'inputs_embeds'",
                   hint="tokens before the sequence (`prepend`) need it; prefixes in the attention do not")  # fmt: skip
    if variant == "embeds" or (text_only and not inputs and is_pretrained(module)):
        return export_model(module, variant)
    if not inputs and is_pretrained(module):
        return export_read(build)
    return export_model(module, inputs=check_inputs(module, inputs))


def describe_inputs(inputs: Mapping[str, Any], anatomy: Anatomy) -> dict[str, dict[str, Any]]:
    """Describe example inputs by type, shape, names of the axes and range of values, so that verification can draw
    similar ones later. The range of token ids is the vocabulary."""
    import torch

    from peltc.compiler.export.inputs import axis_names

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
        from peltc.compiler.export.torch_model import replica

        exported = _export_module(lambda: replica(model), inputs)
        with tempfile.TemporaryDirectory() as home:
            return write_base(exported, {}, "", "", Path(home)), digest(Path(home) / "graph.onnx")
    config = json.loads(model.config.to_json_string(use_diff=False))
    stable = {k: v for k, v in config.items() if k not in VOLATILE}
    architecture = type(model).__name__
    key = key_of(OPSET, architecture, type(model).__module__, stable)
    file = cache_folder() / "anatomies" / f"{key[:24]}.json"
    if not file.is_file():
        from peltc.compiler.export.whole import export_like
        from peltc.compiler.survey.sites import survey_graph

        writable(file.parent)
        exported = export_like(model)
        anatomy = survey_graph(exported.model, exported.parameters, exported.ties, exported.senses)
        written = file.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(anatomy.to_json()), encoding="utf-8")
        written.replace(file)
    return Anatomy.from_json(json.loads(file.read_text(encoding="utf-8"))), key
