"""Torch models to export from: on parameters without memory, or on those of a live module."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from peltc.spec.diagnostics import fail, first_line


def parse_config(content: Mapping[str, Any]) -> Any:
    """A config of `transformers`, from what its file says: infinity, which JSON lacks, is a mapping there."""
    from transformers import AutoConfig

    def number(mapping: dict[str, Any]) -> Any:
        return float(mapping["__float__"]) if mapping.keys() == {"__float__"} else mapping

    return AutoConfig.for_model(**json.loads(json.dumps(dict(content)), object_hook=number))


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


def keep_wide(model: Any) -> Any:
    """Keep in float32 what `transformers` keeps so where it loads a model in half precision: T5's last maps of its
    feed-forward networks, whose results float16 does not hold. It tells by names, and changes nothing in float32."""
    import re

    import torch

    plan = model._get_dtype_plan(model.dtype)
    for module_name, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            full = f"{module_name}.{name}" if module_name else name
            if tensor is None or not any(re.search(pattern.replace("*", ".*"), full) for pattern in plan):
                continue
            if name in module._parameters:
                module._parameters[name] = torch.nn.Parameter(tensor.to(torch.float32), False)
            elif tensor.is_floating_point():
                module._buffers[name] = tensor.to(torch.float32)
    return model


def replica(model: Any, precision: str = "", drop: Any = None) -> Any:
    """A copy of a live torch module, in eval mode and on the CPU. Its modules and buffers are its own; its parameters
    are those of the module, copied only where the type or the device changes.

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
            f"the torch module {type(model).__name__} cannot be copied: {type(error).__name__}: {first_line(error)}",
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


def held(model: Any, every: bool = False) -> dict[str, Any]:
    """What a checkpoint holds of a torch model, by name: its parameters, and the floating-point buffers that are stored
    with them, such as the running mean of a batch norm.

    Args:
        every: tell tied parameters by all their names, not by the first alone.
    """
    found = dict(model.named_parameters(remove_duplicate=not every))
    for path, module in model.named_modules(remove_duplicate=not every):
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}".lstrip(".")] = buffer
    return found


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep `transformers`' and the exporter's progress and warnings to themselves, and what torch writes of an export
    that fails: thousands of lines, besides the error."""
    from transformers.utils import logging as talk

    level, bars = logging.root.manager.disable, talk.is_progress_bar_enabled()
    logging.disable(logging.ERROR)
    talk.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if bars:
            talk.enable_progress_bar()  # type: ignore[no-untyped-call]
