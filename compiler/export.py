"""`transformers`' ONNX exporter on a model whose parameters have no memory, and the clean-up of its graph.

A torch module that `transformers` does not have is exported by the same exporter, over the module's own memory.

The compiler imports torch here and in `repeat` alone, and only while a base is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peltc.compiler import repeat
from peltc.compiler.refusals import unfit
from peltc.spec.diagnostics import Place, fail, nearest

GRAPHS = ("decode", "encoder")
"""The variants of a model that generates: graphs with a cache of keys and values; see `generation`."""
BATCH, SEQUENCE, TARGET = 2, 8, 6
"""Example sizes: at least 2, since torch takes an axis of size 1 for a constant."""
AXES = ("sequence", "target")
"""What the axes after the batch are called, by their lengths in the example inputs, in order of appearance."""


def stages(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Which graphs generation with a model takes, by its config."""
    return GRAPHS if config.get("is_encoder_decoder") else GRAPHS[:1]


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported graph: its parameters are graph inputs, named as in the model.

    Attributes:
        parameters: shapes by fully qualified name, of those that the graph reads.
        ties: other names of the same tensor.
        stem: what precedes the base model's names in a task model.
        metadata: `transformers`' own record of the export.
        repeats: which layers were exported for all that equal them, or why none were.
    """

    model: Any
    parameters: dict[str, tuple[int, ...]]
    ties: dict[str, tuple[str, ...]]
    stem: str
    metadata: dict[str, Any]
    repeats: str = ""


def export_graph(folder: Path, config: Mapping[str, Any], cls: Any, precision: str, variant: str) -> Exported:
    """Export a model's graph; no weight is read.

    Args:
        cls: a model class of `transformers`.

    Raises:
        PeltError: E502 the config does not describe such a model, E512 nor should it, for the class is another type's;
            E505 what the exporter cannot export.
    """
    import torch
    from accelerate import init_empty_weights

    with quiet():
        parsed: Any = None
        try:
            parsed = parse_config(config)
            with init_empty_weights(include_buffers=False):
                model = unbacked(cls._from_config(parsed, dtype=getattr(torch, precision)).eval())
        except Exception as error:
            if parsed is not None and not isinstance(parsed, cls.config_class or object):
                raise unfit(cls, parsed.model_type, folder) from None
            raise fail(
                "E502",
                f"the config does not describe a {cls.__name__}: {type(error).__name__}: {_first_line(error)}",
                Place(str(folder / "config.json")),
            ) from error
        if variant in GRAPHS:
            from peltc.compiler.generation import export_stage

            return export_stage(model, variant)
        return export_model(model, variant)


def parse_config(content: Mapping[str, Any]) -> Any:
    """A config of `transformers`, from what its file says: infinity, which JSON lacks, is a mapping there."""
    from transformers import AutoConfig

    def number(mapping: dict[str, Any]) -> Any:
        return float(mapping["__float__"]) if mapping.keys() == {"__float__"} else mapping

    return AutoConfig.for_model(**json.loads(json.dumps(dict(content)), object_hook=number))


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


def unbacked(model: Any) -> Any:
    """Give a model's parameters addresses on the CPU, and no memory: pages that nobody touches take none.

    On the meta device, where they come from, they would not mix with the tensors that many models make on the CPU
    while they run."""
    import torch

    placed: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in placed:  # tied parameters stay tied
                    placed[id(parameter)] = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), False)
                module._parameters[name] = placed[id(parameter)]
    return model


def replica(model: Any, precision: str = "", drop: Any = None) -> Any:
    """A copy of a live torch module, in eval mode and on the CPU: modules and buffers of its own over the same
    parameters, which are copied only where type or device change.

    Args:
        model: the module, which is not touched.
        precision: the floating-point type that the copy computes in; its own where empty.
        drop: a direct child to leave out, with the hooks that its `handles` tell of.

    Raises:
        PeltError: E505 the module cannot be copied, or has quantised parameters.
    """
    import copy

    import torch

    if odd := [name for name, p in model.named_parameters() if not p.is_floating_point()]:
        raise fail("E505", f"the parameter '{odd[0]}' of {type(model).__name__} holds no floating-point numbers",
                   hint="quantised modules cannot be compiled")  # fmt: skip
    memo: dict[int, Any] = {}
    try:
        for parameter in model.parameters():
            if drop is None or all(parameter is not own for own in drop.parameters()):
                memo[id(parameter)] = torch.nn.Parameter(parameter.detach().cpu(), False)
        if drop is not None:
            memo[id(drop)] = torch.nn.Identity()
        twin = copy.deepcopy(model, memo).cpu().eval()
        if precision:
            twin = twin.to(getattr(torch, precision))
    except Exception as error:
        raise fail(
            "E505",
            f"the torch module {type(model).__name__} cannot be copied: {type(error).__name__}: {_first_line(error)}",
            hint="parametrisations that keep computed tensors as attributes can be removed before",
        ) from error
    if drop is not None:
        gone = {handle.id for handle in drop.handles}
        for module in twin.modules():
            for table in (v for key, v in vars(module).items() if "_hooks" in key and isinstance(v, dict)):
                for key in gone & {*table}:
                    del table[key]
        for name in [name for name, child in twin.named_children() if child is memo[id(drop)]]:
            delattr(twin, name)
    return twin


def is_pretrained(model: Any) -> bool:
    """Whether a torch model is built on `transformers`' base class, of whichever package."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def check_inputs(model: Any, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Example inputs of a torch module, as tensors on the CPU.

    Raises:
        PeltError: E506 what is wrong with them.
    """
    import torch

    expected = "inputs={name: tensor [B, S, ...]}, as the module's forward takes them"
    if not inputs:
        raise fail("E506", f"{type(model).__name__} is no class of transformers, and no example inputs are given",
                   expected=expected)  # fmt: skip
    accepted = inspect.signature(model.forward).parameters
    names = [p.name for p in accepted.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    needed = [n for n in names if accepted[n].default is inspect.Parameter.empty]
    if unknown := [name for name in inputs if name not in names and not open_ended]:
        raise fail("E506", f"the module's forward takes no '{unknown[0]}'", expected=", ".join(names),
                   hint=nearest(unknown[0], names))  # fmt: skip
    if missing := [name for name in needed if name not in inputs]:
        raise fail("E506", f"the example input '{missing[0]}' is missing", expected=", ".join(names))
    found = {}
    for name, value in inputs.items():
        try:
            tensor = torch.as_tensor(value).detach().cpu()
        except Exception:
            raise fail("E506", f"the example input '{name}' is no tensor, but {type(value).__name__}",
                       expected=expected) from None  # fmt: skip
        if not tensor.dim() or min(tensor.shape[:2]) < 2:
            raise fail("E506", f"the example input '{name}' has the shape {list(tensor.shape)}",
                       expected="at least 2 of each: torch takes an axis of size 1 for a constant")  # fmt: skip
        found[name] = tensor
    batches = {name: len(tensor) for name, tensor in found.items()}
    if len({*batches.values()}) > 1:
        raise fail("E506", f"the example inputs have different batches: {batches}",
                   expected="one batch size: axis 0 is the batch")  # fmt: skip
    return found


def axis_names(inputs: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """What the symbolic axes of each input are called: `batch`, and one word for all that are equally long."""
    lengths = list(dict.fromkeys(int(tensor.shape[1]) for tensor in inputs.values() if tensor.dim() > 1))
    words = {n: AXES[i] if i < len(AXES) else f"length_{i}" for i, n in enumerate(lengths)}
    return {n: ("batch", *(words[int(size)] for size in t.shape[1:2])) for n, t in inputs.items()}


def output_name(path: str) -> str:
    """What an output is called: its key where the model names it, `output`, `output_1`, ... where it has a place in a
    tuple, and `output.x` where it is called like an input."""
    first, *rest = path.split(".")
    if first.isdigit():
        first = "output" if first == "0" else f"output_{first}"
    return ".".join((first, *rest))


def outputs_of(answer: Any, inputs: Iterable[str]) -> dict[str, Any]:
    """The tensors that a torch module answers with, named as the graph's outputs."""
    from transformers.exporters.utils import get_leaf_tensors

    taken = {*inputs}
    return {
        f"output.{path}" if path in taken else output_name(path): tensor
        for path, tensor in get_leaf_tensors(answer).items()
    }


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
    component, repeats = None, "every layer is exported, as asked for"
    if not whole:
        try:
            with quiet(), use_experts_implementation(model, "batched_mm"):  # others refuse fake tensors
                stacks = repeat.plan(model, inputs | constants)
            with repeat.shortened(model, stacks):
                short = _trace(model, inputs, constants)
            parameters = repeat.grow(short.program, clean(short.program, names), stacks)
            component, repeats = short, "; ".join(map(str, stacks))
        except Exception as error:  # whatever it is: the whole model may still be exported
            name = "" if isinstance(error, repeat.Irregular) else f"{type(error).__name__}: "
            repeats = f"every layer is exported: {name}{_first_line(error)}"
    if component is None:
        component = _trace(model, inputs, constants)
        parameters = clean(component.program, names)
    name_outputs(component.program, inputs)
    name_axes(component.program, axis_names(inputs))
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


