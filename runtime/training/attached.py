"""Modules in a torch model: installed site by site, saved, and taken off again."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from peltc.compiler.adapter.profile import pack
from peltc.compiler.adapter.provenance import DIGEST, check_file, provenance
from peltc.compiler.adapter.weights import load_tensors
from peltc.compiler.export.torch_model import is_pretrained
from peltc.compiler.files.manifest import write_whole
from peltc.compiler.plan.claims import LEVELS, Claim, Plan
from peltc.runtime.training.blocks import Blocks
from peltc.runtime.training.merging import merge
from peltc.runtime.training.places import owner_of
from peltc.runtime.training.reach import check_reach
from peltc.runtime.training.reruns import forget_reruns
from peltc.runtime.training.saving import describe_base, live_samples, record_base, warn_of_lost
from peltc.spec.diagnostics import Place, fail


class Attached(Blocks):
    """The modules of a plan: their parameters, and the hooks that bring them into the model's forward pass."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """What the modules compute is known from the plan. A state of other modules is refused; one from before states
        told of it is taken.

        Raises:
            PeltError: E415.
        """
        own, key = getattr(self, DIGEST), prefix + DIGEST
        given = state_dict.get(key)
        if given is not None and not torch.equal(given.to(own.device), own):
            raise fail("E415", "the state is of modules with other formulas, options or sites than the attached ones",
                       Place(self.plan.spec.path), "the spec that it was trained with")  # fmt: skip
        state_dict[key] = own
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def offers(self) -> dict[str, Callable[..., Any]]:
        """What a model gains, by name: functions whose first argument is the model."""
        return {
            "save_adapter": self.save,
            "load_adapter": self.load,
            "save_profile": self.save_profile,
            "disable_adapter": self.disabled,
            "merge_adapter": self.merge,
            "detach_adapter": self.remove,
            "print_trainable_parameters": print_trained,
        }

    def save(self, model: Any, path: str | Path) -> None:
        """Write the adapter's tensors as a safetensors file, in float32 and under the names that the compiler expects.
        The file's metadata says with which formulas and options they were trained, and on which base. A warning names
        the model's parameters that are trained and that the file does not hold."""
        from safetensors.numpy import save

        warn_of_lost(model, self.plan, self.anatomy, 2)
        said = provenance(self.mathematics, record_base(model, self.plan))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(path), save(self.tensors(), said.metadata()))

    def load(self, model: Any, path: str | Path) -> None:
        """Take the tensors of a file that `save_adapter` or `save_profile` wrote. A warning says where they were
        trained on another base, or where the file does not say how they were trained.

        Raises:
            PeltError: E4xx what is wrong with the file; E408 it was trained with other mathematics.
        """
        values, sentences = read_adapter(model, self.plan, Path(path))
        with torch.no_grad():
            for name, value in values.items():
                self.parameter(name).copy_(torch.from_numpy(np.array(value, np.float32)))
        for sentence in sentences:
            warnings.warn(sentence, stacklevel=2)

    def save_profile(self, model: Any, path: str | Path) -> None:
        """Write what is this profile's own: the hard masks over a bank, a bit for each module, and whatever else is
        trained. A warning names the model's parameters that are trained and that the file does not hold.

        Raises:
            PeltError: E211 the spec has no hard mask over a bank.
        """
        warn_of_lost(model, self.plan, self.anatomy, 2)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        every = {name: self.parameter(name).detach().float().cpu().numpy() for name in self.plan.tensors}
        write_whole(Path(path), pack(self.plan, every))

    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        """The tensors by their names in the weights file, float32; those of other sources are not among them."""
        own = [name for name, tensor in self.plan.tensors.items() if not tensor.source or name in self.given]
        return {name: self.parameter(name).detach().float().cpu().contiguous().numpy() for name in own}

    def merge(self, model: Any) -> None:
        """Write the modules into the model's weights and take them off: a plain model that computes the same is left.

        Raises:
            PeltError: E209 not all of the modules fold into weights that the model has; nothing is changed then.
        """
        assert self.anatomy is not None, "`attach` tells the sites"
        every = {name: self.parameter(name).detach().float().cpu().numpy() for name in self.plan.tensors}
        with self.disabled(model):
            merge(model, self.plan, self.anatomy, every)
        self.remove(model)

    def remove(self, model: Any) -> None:
        """Take the modules off the model, which is then as it was: nothing of theirs is left on it. Once more does
        nothing."""
        self.uninstall()
        for name in ("pelt", *self.offers()) if getattr(model, "pelt", None) is self else ():
            delattr(model, name)

    @contextmanager
    def disabled(self, model: Any) -> Iterator[Any]:
        """The model without its modules, for as long as the context lasts."""
        self.uninstall()
        try:
            yield model
        finally:
            self.install(model)
            self.freeze(model)

    def freeze(self, model: Any) -> None:
        """Train none of the base's parameters. Code that was compiled before knows nothing of the modules."""
        trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.restore.append(partial(_require, model, trained))
        _require(model, {})
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()

    def uninstall(self) -> None:
        """Take the hooks away and undo what was changed besides."""
        while self.handles:
            self.handles.pop(0).remove()
        while self.restore:
            self.restore.pop(0)()

    def install(self, model: Any) -> None:
        """Register every hook, sites that lie within others first."""
        self.seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        groups: dict[str, list[Claim]] = {}
        for claim in self.plan.claims:
            if claim.mirrors is not None or not claim.follows:  # what several sites share runs for all of them
                groups.setdefault(claim.site.key, []).append(claim)
        anchors = set()
        for claim in self.plan.claims:
            anchors |= {claim.site.anchors.get(role, "") for role in ("x", "r", "h") if role in claim.reads}
        self.anchors = sorted(a for a in anchors if a)
        for anchor in self.anchors:
            module = owner_of(model, anchor)
            self.handles.append(module.register_forward_pre_hook(self.watcher(anchor), with_kwargs=True))
        self.handles.append(model.register_forward_pre_hook(self.opening(), with_kwargs=True))
        self.handles.append(model.register_forward_hook(self.closing()))
        if not is_pretrained(model):
            for claims in groups.values():
                check_reach(model, claims)
        ordered = sorted(groups.values(), key=lambda g: (LEVELS[g[0].site.kind], g[0].site.role == "layer"))
        for claims in ordered:
            kind = claims[0].site.kind if claims[0].mirrors is None else "mirror"
            getattr(self, f"install_{kind}")(model, claims[0].site, claims)
        if taking := next((claim for claim in self.plan.claims if claim.takes), None):
            self.install_stand_ins(model, taking)
        if self.seq2seq and any(c.site.stack == "encoder" and "mask" in c.reads for c in self.plan.claims):
            encoder = model.get_encoder()
            self.handles.append(encoder.register_forward_pre_hook(self.encoding(), with_kwargs=True))
        body = getattr(model, "base_model", model)
        if body is not model and self.keeping.concerned:  # which may be called without its head
            self.handles.append(body.register_forward_pre_hook(self.reading(), with_kwargs=True))
            self.handles.append(body.register_forward_hook(lambda module, args, output: self.keeping.close(output)))
        if self.keeping.keeps and hasattr(model, "generate"):
            self.restore.append(self.keeping.guard(model))
        self.restore.append(partial(forget_reruns, model))


def _require(model: nn.Module, trained: Mapping[str, bool]) -> None:
    """Which of the base's parameters are trained; none that is not named."""
    for name, parameter in model.named_parameters():
        if not name.startswith("pelt."):
            parameter.requires_grad_(trained.get(name, False))


def read_adapter(model: Any, plan: Plan, file: Path) -> tuple[dict[str, np.ndarray[Any, Any]], list[str]]:
    """The tensors of an adapter's file for a plan on a live model, and what should be warned of.

    Raises:
        PeltError: E4xx what is wrong with the file; E408 it was trained with other mathematics.
    """
    sentences = check_file(plan, file, describe_base(model), live_samples(model))
    return load_tensors(plan, file), sentences


def print_trained(model: Any) -> None:
    """Print how many values of a model are trained, in all, and as a share."""
    trained, total = (sum(p.numel() for p in model.parameters() if p.requires_grad or all) for all in (False, True))
    print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / max(total, 1):.4f}")
