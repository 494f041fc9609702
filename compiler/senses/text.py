"""Text beside images and sound: token ids, with as many that stand for an image or a recording as the model wants."""

from __future__ import annotations

import re
from typing import Any

from peltc.compiler.senses.asked import FIRST, LAST, Asked

Made = dict[str, Any]
SPECIAL = re.compile("token_id$|token_index$|_token$")


def placeholder(asked: Asked, sense: str) -> int | None:
    """The token that stands for a part of an image or a recording, by the config."""
    names = [f"{sense}_{rest}" for rest in ("token_id", "token_index", "token", "patch_id", "placeholder_token_id",
                                           "soft_token_id")]  # fmt: skip
    return next((v for n in names if (v := asked.setting(n, kinds=(int,))) is not None and v >= 0), None)


def read(asked: Asked) -> Made:
    """Token ids [B, S] and what goes along with them, and a decoder's [B, T]."""
    import torch

    found: Made = {}
    batch = asked.sizes.batch
    if "input_ids" in asked.names:
        rows = tokens(asked, asked.sizes.text)
        for sense, count in asked.counts.items():
            token = placeholder(asked, sense)
            if token is not None and count:
                start = asked.setting(f"{sense}_start_token_id", kinds=(int,))
                run = ([start] if start is not None else []) + [token] * count
                rows = torch.cat([rows[:, :1], torch.tensor(run).expand(batch, -1), rows[:, 1:]], 1)
        if asked.number("projection_dim", "projection_size") and not asked.counts:
            end = asked.setting("eos_token_id", kinds=(int,), under="text")
            if end is not None and 0 <= end < vocabulary(asked):
                rows[:, -1] = end  # some read a text off where it ends
        found["input_ids"] = rows
        marks = [token for sense in asked.counts if (token := placeholder(asked, sense)) is not None]
        marked = torch.isin(rows, torch.tensor(marks, dtype=torch.long))
        if "attention_mask" in asked.names:
            found["attention_mask"] = torch.ones_like(rows)
        if "mm_token_type_ids" in asked.names:
            found["mm_token_type_ids"] = marked.long()
        elif "token_type_ids" in asked.names and (marks or asked.number("type_vocab_size") > 1):
            found["token_type_ids"] = marked.long()
        if "bbox" in asked.names:
            corner = asked.integers(0, 40, *rows.shape, 2)
            found["bbox"] = torch.cat([corner, corner + 20], -1)
        if "image_attention_mask" in asked.names:
            found["image_attention_mask"] = torch.ones(*rows.shape, 1, dtype=torch.long)
        if name := asked.name("image_embeds_position_mask"):
            found[name] = torch.zeros_like(rows)
            found[name][:, 1 : 1 + asked.number("latent_query_num", default=4)] = 1
    if name := asked.name("qformer_input_ids"):
        found[name] = tokens(asked, asked.sizes.text)
        found["qformer_attention_mask"] = torch.ones_like(found[name])
    decodes = getattr(asked.config, "is_encoder_decoder", False) or hasattr(asked.config, "decoder")
    if "decoder_input_ids" in asked.names and (decodes or "decoder_input_ids" in asked.needed):
        found["decoder_input_ids"] = tokens(asked, asked.sizes.target)
    return found


def vocabulary(asked: Asked) -> int:
    """How many tokens there are."""
    return asked.number("vocab_size", default=LAST, under="text|decoder")


def tokens(asked: Asked, length: int) -> Any:
    """Ordinary tokens [B, S]: none that a setting gives a meaning."""
    import torch

    rows = vocabulary(asked)
    special = {v for part in asked.parts() for k, v in vars(part).items() if SPECIAL.search(k) and isinstance(v, int)}
    words = [w for w in range(FIRST, min(rows, LAST)) if w not in special] or [0]
    return torch.tensor(words)[asked.integers(0, len(words), asked.sizes.batch, length)]
