"""The graph that reads a whole sequence, by the exporter of `transformers`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from peltc.compiler.export.exported import OPSET, Exported
from peltc.compiler.export.growth import grow
from peltc.compiler.export.inputs import axis_names, example_inputs
from peltc.compiler.export.refusals import reads_more
from peltc.compiler.export.rehearsal import repetitions
from peltc.compiler.export.stacks import Irregular, shortened
from peltc.compiler.export.tidy import clean, name_axes, name_outputs
from peltc.compiler.export.torch_model import held, quiet, tied, unbacked, untie
from peltc.compiler.senses.asked import Asked
from peltc.compiler.senses.examples import Axes
from peltc.compiler.senses.trial import forget
from peltc.spec.diagnostics import PeltError, fail, first_line

FEWER: tuple[tuple[str, ...], ...] = ((), ("sound",), ("batch",), ("sound", "text", "target"))
"""The sizes that are fixed where the exporter cannot leave them free, one attempt after the other."""


def export_like(model: Any) -> Exported:
    """Export the graph of a live model's class and config; the model itself is not touched.

    Raises:
        PeltError: E505 what the exporter cannot export, and why; E514 how the model is given its inputs is not known.
    """
    import copy

    from accelerate import init_empty_weights

    def build() -> Any:
        config = copy.deepcopy(model.config)
        config._attn_implementation = None
        with init_empty_weights(include_buffers=False):
            return unbacked(type(model)._from_config(config, dtype=model.dtype).eval())

    with quiet():
        return export_read(build)


def export_read(build: Callable[[], Any]) -> Exported:
    """Export a model of `transformers` with all that it reads. Axes that the exporter cannot leave free are fixed at
    the size of the example.

    Args:
        build: makes the model, afresh for each attempt.

    Raises:
        PeltError: as `export_like`.
    """
    from peltc.compiler.senses.finding import find_reading

    model = build()
    if not reads_more(type(model)):
        return export_model(model)
    reading, failure = find_reading(model), None  # a model may keep tensors of a trial: it is made anew
    tried: set[Any] = set()
    for sizes in FEWER:
        fewer = reading.fixed(*sizes)
        if fewer.varied in tried:
            continue
        tried.add(fewer.varied)
        model = build()
        inputs = {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor
                  for name, tensor in (fewer.make(Asked.of(model), fewer.sizes()) or {}).items()}  # fmt: skip
        try:
            exported = export_model(model, inputs=inputs, axes=fewer.axes)
            return dataclasses.replace(exported, reading=fewer)
        except PeltError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def export_model(
    model: Any,
    variant: str = "ids",
    whole: bool = False,
    inputs: Mapping[str, Any] | None = None,
    axes: Axes | None = None,
) -> Exported:
    """Export a torch model; no parameter is read, so they need no memory. The model is of no use afterwards.

    Tied parameters are told apart in the graph, each by the name of the module that uses it; `ties` says which belong
    together. Of equal layers a few are exported, and repeated in the graph.

    Args:
        model: the model.
        variant: `ids` or `embeds`.
        whole: export every layer, even of those that are equal.
        inputs: example inputs by name; where absent, the text that a model of `transformers` reads.
        axes: the names of their axes, None where an axis has one size; where absent, see `axis_names`.

    Raises:
        PeltError: E505 what the exporter cannot export, and why.
    """
    from transformers.exporters.exporter_onnx import use_experts_implementation

    inputs = example_inputs(model, variant) if inputs is None else dict(inputs)
    axes = axis_names(inputs) if axes is None else axes
    constants = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    for module in model.modules():  # a decoder may have a config of its own, which the exporter leaves alone
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False
    ties = tied(model)
    untie(model)
    names = {*held(model, every=True)}
    component, repeats = None, "each layer is exported by itself, as asked for"
    if not whole:
        try:
            with quiet(), use_experts_implementation(model, "batched_mm"):  # others refuse fake tensors
                stacks = repetitions(model, inputs | constants)
            with shortened(model, stacks):
                short = _trace(model, inputs, constants, axes)
            parameters = grow(short.program, clean(short.program, names), stacks)
            component, repeats = short, "; ".join(map(str, stacks))
        except Exception as error:  # whatever it is: the whole model may still be exported
            name = "" if isinstance(error, Irregular) else f"{type(error).__name__}: "
            repeats = f"each layer is exported by itself: {name}{first_line(error)}"
    if component is None:
        component = _trace(model, inputs, constants, axes)
        parameters = clean(component.program, names)
    name_outputs(component.program, inputs)
    name_axes(component.program, axes)
    return Exported.of(model, component, parameters, ties, repeats)


def _trace(model: Any, inputs: Mapping[str, Any], constants: Mapping[str, Any], axes: Axes) -> Any:
    """What `transformers` exports, as it comes."""
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    dynamic = torch.export.Dim.DYNAMIC
    shapes = {name: {axis: dynamic for axis, word in enumerate(words) if word} for name, words in axes.items()}
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
    finally:
        forget(model)
