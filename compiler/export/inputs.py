"""What a model is exported with, and what its inputs and outputs are called."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from peltc.compiler.export.exported import AXES, BATCH, SEQUENCE, TARGET
from peltc.spec.diagnostics import fail, nearest


def check_inputs(model: Any, inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Example inputs of a torch module, as tensors on the CPU.

    Raises:
        PeltError: E506 what is wrong with them.
    """
    import torch

    expected = "example_inputs={name: tensor [B, S, ...]}, as the module's forward takes them"
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
        if not tensor.dim() or min(tensor.shape[: 1 if pictured(tensor) else 2]) < 2:
            raise fail("E506", f"the example input '{name}' has the shape {list(tensor.shape)}",
                       expected="at least 2 of each: torch takes an axis of size 1 for a constant")  # fmt: skip
        found[name] = tensor
    batches = {name: len(tensor) for name, tensor in found.items()}
    if len({*batches.values()}) > 1:
        raise fail("E506", f"the example inputs have different batches: {batches}",
                   expected="one batch size: axis 0 is the batch")  # fmt: skip
    return found


def axis_names(inputs: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """What the symbolic axes of each input are called: `batch`, and one word for all that are equally long. Of images
    the batch alone may have any size."""
    long = {name: [int(n) for n in t.shape[1:2]] if not pictured(t) else [] for name, t in inputs.items()}
    lengths = list(dict.fromkeys(n for sizes in long.values() for n in sizes))
    words = {n: AXES[i] if i < len(AXES) else f"length_{i}" for i, n in enumerate(lengths)}
    return {name: ("batch", *(words[n] for n in sizes)) for name, sizes in long.items()}


def pictured(tensor: Any) -> bool:
    """Whether an input is of images [B, C, H, W] or videos, whose axis 1 is no length."""
    return bool(tensor.dim() >= 4 and tensor.is_floating_point())


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
