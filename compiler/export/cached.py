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
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peltc.compiler.export.exported import OPSET, Exported
from peltc.compiler.export.growth import grow
from peltc.compiler.export.rehearsal import repetitions
from peltc.compiler.export.stacks import Irregular, find_stacks, shortened
from peltc.compiler.export.tidy import clean
from peltc.compiler.export.torch_model import quiet, tied, untie
from peltc.spec.diagnostics import PeltError, fail, first_line

Kwargs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Example sizes: all different, since they tell the axes apart, and at least 2, since torch takes an axis of size 1
    for a constant."""

    batch: int
    past: int
    query: int
    keep: int
    source: int

    def names(self) -> dict[int, str]:
        """What an axis of some size is called."""
        return {
            self.batch: "batch",
            self.past: "past",
            self.query: "query",
            self.past + 1: "total",
            self.past + self.query: "total",
            self.keep: "keep",
            self.source: "source",
        }


EXAMPLE, OTHER = Sizes(2, 11, 5, 3, 7), Sizes(4, 17, 9, 6, 13)
TOKEN = 3


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
    record = dataclasses.asdict(component.metadata)
    record["export_config"] = {k: repr(v) for k, v in record["export_config"].items()}
    return Exported(
        component.program,
        parameters,
        {name: ties[name] for name in parameters if ties.get(name)},
        getattr(model, "base_model_prefix", ""),
        record,
        repeats,
    )


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
        change = _forward(model, encode(model))
    elif encodes:
        change = _forward(model, step(model))
    with change:
        component, parameters = _trace(model, example, other)
    tidy(component.program)
    name_axes(component.program, example, other)
    return component, parameters, f"every layer is exported{why}"


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
    with _forward(model, step(model)) if encodes else contextlib.nullcontext():
        stacks = repetitions(model, example, short)
        with shortened(model, stacks):
            component, parameters = _trace(model, short, other)
    parameters = grow(component.program, parameters, stacks)
    tidy(component.program)
    if encodes:
        answer, short_answer = _reduced(answer), _reduced(short_answer)
    _regrow(component, (short, short_answer), (example, answer))
    name_axes(component.program, short, other)
    return component, parameters, "; ".join(map(str, stacks))


def capture(model: Any, sizes: Sizes) -> tuple[Kwargs, Any]:
    """What `generate` calls `forward` with when several tokens follow those of a cache, and what it is answered.

    Args:
        model: the model.
        sizes: sizes of the example.
    """
    import torch
    from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig
    from transformers.exporters.exporter_onnx import use_experts_implementation

    encodes = bool(model.config.is_encoder_decoder)
    new = sizes.query
    tokens = torch.full((sizes.batch, sizes.past + new), TOKEN)
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0  # `generate` drops a mask that masks nothing
    options = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=1, decoder_start_token_id=TOKEN, bos_token_id=TOKEN, pad_token_id=0
    )
    common: Kwargs = {"generation_config": options}
    cache: Any = DynamicCache()  # of full layers: one that keeps a window alone is no tensor of a graph
    if encodes:
        cache = EncoderDecoderCache(cache, DynamicCache())
        source = torch.full((sizes.batch, sizes.source), TOKEN)
        common |= {"input_ids": source, "attention_mask": torch.ones_like(source)}
    with _faked(model) as calls, use_experts_implementation(model, "batched_mm"):  # others refuse fake tensors
        for start, end in ((0, sizes.past), (sizes.past, sizes.past + new)):
            if encodes:  # the new tokens alone: `generate` takes the encoder's mask for the decoder's length
                given = common | {"decoder_input_ids": tokens[:, start:end]}
            else:
                given = common | {"input_ids": tokens[:, :end], "attention_mask": mask[:, :end]}
            model.generate(**given, past_key_values=cache)
            cache = calls[-1][1].past_key_values
            cache.__dict__.pop("_is_user_defined", None)
    decode, answer = calls[-1]
    decode["past_key_values"].__dict__.pop("_is_user_defined", None)
    if "logits_to_keep" in decode:  # as positions, which a graph can take
        decode["logits_to_keep"] = torch.zeros(sizes.keep, dtype=torch.long)
    return decode, answer


@contextlib.contextmanager
def _faked(model: Any) -> Iterator[list[tuple[Kwargs, Any]]]:
    """Let `generate` run a model without its parameters: `forward` runs on fake tensors and gives logits that are all
    equal. Yields what it is called with, and what it returns."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_map_only

    def blank(tensor: Any) -> Any:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    def run(forward: Callable[..., Any], kwargs: Kwargs) -> Any:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            result = forward(**tree_map_only(torch.Tensor, fake.from_tensor, kwargs))
        return tree_map_only(torch.Tensor, blank, result)

    calls: list[tuple[Kwargs, Any]] = []
    decode = model.forward

    def decoded(**kwargs: Any) -> Any:
        given = tree_map_only(torch.Tensor, blank, kwargs)
        result = run(decode, kwargs)
        calls.append((given, result))
        result["logits"] = torch.zeros(result.logits.shape, dtype=result.logits.dtype)
        return result

    with contextlib.ExitStack() as stack:
        if model.config.is_encoder_decoder:
            encoder = model.get_encoder()
            encoded = encoder.forward
            stack.enter_context(_forward(encoder, lambda **kwargs: run(encoded, kwargs)))
        stack.enter_context(_forward(model, decoded))
        yield calls


