"""Graphs of a generative model with a key-value cache; no parameter is read.

    decoder-only       decode:   input_ids, attention_mask, position_ids, cache        → logits, cache
    encoder-decoder    encoder:  input_ids, attention_mask      → hidden states, keys and values of the cross-attention
                       decode:   decoder_input_ids, attention_mask, cache              → logits, cache

One `decode` graph takes any number of new tokens after any number of cached ones: the prompt is new tokens after none,
a step is one token after many. `transformers` says what a graph takes: `generate` runs, on fake tensors, on a
few tokens and then goes on from their cache, and what it calls `forward` with the second time is what is exported. It
does so twice in different sizes; the axes that differ are the dynamic ones, and the sizes tell their names.

Of equal layers a few are exported, and repeated in the `decode` graph; see `repeat`. A cache has entries for the layers
that ran: `generate` on the short model makes the short model's cache. The `encoder` graph is exported whole: it
ends in keys and values of the decoder's layers, none of which hands anything to the next.
"""

from __future__ import annotations

import contextlib
from typing import Any

from peltc.compiler.export.cache_axes import dynamic_axes, name_axes, tidy
from peltc.compiler.export.captured import EXAMPLE, OTHER, Kwargs, capture, forward
from peltc.compiler.export.exported import OPSET, Exported
from peltc.compiler.export.growth import grow
from peltc.compiler.export.rehearsal import repetitions
from peltc.compiler.export.stacks import Irregular, find_stacks, shortened
from peltc.compiler.export.steps import encode, reduced, step
from peltc.compiler.export.tidy import clean
from peltc.compiler.export.torch_model import held, quiet, tied, untie
from peltc.spec.diagnostics import PeltError, fail, first_line


def export_stage(model: Any, stage: str, whole: bool = False) -> Exported:
    """Export one of the graphs that generation needs; no parameter is read. The model is of no use afterwards.

    Args:
        model: a causal LM or encoder-decoder of `transformers`, whose parameters need no memory.
        stage: `decode` or `encoder`.
        whole: export every layer, even of those that are equal.

    Raises:
        PeltError: E505 the model does not generate, or cannot be exported, and why.
    """
    from transformers.exporters.exporter_dynamo import register_cache_pytrees_for_model

    if not model.can_generate():
        raise fail("E505", f"{type(model).__name__} does not generate", expected="a model with a language model's head")
    ties = tied(model)
    try:
        register_cache_pytrees_for_model(model)
        for module in (model, model.get_decoder()):  # an encoder with a cache is an error
            if hasattr(module.config, "use_cache"):
                module.config.use_cache = True
        with quiet():
            component, parameters, repeats = _component(model, stage, whole)
    except PeltError:
        raise
    except Exception as error:
        raise fail(
            "E505",
            f"transformers cannot export {type(model).__name__} with a cache: {type(error).__name__}:"
            f" {first_line(error)}",
            hint="without `generation` the model still compiles",
        ) from error
    return Exported.of(model, component, parameters, ties, repeats)


def _component(model: Any, stage: str, whole: bool) -> tuple[Any, dict[str, tuple[int, ...]], str]:
    """Export one graph; returns it with the exporter's record, the shapes of its parameters, and which layers were
    exported for all that equal them. The arguments are those of `export_stage`."""
    import torch

    encodes = bool(model.config.is_encoder_decoder)
    example, answer = capture(model, EXAMPLE)
    if whole:
        why = ", as asked for"
    elif stage == "encoder":
        why = ": the decoder's layers, whose keys and values this graph gives, are no chain"
    else:
        try:
            return _repeated(model, example, answer)
        except Exception as error:  # whatever it is: the whole model may still be exported
            name = "" if isinstance(error, Irregular) else f"{type(error).__name__}: "
            why = f": {name}{first_line(error)}"
    other, _ = capture(model, OTHER)
    untie(model)
    change: Any = contextlib.nullcontext()
    if stage == "encoder":
        masks = [given["attention_mask"] for given in (example, other)]
        example, other = ({"input_ids": torch.empty_like(mask), "attention_mask": mask} for mask in masks)
        change = forward(model, encode(model))
    elif encodes:
        change = forward(model, step(model))
    with change:
        component, parameters = _trace(model, example, other)
    tidy(component.program)
    name_axes(component.program, example, other)
    return component, parameters, f"each layer is exported by itself{why}"


