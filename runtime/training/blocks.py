"""Modules at blocks, at attention cores, and before the sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peltc.compiler.plan.claims import Claim
from peltc.compiler.survey.anatomy import Site
from peltc.runtime.training.evaluation import Tensor, on_first
from peltc.runtime.training.experts import Experts
from peltc.runtime.training.interface import route
from peltc.runtime.training.places import container_of, named_arguments, owner_of
from peltc.runtime.training.stand_ins import StandIns, close_cache, open_cache, shown
from peltc.spec.diagnostics import fail
from peltc.spec.formula.dims import Dim


class Blocks(StandIns, Experts):
    """Modules at blocks, attention cores and before the sequence."""

    def install_block(self, model: Any, site: Site, claims: list[Claim]) -> None:
        anchor = site.anchors.get("y", "")
        if not anchor and site.role != "layer":
            raise fail("E209", f"{site.name} is not what a module of the model gives",
                       hint="attach to the maps within, or to the layer")  # fmt: skip
        module = owner_of(model, anchor) if anchor else container_of(model, site)

        def norm(z: Tensor) -> Tensor:
            before, self.muted = self.muted, True
            try:
                inner = owner_of(model, site.anchors["norm"])
                result: Tensor = inner(z.to(next(inner.parameters()).dtype))
                return result.to(z.dtype)
            finally:
                self.muted = before

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self.muted:
                return None
            self.enter(site)
            return self.outputs(site, claims, output, norm=norm)

        self.handles.append(module.register_forward_hook(on_first(hook)))

    def install_attention(self, model: Any, site: Site, claims: list[Claim]) -> None:
        path = site.anchors["core"].rpartition(".")[0].rpartition(".")[0]
        module = model.get_submodule(path)
        self.restore.append(route(model))
        added = [next(claim.added(e) for e in ("keys", "values") if e in claim.effects) for claim in claims]
        added = [(0, 0) if claim.takes else each for claim, each in zip(claims, added, strict=True)]
        before, behind = (sum(each) for each in zip(*added, strict=True))

        def change(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int, int]:
            self.enter(site)
            for claim in claims:
                now = {"q": query, "k": key[..., claim.takes :, :], "v": value[..., claim.takes :, :]}
                if "keys" in claim.effects:
                    key = self.evaluate(claim, "keys", now["k"], **now)
                if "values" in claim.effects:
                    value = self.evaluate(claim, "values", now["v"], **now)
            return key, value, before, behind

        module._pelt_change = change
        self.restore.append(lambda: delattr(module, "_pelt_change"))

    def install_embedding(self, model: Any, site: Site, claims: list[Claim]) -> None:
        """Put tokens before the sequence: either the model is called with embedded tokens, or its embedding returns
        more of them. They are cut off again after the layers or from the outputs. A cache holds them as well; where it
        tells its length, it tells that of the text."""
        table = model.get_input_embeddings()
        seq2seq = self.seq2seq
        behind, early = site.role == "embedding", claims[0].cut == "head"
        added = sum(Dim.of(claim.shape("prepend").dims[0]).constant or 0 for claim in claims)
        length, own, inside = {"whole": 0}, None, False

        def join(text: Tensor) -> Tensor:
            tokens = torch.cat([self.evaluate(c, "prepend", text) for c in claims])
            longer = torch.cat([tokens.expand(len(text), *tokens.shape), text], 1)
            length["whole"] = longer.shape[1]
            return longer

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal own, inside
            self.enter(site)
            kwargs, length["whole"], inside = named_arguments(module, args, kwargs), 0, True
            cache = None if seq2seq else kwargs.get("past_key_values")
            if behind and cache is not None:
                raise fail(
                    "E209",
                    "tokens that join behind the embedding do not work with a cache",
                    hint=f"attach them to '{site.name}.word', or call the model with use_cache=False",
                )
            begun = open_cache(cache) or (seq2seq and kwargs.get("encoder_outputs") is not None)
            own = kwargs.get("position_ids")
            if begun:
                kwargs |= {} if own is None else {"position_ids": own + added}
                kwargs["attention_mask"] = self.mask = shown(kwargs.get("attention_mask"), added)
                return (), kwargs
            text = kwargs.get("inputs_embeds")
            text = kwargs["input_ids"] if text is None else text
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

        def encode(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kwargs = named_arguments(module, args, kwargs)
            if inside or kwargs.get("input_ids") is None:  # the model's own call of its encoder
                return None
            text = join(table(kwargs["input_ids"]))
            return (), kwargs | {"input_ids": None, "inputs_embeds": text,
                                 "attention_mask": shown(kwargs.get("attention_mask"), added)}  # fmt: skip

        def leaving(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal inside
            inside = False

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            def cut(value: Any) -> Any:
                sequence = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == length["whole"]
                return value[:, added:] if sequence else value

            if isinstance(output, tuple):
                return output if seq2seq else tuple(cut(value) for value in output)
            if not seq2seq:
                close_cache(output.get("past_key_values"), added)
            for name in list(output.keys()):
                if not (seq2seq and name == "logits"):
                    output[name] = cut(output[name])
            return output

        def own_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            named = named_arguments(module, args, kwargs)
            return ((), named | {"position_ids": own}) if named.get("position_ids") is not None else None

        def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            return None if self.muted else output[:, added:]

        self.handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
        if behind:
            module = model.get_submodule(site.anchors["y"])
            self.handles.append(module.register_forward_hook(lambda m, args, output: join(output)))
            self.handles.append(module.register_forward_pre_hook(own_positions, with_kwargs=True))
        if early:
            self.handles.append(owner_of(model, site.anchors["end"]).register_forward_hook(leave))
        if seq2seq:
            encoder = model.get_encoder()
            self.handles.append(encoder.register_forward_pre_hook(encode, with_kwargs=True))
        self.handles.append(model.register_forward_hook(after, with_kwargs=True))
        self.handles.append(model.register_forward_hook(leaving, always_call=True))
