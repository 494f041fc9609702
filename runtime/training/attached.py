"""Modules in a torch model: installed site by site, saved, and taken off again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peltc.compiler.adapter.profile import pack
from peltc.compiler.adapter.provenance import DIGEST, provenance
from peltc.compiler.artifact import write_whole
from peltc.compiler.export.torch_model import is_pretrained
from peltc.compiler.plan.claims import LEVELS, Claim
from peltc.runtime.training.blocks import Blocks
from peltc.runtime.training.places import owner_of
from peltc.runtime.training.reach import check_reach
from peltc.runtime.training.reruns import forget_reruns
from peltc.runtime.training.saving import record_base, warn_of_lost
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

    def save(self, model: Any, path: str | Path) -> None:
        """Write the adapter's tensors as safetensors, float32, names as the compiler expects them, with what they were
        trained as and on in the metadata. Parameters of the model that are trained and not in the file are told."""
        from safetensors.numpy import save

        warn_of_lost(model, self.plan, self.anatomy, 2)
        said = provenance(self.mathematics, record_base(model, self.plan))
        write_whole(Path(path), save(self.tensors(), said.metadata()))

    def save_profile(self, model: Any, path: str | Path) -> None:
        """Write what is this profile's own: hard masks over a bank as bits, and whatever else is trained. Parameters of
        the model that are trained and not in the file are told.

        Raises:
            PeltError: E211 the spec has no hard mask over a bank.
        """
        warn_of_lost(model, self.plan, self.anatomy, 2)
        every = {name: self.parameter(name).detach().float().cpu().numpy() for name in self.plan.tensors}
        write_whole(Path(path), pack(self.plan, every))

    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        """The tensors by their names in the weights file, float32; those of other sources are not among them."""
        own = [name for name, tensor in self.plan.tensors.items() if not tensor.source or name in self.given]
        return {name: self.parameter(name).detach().float().cpu().contiguous().numpy() for name in own}

    def remove(self, model: Any) -> None:
        """Take the modules off the model."""
        self.uninstall()
        for name in ("pelt", "save_adapter", "save_profile", "detach_adapter"):
            delattr(model, name)

    def uninstall(self) -> None:
        """Take the hooks away and undo what was changed besides."""
        for handle in self.handles:
            handle.remove()
        for undo in self.restore:
            undo()

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
        if not is_pretrained(model):
            for claims in groups.values():
                check_reach(model, claims)
        ordered = sorted(groups.values(), key=lambda g: (LEVELS[g[0].site.kind], g[0].site.role == "layer"))
        for claims in ordered:
            kind = claims[0].site.kind if claims[0].mirrors is None else "mirror"
            getattr(self, f"install_{kind}")(model, claims[0].site, claims)
        self.handles.append(model.register_forward_hook(self.closing()))
        self.restore.append(partial(forget_reruns, model))