def _trace(model: Any, inputs: Mapping[str, Any], constants: Mapping[str, Any]) -> Any:
    """What `transformers` exports, as it comes."""
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    from peltc.compiler.base import OPSET

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
            f" {_first_line(error)}",
            hint="the exporter's limits are its own; a newer transformers may have fewer",
        ) from error


def tied(model: Any) -> dict[str, tuple[str, ...]]:
    """The other names of each parameter."""
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # parameters without memory were made one by one
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(n for n in group if n != name) for group in groups.values() for name in group}


def untie(model: Any) -> None:
    """Give each name a parameter of its own, over the same memory."""
    import torch

    seen: set[int] = set()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in seen:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = torch.nn.Parameter(torch.empty_like(parameter), False)
        seen.add(id(parameter))


def example_inputs(model: Any, variant: str) -> dict[str, Any]:
    """What the graph will read: token ids and masks, as the model's `forward` takes them."""
    import torch

    device = next(model.parameters()).device
    accepted = inspect.signature(model.forward).parameters
    config = model.config

    def ones(length: int) -> Any:
        return torch.ones((BATCH, length), dtype=torch.long, device=device)

    inputs: dict[str, Any] = {}
    if variant == "embeds":
        table = model.get_input_embeddings().weight
        inputs["inputs_embeds"] = torch.zeros((BATCH, SEQUENCE, table.shape[1]), dtype=table.dtype, device=device)
    else:
        inputs["input_ids"] = ones(SEQUENCE)
    if "attention_mask" in accepted:
        inputs["attention_mask"] = ones(SEQUENCE)
    if "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = ones(SEQUENCE)
    # A classifier makes the decoder's inputs itself, as long as the encoder's.
    given = model.base_model is model or model.can_generate()
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted and given:
        inputs["decoder_input_ids"] = ones(TARGET)
    return inputs