def _repeated(model: Any, example: Kwargs, answer: Any) -> tuple[Any, dict[str, tuple[int, ...]], str]:
    """The `decode` graph, grown from that of the short model; returned as by `_component`.

    Args:
        model: the model.
        example: what its `forward` is called with.
        answer: what it answers.

    Raises:
        Irregular: the layers cannot be repeated.
    """
    encodes = bool(model.config.is_encoder_decoder)
    found = find_stacks(model)
    if not found:
        raise Irregular("no list of layers is long and equal enough")
    with shortened(model, found):
        (short, short_answer), (other, _) = (capture(model, sizes) for sizes in (EXAMPLE, OTHER))
    untie(model)
    with forward(model, step(model)) if encodes else contextlib.nullcontext():
        stacks = repetitions(model, example, short)
        with shortened(model, stacks):
            component, parameters = _trace(model, short, other)
    parameters = grow(component.program, parameters, stacks)
    tidy(component.program)
    if encodes:
        answer, short_answer = reduced(answer), reduced(short_answer)
    _regrow(component, (short, short_answer), (example, answer))
    name_axes(component.program, short, other)
    return component, parameters, "; ".join(map(str, stacks))


def _trace(model: Any, example: Kwargs, other: Kwargs) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """What `transformers` exports, cleaned, with the exporter's record; and the shapes of its parameters.

    Args:
        model: the model.
        example: what its `forward` is called with.
        other: the same in other sizes.
    """
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    names = {*held(model, every=True)}
    constants = {k: v for k, v in example.items() if isinstance(v, bool | int | float | str)}
    traced = {k: v for k, v in example.items() if v is not None and k not in constants}
    shapes = {k: dynamic_axes(v, other[k]) for k, v in traced.items()}
    options = OnnxConfig(dynamic=True, dynamic_shapes=shapes, optimize=False, opset_version=OPSET)
    exporter = OnnxExporter()  # type: ignore[no-untyped-call]
    component = next(iter(exporter.export(model, traced | constants, options).components.values()))
    return component, clean(component.program, names)


def _regrow(component: Any, short: tuple[Kwargs, Any], whole: tuple[Kwargs, Any]) -> None:
    """Let the record of a grown graph describe the caches of all layers, in place, and check the graph against them.

    The record's `export_config` stays that of the short model: it says what was asked of the exporter.

    Args:
        component: the graph, and the record of the short one.
        short: what the short model's `forward` is called with, and what it answers.
        whole: the same of the whole model.

    Raises:
        Irregular: the short model's record does not follow from what it is called with and answers, or the graph's
            inputs and outputs are not the whole model's.
    """
    from torch.utils._pytree import tree_structure, treespec_dumps, treespec_loads
    from transformers.exporters.utils import get_leaf_tensors

    record = component.metadata
    order = treespec_loads(record.in_spec).child(1).context

    def structures(given: Kwargs, answer: Any) -> tuple[str, str]:
        inputs = {name: given[name] for name in order}
        return treespec_dumps(tree_structure(((), inputs))), treespec_dumps(tree_structure(answer))

    if structures(*short) != (record.in_spec, record.out_spec):
        raise Irregular("the exporter records something else than the model takes and returns")
    graph = component.program.graph
    given, returned = (list(get_leaf_tensors(values)) for values in whole)
    taken = [(value.name or "").removeprefix("input.") for value in graph.inputs]
    if [name for name in taken if name in given] != [name for name in given if name in taken]:
        raise Irregular("the grown graph takes other inputs than the model")
    if [(value.name or "").removeprefix("output.") for value in graph.outputs] != returned:
        raise Irregular("the grown graph has other outputs than the model")
    record.in_spec, record.out_spec = structures(*whole)