@contextlib.contextmanager
def _forward(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Another `forward`, for a while, which passes for the one it replaces."""
    replaced = module.forward
    if not hasattr(function, "__signature__"):
        function.__signature__ = inspect.signature(replaced)  # type: ignore[attr-defined]
    own = "forward" in vars(module)
    module.forward = function
    try:
        yield
    finally:
        if own:
            module.forward = replaced
        else:
            del module.forward


def encode(model: Any) -> Callable[..., dict[str, Any]]:
    """The encoder with what the decoder's cross-attention makes of its states, as a function of ids and mask.

    The whole model runs for that, on tokens that do not matter: no key or value of the cross-attention depends on them.
    Outputs are named as the inputs of `decode` which take them.
    """
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.exporters.utils import get_leaf_tensors

    forward = model.forward

    def encoder(input_ids: Any, attention_mask: Any) -> dict[str, Any]:
        states = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        forward(
            encoder_outputs=states,
            attention_mask=attention_mask,
            decoder_input_ids=input_ids[:, :2],
            past_key_values=cache,
            use_cache=True,
        )
        crossed = get_leaf_tensors({"past_key_values": {"cross_attention_cache": cache.cross_attention_cache}})
        return {"last_hidden_state": states.last_hidden_state, **crossed}

    encoder.__signature__ = inspect.signature(encoder)  # type: ignore[attr-defined]
    return encoder


def step(model: Any) -> Callable[..., dict[str, Any]]:
    """The model's `forward` without the outputs that are inputs: the encoder's states, and what is made of them."""
    forward = model.forward

    def decoder(**kwargs: Any) -> dict[str, Any]:
        return _reduced(forward(**kwargs))

    return decoder


def _reduced(answer: Any) -> dict[str, Any]:
    """What is left of an encoder-decoder's answer in its `decode` graph."""
    grown = {"self_attention_cache": answer.past_key_values.self_attention_cache}
    return {"logits": answer.logits, "past_key_values": grown}


def _trace(model: Any, example: Kwargs, other: Kwargs) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """What `transformers` exports, cleaned, with the exporter's record; and the shapes of its parameters.

    Args:
        model: the model.
        example: what its `forward` is called with.
        other: the same in other sizes.
    """
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
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


def dynamic_axes(one: Any, other: Any) -> Any:
    """The axes in which two examples of an input differ, in the form that `torch.export` takes.

    Args:
        one: a tensor, a cache, or whatever else torch knows how to flatten.
        other: the same in other sizes.
    """
    import torch
    from torch.utils._pytree import SUPPORTED_NODES

    if isinstance(one, torch.Tensor):
        pairs = enumerate(zip(one.shape, other.shape, strict=True))
        return {axis: torch.export.Dim.AUTO for axis, (a, b) in pairs if a != b}
    if type(one) in SUPPORTED_NODES:
        children = zip(*(SUPPORTED_NODES[type(v)].flatten_fn(v)[0] for v in (one, other)), strict=True)
        return [dynamic_axes(a, b) for a, b in children]
    return None


def tidy(model: Any) -> None:
    """Drop the inputs that the graph does not read."""
    outputs = set(model.graph.outputs)
    for value in list(model.graph.inputs):
        if not value.uses() and value not in outputs:
            model.graph.inputs.remove(value)


def name_axes(model: Any, example: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Give the symbolic axes the names that users read: batch, past, query, total, keep, source.

    Raises:
        PeltError: E505 where an axis that was to be symbolic is not.
    """
    import onnx_ir as ir
    from transformers.exporters.utils import get_leaf_tensors

    sizes, others = (
        {name: tuple(tensor.shape) for name, tensor in get_leaf_tensors(dict(kwargs)).items()}
        for kwargs in (example, other)
    )
    words, renamed = EXAMPLE.names(), dict[str, str]()
    for value in model.graph.inputs:
        name = (value.name or "").removeprefix("input.")
        for axis, (a, b) in enumerate(zip(sizes.get(name, ()), others.get(name, ()), strict=True)):
            if a != b:
                size = value.shape[axis]
                if isinstance(size, int) or size.value is None:
                    raise fail("E505", f"the exporter froze the {words[a]} axis of '{name}' at {size}",
                               expected="a symbolic axis")  # fmt: skip
                renamed[size.value] = words[a]
    symbols = {word: symbol for symbol, word in renamed.items()}
    past, query = symbols.get("past"), symbols.get("query", 1)
    renamed |= {f"{past} + {query}": "total", f"{query} + {past}": "total"}
    values = [v for node in model.graph.all_nodes() for v in node.outputs]
    for value in (*model.graph.inputs, *values):
        for axis, size in enumerate(value.shape if value.shape is not None else ()):
            if not isinstance(size, int) and size.value in renamed:
                value.shape[axis] = ir.SymbolicDim(renamed[size.value])
