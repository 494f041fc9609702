"""What attached modules compute in a forward pass, and what they see of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from peltc.compiler.adapter.mathematics import Mathematics, mathematics, whole_digest
from peltc.compiler.adapter.provenance import DIGEST
from peltc.compiler.plan.claims import Claim, Plan
from peltc.compiler.survey.anatomy import Anatomy, Site
from peltc.runtime.training.draws import Draws
from peltc.runtime.training.interpreter import TorchInterpreter
from peltc.runtime.training.keeping import Keeping
from peltc.runtime.training.places import first_of, key_of, named_arguments
from peltc.runtime.training.reruns import remember_reruns
from peltc.runtime.training.saving import digest_tensor
from peltc.spec.diagnostics import fail
from peltc.spec.formula.interpreter import Deferred

Tensor = torch.Tensor


class Unpicklable:
    """A hook that no file can hold; a model tells of it where it is pickled, before anything else of its modules."""

    def __init__(self, hook: Callable[..., None]):
        self.hook = hook

    def __call__(self, *arguments: Any) -> None:
        self.hook(*arguments)

    def __deepcopy__(self, memo: Any) -> Unpicklable:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise fail("E209", "a model with modules attached cannot be pickled: its hooks are no part of a file",
                   hint="model.save_adapter(path) writes the modules; peltc.attach(model, spec, path) attaches them"
                   " where they are loaded")  # fmt: skip


class Evaluation(nn.Module):
    """What modules compute, and what they need to see for it: their parameters, and hooks that remember values."""

    def __init__(
        self, plan: Plan, values: Mapping[str, np.ndarray[Any, Any]], device: torch.device, given: frozenset[str]
    ):
        super().__init__()
        self.plan, self.given = plan, given
        self.anatomy: Anatomy | None = None
        held = frozenset(name for name, tensor in plan.tensors.items() if not tensor.source or name in given)
        self.mathematics: Mathematics = mathematics(plan, held, lambda tensor: values[tensor.name])
        self.register_buffer(DIGEST, digest_tensor(whole_digest(plan)).to(device))
        for name, tensor in plan.tensors.items():
            data = torch.from_numpy(np.array(values[name], np.float32)).to(device)
            self.register_parameter(key_of(name), nn.Parameter(data, requires_grad=not tensor.frozen))
        self.handles: list[Any] = []
        self.seen: dict[str, Tensor] = {}
        self.mask: Tensor | None = None
        self.decoder_mask: Tensor | None = None
        self.tokens: Tensor | None = None
        self.decoder_tokens: Tensor | None = None
        self.muted = False
        self.fired: set[str] = set()
        self.whole, self.seq2seq = True, False
        self.draws = Draws()
        self.keeping = Keeping(plan)
        self.restore: list[Callable[[], None]] = []

    def __deepcopy__(self, memo: Any) -> Any:
        raise fail("E209", "a model with modules attached cannot be copied: the copy would run the original's modules",
                   hint="copy the model first, then attach modules to each")  # fmt: skip

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter by its name in the weights file."""
        return self.get_parameter(key_of(name))

    def watcher(self, anchor: str) -> Callable[..., None]:
        """Remember what a module reads."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.muted:
                self.seen[anchor] = args[0] if args else next(iter(kwargs.values()))

        return hook

    def opening(self) -> Callable[..., None]:
        """A hook that remembers the mask when the model is called, and whether all of the model will run: it does not
        where an encoder's output or a cache is given. Layers with gradient checkpointing run again in the backward
        pass, and are told to remember the mask of their first run."""
        remember = bool(self.anchors) or any("mask" in claim.reads for claim in self.plan.claims)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = named_arguments(module, args, kwargs)
            self.mask, self.decoder_mask = given.get("attention_mask"), given.get("decoder_attention_mask")
            self.tokens = first_of(given, "input_ids", "inputs_embeds")
            if self.tokens is None and given.get("encoder_outputs") is not None:
                self.tokens = given["encoder_outputs"][0]
            self.decoder_tokens = first_of(given, "decoder_input_ids", "decoder_inputs_embeds", "labels")
            self.whole = given.get("encoder_outputs") is None and given.get("past_key_values") is None
            self.keeping.open(given)
            self.fired.clear()
            self.draws.clear()
            if getattr(module, "_is_replica", False):
                raise fail("E209", "modules do not work in the copies of the model that nn.DataParallel makes",
                           hint="start one process per device: torchrun, or accelerate launch")  # fmt: skip
            if remember and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                remember_reruns(module, self)

        return hook

    def encoding(self) -> Callable[..., None]:
        """A hook that remembers the mask when an encoder is called, as `generate` does before it calls the model."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = named_arguments(module, args, kwargs)
            self.mask, self.tokens = given.get("attention_mask"), first_of(given, "input_ids", "inputs_embeds")

        return hook

    def reading(self) -> Callable[..., None]:
        """A hook that sees whether a model goes on from a cache."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.keeping.open(named_arguments(module, args, kwargs))

        return hook

    def closing(self) -> Callable[..., None]:
        """Every module must have taken part: a site that the forward pass goes around is an error, not a no-op."""
        expected = {claim.site.key for claim in self.plan.claims if not claim.follows}

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.seen.clear()
            self.keeping.close(output)
            if self.whole and (missed := expected - self.fired):
                site = sorted(missed)[0]
                core = any(claim.site.key == site and claim.site.kind == "attention" for claim in self.plan.claims)
                raise fail(
                    "E209",
                    f"the model's forward pass does not go through {site}"
                    + f", since {type(module).__name__} does not call transformers' attention interface" * core,
                    expected="a model whose attention runs through transformers' attention interface" if core else "",
                    hint="`pelt compile --no-verify` deploys such modules, not held against PyTorch" if core else "",
                )

        return Unpicklable(hook)

    def enter(self, site: Site) -> None:
        """A site's modules take part, and draw anew."""
        self.fired.add(site.key)
        self.draws.enter(site)

    def scope(self, claim: Claim, interpreter: TorchInterpreter, **values: Any) -> dict[str, Any]:
        dtype = interpreter.like.dtype if interpreter.like is not None else torch.float32
        found: dict[str, Any] = {"mask": Deferred(partial(self.mask_of, claim, dtype))}
        for role in ("x", "r", "h"):
            anchor = claim.site.anchors.get(role, "")
            found[role] = Deferred(partial(self.recall, anchor, role, claim, dtype))
        own = {name: Deferred(partial(self.lifted, tensor.name, dtype)) for name, tensor in claim.tensors.items()}
        return claim.scope(found | values | own, interpreter)  # a parameter may have a name of other kinds of site

    def lifted(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.parameter(name).to(dtype)

    def recall(self, anchor: str, role: str, claim: Claim, dtype: torch.dtype) -> Tensor:
        if anchor not in self.seen:
            raise fail("E209", f"'{role}' of {claim.site.name} cannot be reached in torch")
        return self.seen[anchor].to(dtype)

    def mask_of(self, claim: Claim, dtype: torch.dtype) -> Tensor:
        """The mask of the tokens that a site sees, [B, S]: ones where the model was called without one."""
        behind = claim.site.stack == "decoder" and self.seq2seq and not claim.site.reads_encoder
        mask = self.decoder_mask if behind else self.mask
        if mask is None:
            tokens = self.decoder_tokens if behind else self.tokens
            if tokens is None:
                raise fail("E208", "a formula reads `mask`, and the model was called without one, and without tokens",
                           hint="give the model its mask")  # fmt: skip
            mask = tokens.new_ones(tokens.shape[:2])
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise fail("E209", "a formula reads `mask`, and the model was called with one that is not of its tokens",
                       expected="a mask [B, S], and a cache that grows")  # fmt: skip
        if self.keeping.begun and claim.grows:  # of a text that a cache holds the first tokens of
            tokens = self.decoder_tokens if behind else self.tokens
            mask = mask if tokens is None else mask[:, -tokens.shape[1] :]
        return mask.to(dtype)

    def evaluate(self, claim: Claim, effect: str, like: Tensor, **values: Any) -> Tensor:
        """A definition's value. Half-precision models compute their modules in float32, as they are trained."""
        wide = like.float() if like.dtype in (torch.float16, torch.bfloat16) else like
        interpreter = TorchInterpreter(self.training, wide, self.draws.of(claim))
        interpreter.held = self.keeping.of(claim, effect)
        lifted = {name: _lifted(value, wide.dtype) for name, value in values.items()}
        scope = self.scope(claim, interpreter, **lifted)
        try:
            result = interpreter.evaluate(claim.effects[effect], scope)
        finally:
            scope.clear()  # it refers to itself: its tensors would stay until the garbage collector comes
        if not isinstance(result, Tensor):
            result = torch.as_tensor(result, dtype=wide.dtype, device=wide.device)
        if effect not in ("keys", "values", "prepend"):  # what is the same for all is said once
            result = result.expand(like.shape)
        return result.to(like.dtype)

    def outputs(self, site: Site, claims: list[Claim], y: Tensor, **values: Any) -> Tensor:
        """Definitions of `delta` and `output`."""
        for claim in claims:
            if "delta" in claim.effects:
                y = y + self.evaluate(claim, "delta", y, y=y, **values)
            if "output" in claim.effects:
                y = self.evaluate(claim, "output", y, y=y, **values)
        return y

    def quietly(self, module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """A module's result with other parameters, this object's own hooks apart."""
        before, self.muted = self.muted, True
        try:
            result: Any = functional_call(module, parameters, (x,)) if parameters else module(x)
            found: Tensor = result[0] if isinstance(result, tuple) else result
            return found
        finally:
            self.muted = before


def on_first(hook: Callable[..., Tensor | None]) -> Callable[..., Any]:
    """A hook on what a module gives, or on the first of several things."""

    def wrapped(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return hook(module, args, output)
        new = hook(module, args, output[0])
        return None if new is None else (new, *output[1:])

    return wrapped


def _lifted(value: Any, dtype: torch.dtype) -> Any:
    """A value in the type that modules compute in; ids and functions as they are."""
    if isinstance(value, Deferred):
        return Deferred(lambda: _lifted(value(), dtype))
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