def clean(model: Any, names: set[str]) -> dict[str, tuple[int, ...]]:
    """Fold constants and drop dead code, with the parameters out of reach: as graph inputs they are constants to no
    pass, so none is folded, merged or lost. Constants of half precision keep the numbers that they are rounded from.
    Returns the shapes of the parameters that the graph reads."""
    import onnx_ir as ir
    from onnxscript import optimizer

    from peltc.compiler.wide import recall, unrounded

    graph = model.graph
    numbers = unrounded(graph, names)
    parameters = []
    for name in [n for n in graph.initializers if n in names]:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
        parameters.append(value)
    for value in graph.initializers.values():
        tensor = value.const_value
        value.const_value = ir.tensor(tensor.numpy(), name=value.name)  # a buffer, out of torch's hands
    optimizer.optimize_ir(model, num_iterations=2)
    recall(graph, numbers)
    part_transpositions(graph)
    unused = [value for value in parameters if not value.uses()]
    for value in unused:
        graph.inputs.remove(value)
    for node in model.graph.all_nodes():
        scope = node.metadata_props.get("namespace")
        node.metadata_props.clear()
        if scope:
            node.metadata_props["namespace"] = scope
    return {value.name: tuple(int(d) for d in value.shape) for value in parameters if value.uses()}


def part_transpositions(graph: Any) -> None:
    """Let keys exist as [B, H, T, Dh] on their way from [B, T, H, Dh] to [B, H, Dh, T], in place.

    Optimisers make one transposition of the two; ONNX Runtime does so again when it opens the graph."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type == "Transpose" and list(node.attributes.get_ints("perm", ())) == [0, 2, 3, 1]:
            heads = ir.node("Transpose", [node.inputs[0]], {"perm": [0, 2, 1, 3]}, name=f"{node.name}.heads")
            output, source = heads.outputs[0], node.inputs[0]
            output.name, output.type = f"{node.outputs[0].name}.heads", source.type
            if source.shape is not None:
                output.shape = ir.Shape([source.shape[axis] for axis in (0, 2, 1, 3)])
            heads.metadata_props.update(node.metadata_props)
            graph.insert_before(node, heads)
            node.replace_input_with(0, output)
            node.attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 3, 2])


def name_outputs(model: Any, inputs: Mapping[str, Any]) -> None:
    """Give inputs the names that they have in the model, and outputs names of words."""
    for value in model.graph.inputs:
        if (value.name or "").removeprefix("input.") in inputs:
            value.name = value.name.removeprefix("input.")
    named = {value: output_name(value.name) for value in model.graph.outputs}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value not in named and value.name in named.values():
                value.name = f"{value.name}.inner"
    for value, name in named.items():
        value.name = name


def name_axes(model: Any, axes: Mapping[str, tuple[str, ...]]) -> None:
    """Give the symbolic axes the names that users read: batch, sequence, target.

    Args:
        axes: the names by input; see `axis_names`.

    Raises:
        PeltError: E505 where an axis that was to be symbolic is not.
    """
    import onnx_ir as ir

    renamed: dict[str, str] = {}
    for value in model.graph.inputs:
        if value.name in axes:
            for axis, word in enumerate(axes[value.name]):
                size = value.shape[axis]
                if isinstance(size, int) or size.value is None:
                    raise fail(
                        "E505",
                        f"the exporter froze the {word} axis of '{value.name}' at {size}",
                        expected="a symbolic axis",
                    )
                renamed[size.value] = word

    def rename(value: Any) -> None:
        if value is not None and value.shape is not None:
            for axis, size in enumerate(value.shape):
                if not isinstance(size, int) and size.value in renamed:
                    value.shape[axis] = ir.SymbolicDim(renamed[size.value])

    for value in model.graph.inputs:
        if value.name in axes:
            rename(value)
    for node in model.graph.all_nodes():
        for output in node.outputs:
            rename(output)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep `transformers`' and the exporter's progress and warnings to themselves."""
    from transformers.utils import logging as talk

    level, bars = logging.root.manager.disable, talk.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    talk.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if bars:
            talk.enable_progress_bar()  # type: ignore[no-untyped-call]


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
