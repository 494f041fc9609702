"""The graph that reads a whole sequence, by the exporter of `transformers`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from peltc.compiler.export.exported import OPSET, Exported
from peltc.compiler.export.growth import grow
from peltc.compiler.export.inputs import axis_names, example_inputs
from peltc.compiler.export.rehearsal import repetitions
from peltc.compiler.export.stacks import Irregular, shortened
from peltc.compiler.export.tidy import clean, name_axes, name_outputs
from peltc.compiler.export.torch_model import quiet, tied, unbacked, untie
from peltc.spec.diagnostics import fail, first_line


def export_like(model: Any) -> Exported:
    """Export the graph of a live model's class and config; the model itself is not touched.

    Raises:
        PeltError: E505 what the exporter cannot export, and why.
    """
    import copy

    from accelerate import init_empty_weights

    with quiet():
        config = copy.deepcopy(model.config)
        config._attn_implementation = None
        with init_empty_weights(include_buffers=False):
            empty = type(model)._from_config(config, dtype=model.dtype).eval()
        return export_model(unbacked(empty))


def export_model(
    model: Any, variant: str = "ids", whole: bool = False, inputs: Mapping[str, Any] | None = None
) -> Exported:
    """Export a torch model; no parameter is read, so they need no memory. The model is of no use afterwards.

    Tied parameters are told apart in the graph, each by the name of the module that uses it; `ties` says which belong
    together. Of equal layers a few are exported, and repeated in the graph.

    Args:
        model: the model.
        variant: `ids` or `embeds`.
        whole: export every layer, even of those that are equal.
        inputs: example inputs by name; where absent, what a model of `transformers` reads.

    Raises:
        PeltError: E505 what the exporter cannot export, and why.
    """
    from transformers.exporters.exporter_onnx import use_experts_implementation

    inputs = example_inputs(model, variant) if inputs is None else dict(inputs)
    constants = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    for module in model.modules():  # a decoder may have a config of its own, which the exporter leaves alone
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False
    ties = tied(model)
    untie(model)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    component, repeats = None, "each layer is exported by itself, as asked for"
    if not whole:
        try:
            with quiet(), use_experts_implementation(model, "batched_mm"):  # others refuse fake tensors
                stacks = repetitions(model, inputs | constants)
            with shortened(model, stacks):
                short = _trace(model, inputs, constants)
            parameters = grow(short.program, clean(short.program, names), stacks)
            component, repeats = short, "; ".join(map(str, stacks))
        except Exception as error:  # whatever it is: the whole model may still be exported
            name = "" if isinstance(error, Irregular) else f"{type(error).__name__}: "
            repeats = f"each layer is exported by itself: {name}{first_line(error)}"
    if component is None:
        component = _trace(model, inputs, constants)
        parameters = clean(component.program, names)
    name_outputs(component.program, inputs)
    name_axes(component.program, axis_names(inputs))
    return Exported.of(model, component, parameters, ties, repeats)


def _trace(model: Any, inputs: Mapping[str, Any], constants: Mapping[str, Any]) -> Any:
    """What `transformers` exports, as it comes."""
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    dynamic = torch.export.Dim.DYNAMIC
    shapes = {name: dict.fromkeys(range(len(words)), dynamic) for name, words in axis_names(inputs).items()}
    options = OnnxConfig(dynamic=True, dynamic_shapes=shapes, optimize=False, opset_version=OPSET)
    try:
        with quiet():
            exporter = OnnxExporter()  # type: ignore[no-untyped-call]
            return next(iter(exporter.export(model, {**inputs, **constants}, options).components.values()))
    except Exception as error:
        raise fail(
            "E505",
            f"transformers' exporter cannot export {type(model).__name__} to ONNX: {type(error).__name__}:"
            f" {first_line(error)}",
            hint="the exporter's limits are its own; a newer transformers may have fewer",
        ) from error
