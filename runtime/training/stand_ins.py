"""Tokens before the text of a torch model whose keys and values others take the place of.

Whatever the model derives from lengths and masks, positions above all, is that of a longer text. The tokens leave
before a head that reads an encoder's first token, or from the outputs; a cache holds them as well, and where it tells
its length, it tells that of the text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peltc.compiler.plan.claims import Claim
from peltc.runtime.training.evaluation import Tensor
from peltc.runtime.training.maps import Maps
from peltc.runtime.training.places import named_arguments, owner_of
from peltc.spec.diagnostics import fail


def shown(mask: Any, added: int) -> Any:
    """A mask of a text [B, S] that shows tokens before it too; none where there is none."""
    if mask is not None and mask.dim() != 2:
        raise fail("E209", f"tokens before the sequence do not work with a mask of {mask.dim()} axes",
                   expected="a mask of the text's tokens, [B, S], and a cache that grows")  # fmt: skip
    return mask if mask is None else torch.cat([mask.new_ones(len(mask), added), mask], 1)


def open_cache(cache: Any) -> bool:
    """Let a cache tell its whole length again; whether there is anything in it."""
    if cache is None:
        return False
    vars(cache).pop("get_seq_length", None)
    return int(cache.get_seq_length()) > 0


def close_cache(cache: Any, added: int) -> None:
    """Let a cache tell the length of the text in it, without tokens before."""
    if hasattr(cache, "get_seq_length"):
        whole = type(cache).get_seq_length
        cache.get_seq_length = lambda *layer, **named: whole(cache, *layer, **named) - added


class StandIns(Maps):
    """Tokens whose places keys and values take."""

    def install_stand_ins(self, model: Any, claim: Claim) -> None:
        """Put as many tokens before the text that a claim's sites read as the claim takes positions."""
        added, seq2seq = claim.takes, self.seq2seq
        early = claim.site.stack == "encoder"
        own = "decoder_" if seq2seq else ""
        some = int(getattr(model.config, "pad_token_id", None) == 0)
        whole = 0

        def longer(value: Tensor, fill: float) -> Tensor:
            return torch.cat([value.new_full((len(value), added, *value.shape[2:]), fill), value], 1)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal whole
            whole, kwargs = 0, named_arguments(module, args, kwargs)
            begun = open_cache(kwargs.get("past_key_values"))
            kwargs[f"{own}attention_mask"] = shown(kwargs.get(f"{own}attention_mask"), added)
            positions = kwargs.get(f"{own}position_ids")
            if positions is not None:  # the text's begin where the tokens' end
                first = positions.amin(-1, keepdim=True) + torch.arange(added, device=positions.device)
                kwargs[f"{own}position_ids"] = torch.cat([*([] if begun else [first]), positions + added], -1)
            ids, embeds, labels = (kwargs.get(name) for name in (f"{own}input_ids", f"{own}inputs_embeds", "labels"))
            if ids is None and embeds is None and seq2seq and labels is not None:
                ids = model.prepare_decoder_input_ids_from_labels(labels)
            text = ids if ids is not None else embeds
            if text is not None and not begun:
                named = {f"{own}input_ids": longer(ids, some)} if ids is not None else {
                    f"{own}inputs_embeds": longer(text, 0.0)}  # fmt: skip
                kinds = kwargs.get("token_type_ids")
                named |= {"token_type_ids": longer(kinds, 0)} if kinds is not None and not own else {}
                if labels is not None and labels.shape[:2] == text.shape[:2] and not early:
                    named["labels"] = longer(labels, -100)
                kwargs |= named
                whole = added + text.shape[1]
            tokens = kwargs.get(f"{own}input_ids")
            tokens = kwargs.get(f"{own}inputs_embeds") if tokens is None else tokens
            if seq2seq:
                self.decoder_mask, self.decoder_tokens = kwargs["decoder_attention_mask"], tokens
            else:
                self.mask, self.tokens = kwargs["attention_mask"], tokens
            return (), {name: value for name, value in kwargs.items() if value is not None}

        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            def cut(value: Any) -> Any:
                sequence = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == whole
                return value[:, added:] if sequence and not early else value

            if isinstance(output, tuple):
                if seq2seq:
                    raise fail("E209", "tokens before a decoder's text need outputs by name",
                               expected="return_dict=True")  # fmt: skip
                return tuple(cut(value) for value in output)
            close_cache(output.get("past_key_values"), added)
            for name in list(output.keys()):
                if not name.startswith("encoder_"):
                    output[name] = cut(output[name])
            return output

        def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            return None if self.muted else output[:, added:]

        self.handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
        if early and claim.text is not None:
            self.handles.append(owner_of(model, claim.text.anchors["end"]).register_forward_hook(leave))
        self.handles.append(model.register_forward_hook(after, with_kwargs=True))
