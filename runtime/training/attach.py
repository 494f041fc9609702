"""Modules attached to a `transformers` model, which stays an ordinary one: `Trainer`, `generate`, checkpoints work.

A site is reached through the torch module that owns its parameters: a linear map, a norm or a block by a hook on that
module, an attention core through `transformers`' attention interface, an embedding by the model's own inputs.

Any other torch module is reached by the same hooks, where a site's parameters have a torch module of their own that
computes the site and nothing else, which is tried; attention cores and embeddings are not reached there.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from peltc.compiler.adapter.mathematics import Mathematics, mathematics, whole_digest
from peltc.compiler.adapter.profile import pack
from peltc.compiler.adapter.provenance import DIGEST, check_file, provenance
from peltc.compiler.adapter.weights import check_arrays, inside, load_tensors, overridden, start_tensors
from peltc.compiler.artifact import write_whole
from peltc.compiler.base.live import is_known, survey_model
from peltc.compiler.export.torch_model import is_pretrained, replica
from peltc.compiler.files.checkpoint import read_header
from peltc.compiler.interpreters.numeric import OneHot
from peltc.compiler.plan.choice import check_choice
from peltc.compiler.plan.claims import LEVELS, Claim, Plan
from peltc.compiler.plan.planner import make_plan
from peltc.compiler.survey.anatomy import Anatomy, Site
from peltc.runtime.training.interpreter import TorchInterpreter
from peltc.runtime.training.saving import describe_base, digest_tensor, live_samples, record_base, warn_of_lost
from peltc.spec.diagnostics import Place, fail
from peltc.spec.foreign import refuse
from peltc.spec.formula.dims import Dim
from peltc.spec.formula.interpreter import Deferred
from peltc.spec.method import ROLES
from peltc.spec.specification import Spec, load_spec

Tensor = torch.Tensor
INTERFACE = "peltc"


def attach(
    model: Any,
    spec: Spec | str | Path | Mapping[str, Any],
    weights: str | Path | Mapping[str, np.ndarray[Any, Any]] | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
) -> Any:
    """Attach a spec's modules to a model, in place.

    Everything but the spec's own parameters is frozen. The model gains `save_adapter(path)`, which writes a file that
    the compiler reads, `save_profile(path)`, which packs masks over a bank to bits, and `detach_adapter()`, which takes
    the modules off again.

    Args:
        model: a model of `transformers`, or any other torch module.
        spec: a spec, its file, or its content.
        weights: a safetensors file, a profile's too, or arrays by tensor name; the spec's own where absent, else
            start values.
        inputs: example inputs by name for a module that `transformers` does not have; see `peltc.compile`.

    Returns:
        The same model.

    Raises:
        PeltError: whatever keeps the spec from fitting the model, as when compiling; E408 weights that were trained
            with other mathematics than the spec's. Weights of another base, or that say nothing of how they were
            trained, are warned of.
    """
    if not isinstance(spec, Spec):
        spec = load_spec(spec)
    if is_known(model):
        check_choice(spec, type(model).__name__, model.config.to_dict())
    source = weights
    if source is None and spec.weights:
        source = inside(spec.folder, spec.weights, spec.path)
    refuse(source, "weights")  # before anything takes time
    anatomy, fingerprint = survey_model(model, inputs)
    plan = make_plan(spec, anatomy, fingerprint)
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def read(name: str) -> np.ndarray[Any, Any]:
        return np.asarray(parameters[name].detach().float().cpu().numpy())

    sentences: list[str] = []
    if isinstance(source, Mapping):
        values = check_arrays(plan, source)
    elif source is None:
        values = start_tensors(plan, read)
    else:
        sentences = check_file(plan, Path(source), describe_base(model), live_samples(model))
        values = load_tensors(plan, Path(source))
    named = source if isinstance(source, Mapping) else () if source is None else read_header(Path(source))
    attach_plan(model, plan, values, overridden(plan, named))
    model.pelt.anatomy = anatomy
    for sentence in sentences:
        warnings.warn(sentence, stacklevel=2)
    return model


def attach_plan(
    model: Any, plan: Plan, values: Mapping[str, np.ndarray[Any, Any]], given: frozenset[str] = frozenset()
) -> Any:
    """Attach a plan's modules with tensors, of which those `given` stand in place of the spec's own sources; see
    `attach`."""
    if hasattr(model, "pelt"):
        raise fail("E209", "the model has modules attached already", hint="call model.detach_adapter() first")
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attached = Attached(plan, values, next(model.parameters()).device, given)
    try:
        attached.install(model)
    except BaseException:
        attached.uninstall()
        raise
    attached.restore.append(partial(_require, model, trained))
    _require(model, {})
    model.pelt = attached.train(model.training)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # code compiled before knows nothing of the modules
    model.save_adapter, model.save_profile = partial(attached.save, model), partial(attached.save_profile, model)
    model.detach_adapter = lambda: attached.remove(model)
    return model


def bare(model: Any) -> Any:
    """A torch model without the modules that are attached to it: a copy over the same parameters where there are any,
    or the model itself."""
    attached = getattr(model, "pelt", None)
    if attached is None:
        return model
    twin = replica(model, drop=attached)
    for module in twin.modules():
        vars(module).pop("_pelt_change", None)
    return twin


class Attached(nn.Module):
    """The modules of a plan: their parameters, and the hooks that bring them into the model's forward pass."""

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
            self.register_parameter(_key(name), nn.Parameter(data, requires_grad=not tensor.frozen))
        self.handles: list[Any] = []
        self.seen: dict[str, Tensor] = {}
        self.mask: Tensor | None = None
        self.decoder_mask: Tensor | None = None
        self.tokens: Tensor | None = None
        self.decoder_tokens: Tensor | None = None
        self.muted = False
        self.fired: set[str] = set()
        self.whole, self.seq2seq = True, False
        self.drawn: dict[str, dict[str, dict[Any, Tensor]]] = {}
        self.restore: list[Callable[[], None]] = []

    def __deepcopy__(self, memo: Any) -> Any:
        raise fail("E209", "a model with modules attached cannot be copied: the copy would run the original's modules",
                   hint="copy the model first, then attach modules to each")  # fmt: skip

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter by its name in the weights file."""
        return self.get_parameter(_key(name))

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

    # installation

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
            module = _owner(model, anchor)
            self.handles.append(module.register_forward_pre_hook(self.watcher(anchor), with_kwargs=True))
        self.handles.append(model.register_forward_pre_hook(self.opening(), with_kwargs=True))
        if not is_pretrained(model):
            for claims in groups.values():
                _check_reach(model, claims)
        ordered = sorted(groups.values(), key=lambda g: (LEVELS[g[0].site.kind], g[0].site.role == "layer"))
        for claims in ordered:
            kind = claims[0].site.kind if claims[0].mirrors is None else "mirror"
            getattr(self, f"install_{kind}")(model, claims[0].site, claims)
        self.handles.append(model.register_forward_hook(self.closing()))
        self.restore.append(partial(_forget_reruns, model))

    def watcher(self, anchor: str) -> Callable[..., None]:
        """Remember what a module reads."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.muted:
                self.seen[anchor] = args[0] if args else next(iter(kwargs.values()))

        return hook

    def opening(self) -> Callable[..., None]:
        """Remember the mask, and whether the whole model will run: not where an encoder's output or a cache is given.
        Checkpointed layers, which run again in the backward pass, are told to remember it too."""
        remember = bool(self.anchors) or any("mask" in claim.reads for claim in self.plan.claims)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = _named(module, args, kwargs)
            self.mask, self.decoder_mask = given.get("attention_mask"), given.get("decoder_attention_mask")
            self.tokens = _first(given, "input_ids", "inputs_embeds")
            if self.tokens is None and given.get("encoder_outputs") is not None:
                self.tokens = given["encoder_outputs"][0]
            self.decoder_tokens = _first(given, "decoder_input_ids", "decoder_inputs_embeds", "labels")
            self.whole = given.get("encoder_outputs") is None and given.get("past_key_values") is None
            self.fired.clear()
            if getattr(module, "_is_replica", False):
                raise fail("E209", "modules do not work in the copies of the model that nn.DataParallel makes",
                           hint="start one process per device: torchrun, or accelerate launch")  # fmt: skip
            if remember and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                _remember_reruns(module, self)

        return hook

    def closing(self) -> Callable[..., None]:
        """Every module must have taken part: a site that the forward pass goes around is an error, not a no-op."""
        expected = {claim.site.key for claim in self.plan.claims if not claim.follows}

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.seen.clear()
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

        return hook

    # evaluation

    def enter(self, site: Site) -> None:
        """A site's modules take part; what their definitions draw, keys and values say, is drawn anew and once."""
        self.fired.add(site.key)
        self.drawn[site.key] = {}

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
        return mask.to(dtype)

    def evaluate(self, claim: Claim, effect: str, like: Tensor, **values: Any) -> Tensor:
        """A definition's value. Half-precision models compute their modules in float32, as they are trained."""
        wide = like.float() if like.dtype in (torch.float16, torch.bfloat16) else like
        drawn = self.drawn.setdefault((claim.mirrors or claim.site).key, {}).setdefault(claim.attachment, {})
        interpreter = TorchInterpreter(self.training, wide, drawn)
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

    # sites

    def install_linear(self, model: Any, site: Site, claims: list[Claim]) -> None:
        module = _owner(model, site.parameters["weight"])
        index = _rows(site)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self.muted:
                return None
            self.enter(site)
            x, y = args[0], output
            changed = False
            parameters: dict[str, Tensor] = {}
            given = self.owned(site, module, parameters)
            for claim in claims:
                if "input" in claim.effects:
                    x, changed = self.evaluate(claim, "input", x, **{**given, "x": x}), True
            for role in ROLES:
                for claim in claims:
                    if role in claim.effects:
                        self.change(site, module, claim, role, parameters)
            given = self.owned(site, module, dict(parameters))
            extra = parameters.pop("extra", None)
            if changed or parameters:
                fresh = self.quietly(module, _leaves(site, parameters), x)
                y = fresh if index is None else _put(y, index, fresh[..., index])
            own = y if index is None else y[..., index]
            if extra is not None:
                own = own + extra
            own = self.outputs(site, claims, own, **given, x=x)
            return own if index is None else _put(y, index, own)

        self.handles.append(module.register_forward_hook(_on_first(hook)))

    @staticmethod
    def own(site: Site, module: nn.Module, role: str, parameters: Mapping[str, Tensor]) -> Tensor:
        """A site's weight [O, I] or bias [O] as it is by now, of a fused map its own rows; zeros for no bias."""
        index = _rows(site)
        full = parameters.get(role, getattr(module, _leaf(site, role), None))
        if full is None:
            like = next(module.parameters())
            return parameters.get("extra", like.new_zeros(site.sizes["out"]))
        turned = full.T if role == "weight" and site.transposed else full
        return turned if index is None else turned[index]

    def owned(self, site: Site, module: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Deferred]:
        """A site's weight and bias as formulas call them, for those that read them."""
        return {short: Deferred(partial(self.own, site, module, role, parameters)) for role, short in ROLES.items()}

    def change(self, site: Site, module: nn.Module, claim: Claim, role: str, parameters: dict[str, Tensor]) -> None:
        """A parameter as a claim defines it, [O, I] in the formula, put back into the module's own layout."""
        own = self.owned(site, module, parameters)
        new = self.evaluate(claim, role, own[ROLES[role]](), **own)
        full = parameters.get(role, getattr(module, _leaf(site, role), None))
        if full is None:
            parameters["extra"] = new
            return
        turned = full.T if role == "weight" and site.transposed else full
        if (index := _rows(site)) is not None:
            new = turned.index_copy(0, index.to(turned.device), new)
        parameters[role] = new.T if role == "weight" and site.transposed else new

    def install_table(self, model: Any, site: Site, claims: list[Claim]) -> None:
        """What ids pick: of plain lookups it is changed itself, of others the whole table is."""
        module = _owner(model, site.parameters["weight"])
        late = [c for c in claims if {"delta", "output"} & set(c.effects)]
        plain = late == claims and _looks_up(module, site)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if self.muted:
                return None
            self.enter(site)
            if plain:
                read = OneHot(args[0], site.sizes["in"], getattr(module, "padding_idx", None))
                return self.outputs(site, claims, output, **_turned(getattr(module, _leaf(site, "weight"))), x=read)
            leaf = _leaf(site, "weight")
            rows = self.rows(claims, getattr(module, leaf))
            before, self.muted = self.muted, True
            try:
                found: Tensor = functional_call(module, {leaf: rows}, args, kwargs)
                return found
            finally:
                self.muted = before

        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def rows(self, claims: list[Claim], table: Tensor) -> Tensor:
        """All rows of a table [V, D], as claims make them."""
        for claim in claims:
            if "weight" in claim.effects:
                turned = table.T
                table = self.evaluate(claim, "weight", turned, W=turned).T
        for claim in claims:
            if "bias" in claim.effects:
                table = table + self.evaluate(claim, "bias", table[0], b=torch.zeros_like(table[0]))
        return self.outputs(claims[0].site, claims, table, **_turned(table), x=OneHot(None, len(table)))

    def install_mirror(self, model: Any, site: Site, claims: list[Claim]) -> None:
        """A map, or another table, that has the rows of the table that it is the same tensor as."""
        table = claims[0].mirrors
        assert table is not None
        own = [replace(claim, site=table) for claim in claims]
        module, owner = _owner(model, site.parameters["weight"]), _owner(model, table.parameters["weight"])

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.muted:
                return None
            rows = self.rows(own, getattr(owner, _leaf(table, "weight")))
            before, self.muted = self.muted, True
            try:
                return functional_call(module, {_leaf(site, "weight"): rows}, args, kwargs)
            finally:
                self.muted = before

        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def install_norm(self, model: Any, site: Site, claims: list[Claim]) -> None:
        module = _owner(model, site.parameters["weight"])

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if getattr(module, "_pelt_inner", False):
                return None
            self.enter(site)
            parameters = self.affinities(module, site, claims)
            y = output
            if parameters:
                before, self.muted = self.muted, True  # a layer may end in this very module
                module._pelt_inner = True  # type: ignore[assignment]
                try:
                    y = functional_call(module, _leaves(site, parameters), args)
                finally:
                    self.muted = before
                    module._pelt_inner = False  # type: ignore[assignment]
            return self.outputs(site, claims, y, **self.gains(module, site, parameters), x=args[0])

        self.handles.append(module.register_forward_hook(hook))

    def affinities(self, module: nn.Module, site: Site, claims: list[Claim]) -> dict[str, Tensor]:
        """A norm's gain and bias as claims define them, by role; only those that they change."""
        parameters: dict[str, Tensor] = {}
        for role, short in ROLES.items():
            for claim in claims:
                if role in claim.effects:
                    own = self.gains(module, site, parameters)
                    parameters[role] = self.evaluate(claim, role, own[short], **own)
        return parameters

    @staticmethod
    def gains(module: nn.Module, site: Site, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A norm's gain and bias as they are by now, as formulas call them; zeros for no bias."""
        gain: Tensor = getattr(module, _leaf(site, "weight"))
        return {short: parameters.get(role, getattr(module, _leaf(site, role)))
                if role in site.parameters else torch.zeros_like(gain) for role, short in ROLES.items()}  # fmt: skip

    def install_block(self, model: Any, site: Site, claims: list[Claim]) -> None:
        anchor = site.anchors.get("y", "")
        if not anchor and site.role != "layer":
            raise fail("E209", f"{site.name} is not what a module of the model gives",
                       hint="attach to the maps within, or to the layer")  # fmt: skip
        module = _owner(model, anchor) if anchor else _container(model, site)

        def norm(z: Tensor) -> Tensor:
            before, self.muted = self.muted, True
            try:
                inner = _owner(model, site.anchors["norm"])
                result: Tensor = inner(z.to(next(inner.parameters()).dtype))
                return result.to(z.dtype)
            finally:
                self.muted = before

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self.muted:
                return None
            self.enter(site)
            return self.outputs(site, claims, output, norm=norm)

        self.handles.append(module.register_forward_hook(_on_first(hook)))

    def install_attention(self, model: Any, site: Site, claims: list[Claim]) -> None:
        path = site.anchors["core"].rpartition(".")[0].rpartition(".")[0]
        module = model.get_submodule(path)
        self.restore.append(_route(model))
        added = [next(claim.added(e) for e in ("keys", "values") if e in claim.effects) for claim in claims]
        before, behind = (sum(each) for each in zip(*added, strict=True))

        def change(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int, int]:
            self.enter(site)
            for claim in claims:
                now = {"q": query, "k": key, "v": value}
                if "keys" in claim.effects:
                    key = self.evaluate(claim, "keys", now["k"], **now)
                if "values" in claim.effects:
                    value = self.evaluate(claim, "values", now["v"], **now)
            return key, value, before, behind

        module._pelt_change = change
        self.restore.append(lambda: delattr(module, "_pelt_change"))

    def install_embedding(self, model: Any, site: Site, claims: list[Claim]) -> None:
        """Tokens before the sequence: the model is called with embedded tokens, or its embedding gives more of them;
        what follows the layers, or the outputs, are cut."""
        table = model.get_input_embeddings()
        seq2seq = self.seq2seq
        behind, early = site.role == "embedding", claims[0].cut == "head"
        added = sum(Dim.of(claim.shape("prepend").dims[0]).constant or 0 for claim in claims)
        length, own = {"whole": 0}, None

        def join(text: Tensor) -> Tensor:
            tokens = torch.cat([self.evaluate(c, "prepend", text) for c in claims])
            longer = torch.cat([tokens.expand(len(text), *tokens.shape), text], 1)
            length["whole"] = longer.shape[1]
            return longer

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal own
            self.enter(site)
            kwargs = _named(module, args, kwargs)
            if kwargs.get("past_key_values") is not None or kwargs.get("encoder_outputs") is not None:
                raise fail("E209", "tokens before the sequence do not work with a cache in torch yet",
                           hint="call the model with use_cache=False, without generate()")  # fmt: skip
            text = kwargs.get("inputs_embeds")
            text = kwargs["input_ids"] if text is None else text
            own = kwargs.get("position_ids")
            if own is not None:  # the text's begin where the tokens' end
                steps = torch.arange(added, device=own.device)
                kwargs["position_ids"] = torch.cat([own.amin(-1, keepdim=True) + steps, own + added], -1)
            if not behind:
                text = table(text) if kwargs.get("inputs_embeds") is None else text
                kwargs |= {"input_ids": None, "inputs_embeds": join(text)}
            fills = {"attention_mask": 1}
            fills |= {} if behind else {"token_type_ids": 0}
            fills |= {} if seq2seq or early else {"labels": -100}
            for name, fill in fills.items():
                given = kwargs.get(name)
                if isinstance(given, Tensor) and given.shape[:2] == text.shape[:2]:
                    kwargs[name] = torch.cat([given.new_full((len(given), added), fill), given], 1)
            self.mask = kwargs.get("attention_mask")
            return (), kwargs

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            def cut(value: Any) -> Any:
                sequence = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == length["whole"]
                return value[:, added:] if sequence else value

            if isinstance(output, tuple):
                return output if seq2seq else tuple(cut(value) for value in output)
            for name in list(output.keys()):
                if not (seq2seq and name == "logits"):
                    output[name] = cut(output[name])
            return output

        def own_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            named = _named(module, args, kwargs)
            return ((), named | {"position_ids": own}) if named.get("position_ids") is not None else None

        def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            return None if self.muted else output[:, added:]

        self.handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
        if behind:
            module = model.get_submodule(site.anchors["y"])
            self.handles.append(module.register_forward_hook(lambda m, args, output: join(output)))
            self.handles.append(module.register_forward_pre_hook(own_positions, with_kwargs=True))
        if early:
            self.handles.append(_owner(model, site.anchors["end"]).register_forward_hook(leave))
        self.handles.append(model.register_forward_hook(after, with_kwargs=True))


class Rerun:
    """Checkpointing of a layer. When it runs again, in the backward pass, it sees the masks of its first run, whatever
    the model was called with since, and what it remembers itself goes when it ends."""

    def __init__(self, checkpoint: Callable[..., Any], attached: Attached):
        self.checkpoint, self.attached = checkpoint, attached

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        own, first = self.attached, True
        masks = own.mask, own.decoder_mask

        def run(*inputs: Any, **more: Any) -> Any:
            nonlocal first
            if first:
                first = False
                return layer(*inputs, **more)
            before = own.mask, own.decoder_mask, own.seen
            own.mask, own.decoder_mask, own.seen = *masks, {}
            try:
                return layer(*inputs, **more)
            finally:
                own.mask, own.decoder_mask, own.seen = before

        return self.checkpoint(run, *args, **kwargs)


def _remember_reruns(model: nn.Module, attached: Attached) -> None:
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            checkpoint: Any = getattr(layer, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not isinstance(checkpoint, Rerun):
                layer._gradient_checkpointing_func = Rerun(checkpoint, attached)  # type: ignore[assignment]


def _forget_reruns(model: nn.Module) -> None:
    for layer in model.modules():
        checkpoint: Any = getattr(layer, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, Rerun):
            layer._gradient_checkpointing_func = checkpoint.checkpoint  # type: ignore[assignment]


def _on_first(hook: Callable[..., Tensor | None]) -> Callable[..., Any]:
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


def _turned(table: Tensor) -> dict[str, Deferred]:
    """A table [V, D] as formulas see it: the weight [D, V] of a linear map of one-hot ids, which has no bias."""
    return {"W": Deferred(lambda: table.T), "b": Deferred(lambda: torch.zeros_like(table[0]))}


def _key(name: str) -> str:
    """A tensor's name as torch takes it for a parameter."""
    return name.replace(".", "/")


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    names = [n for n in inspect.signature(model.forward).parameters if n != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _first(given: Mapping[str, Any], *names: str) -> Any:
    """The first of a call's arguments that is there."""
    return next((given[name] for name in names if given.get(name) is not None), None)


def _require(model: nn.Module, trained: Mapping[str, bool]) -> None:
    """Which of the base's parameters are trained; none that is not named."""
    for name, parameter in model.named_parameters():
        if not name.startswith("pelt."):
            parameter.requires_grad_(trained.get(name, False))


def _owner(model: Any, parameter: str) -> nn.Module:
    module: nn.Module = model.get_submodule(parameter.rpartition(".")[0])
    return module


def _leaf(site: Site, role: str) -> str:
    """What the torch module that owns a site's parameter calls it."""
    return site.parameters.get(role, role).rpartition(".")[2]


def _leaves(site: Site, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_leaf(site, role): tensor for role, tensor in parameters.items()}


def _check_reach(model: nn.Module, claims: list[Claim]) -> None:
    """Whether hooks reach a site of a torch module that is no model of `transformers`: elsewhere, a torch module may
    own several maps as bare parameters, and its input and output be those of none.

    Raises:
        PeltError: E209 they do not, and why.
    """
    site = claims[0].site
    kind = type(model).__name__
    if site.kind == "attention":
        raise fail("E209", f"the attention of {kind} cannot be reached at {site.name}",
                   expected="a model of transformers: attention cores are reached through its attention interface",
                   hint="linear maps, norms and blocks of any torch module are reached")  # fmt: skip
    if site.kind == "embedding":
        raise fail("E209", f"{kind} cannot be given tokens before its sequence, at {site.name}",
                   expected="a model of transformers that takes 'inputs_embeds'")  # fmt: skip
    roles = {role for claim in claims for role in ("x", "r", "h") if role in claim.reads}
    anchors = {site.anchors.get(role, "") for role in roles}
    if site.kind == "block":
        anchors.add(site.anchors.get("y", ""))
        if site.role == "layer" and not _lists(model, site):
            raise fail("E209", f"{site.name} cannot be reached in torch: the layers of {kind} are in no nn.ModuleList")
    else:
        anchors.add(site.parameters["weight"])
    for name in sorted(anchors - {""}):
        owner = _owner(model, name)
        own = [n for n, _ in owner.named_parameters()]
        mine = {_leaf(site, role) for role in site.parameters} if name == site.parameters.get("weight") else set(own)
        if len(own) > 2 or any("." in n for n in own) or {*own} != mine:
            raise fail("E209", f"{site.name} cannot be reached in torch: {type(owner).__name__}, which owns '{name}',"
                               f" has more parameters: {', '.join(own[:6])}",
                       expected="a torch module of its own for each map and norm, such as nn.Linear")  # fmt: skip
    if site.kind == "linear" and not _maps(_owner(model, site.parameters["weight"]), site):
        owner = _owner(model, site.parameters["weight"])
        raise fail("E209", f"{site.name} cannot be reached in torch: {type(owner).__name__}, which owns"
                           f" '{site.parameters['weight']}', computes something else than this map",
                   expected="a torch module of its own for each linear map, such as nn.Linear")  # fmt: skip


def _maps(module: nn.Module, site: Site) -> bool:
    """Whether a torch module computes x Wᵀ + b, tried on random numbers."""
    weight = getattr(module, _leaf(site, "weight")).detach()
    turned = weight.T if site.transposed else weight
    bias = getattr(module, _leaf(site, "bias")).detach() if "bias" in site.parameters else None
    random = torch.Generator().manual_seed(0)
    x = torch.randn((2, 3, turned.shape[1]), generator=random).to(turned)
    try:
        with torch.no_grad():
            found, expected = module.forward(x), nn.functional.linear(x, turned, bias)
        error, size = (found - expected).abs().max(), expected.abs().max()
    except Exception:  # whatever it wants, it is no linear map
        return False
    near = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    return bool(found.shape == expected.shape and error <= near * size)


def _looks_up(module: nn.Module, site: Site) -> bool:
    """Whether a torch module gives the rows that ids pick, as they are, tried on a few."""
    weight = getattr(module, _leaf(site, "weight")).detach()
    ids = torch.arange(min(len(weight), 5), device=weight.device)[None]
    try:
        with torch.no_grad():
            found = module.forward(ids)
    except Exception:  # whatever it wants, it is no plain lookup
        return False
    return isinstance(found, Tensor) and torch.equal(found, weight[ids])


def _lists(model: nn.Module, site: Site) -> bool:
    """Whether a layer is an item of a list."""
    parts = site.anchors.get("x", "").split(".")
    paths = [".".join(parts[:i]) for i, part in enumerate(parts) if part.isdigit()]
    return any(isinstance(model.get_submodule(path), nn.ModuleList) for path in paths)


def _container(model: Any, site: Site) -> nn.Module:
    """The module of a whole layer: the last list item on the way to a parameter of the layer."""
    parts = site.anchors["x"].split(".")
    last = max(i for i, part in enumerate(parts) if part.isdigit() and isinstance(
        model.get_submodule(".".join(parts[:i])), nn.ModuleList) and not any(
        q.isdigit() for q in parts[:i]))  # fmt: skip
    module: nn.Module = model.get_submodule(".".join(parts[: last + 1]))
    return module


def _rows(site: Site) -> Tensor | None:
    if site.rows is None:
        return None
    return torch.cat([torch.arange(a, b) for a, b in site.rows])


def _put(y: Tensor, index: Tensor, part: Tensor) -> Tensor:
    return y.index_copy(-1, index.to(y.device), part)


def _route(model: Any) -> Callable[[], None]:
    """Send the model's attention through this module; returns how to undo it."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask

    def masks(*args: Any, **kwargs: Any) -> Any:
        # A mask that is left out because it is plainly causal could not be made longer.
        kwargs["allow_is_causal_skip"] = False
        return sdpa_mask(*args, **kwargs)

    if INTERFACE not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
        AttentionInterface.register(INTERFACE, _attention)
        AttentionMaskInterface.register(INTERFACE, masks)
    before = model.config._attn_implementation
    if before == INTERFACE:
        return lambda: None
    if before != "sdpa":
        raise fail("E209", f"the model's attention is '{before}'", expected="attn_implementation='sdpa'",
                   hint="load the model with attn_implementation='sdpa'")  # fmt: skip
    model.set_attn_implementation(INTERFACE)
    return lambda: model.set_attn_implementation(before)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """`sdpa` attention over the keys and values that the modules define."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    change = getattr(module, "_pelt_change", None)
    if change is not None:
        key, value, before, behind = change(query, key, value)
        if before or behind:
            if attention_mask is not None:
                attention_mask = _longer(attention_mask, before, behind, attention_mask.dtype == torch.bool)
            if kwargs.get("position_bias") is not None:
                kwargs["position_bias"] = _longer(kwargs["position_bias"], before, behind, False)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _longer(mask: Tensor, before: int, behind: int, fill: bool) -> Tensor:
    """A mask [..., T] that shows the positions before and behind the text's too."""
    return nn.functional.pad(mask, (before, behind), value=fill)
