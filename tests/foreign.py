"""Torch modules that `transformers` does not have: names, attentions and layouts of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor


# a: an encoder that normalises after the sum; an additive mask; returns a dict


class Regarder(nn.Module):
    """Attention: four maps, and heads by reshapes."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.asker, self.teller, self.giver = (nn.Linear(width, width) for _ in range(3))
        self.binder = nn.Linear(width, width)

    def forward(self, stream: Tensor, veil: Tensor) -> Tensor:
        def split(z: Tensor) -> Tensor:
            return z.reshape(z.shape[0], z.shape[1], self.heads, -1).swapaxes(1, 2)

        q, k, v = split(self.asker(stream)), split(self.teller(stream)), split(self.giver(stream))
        scores = torch.matmul(q, k.mT) / q.shape[-1] ** 0.5 + veil
        joined = torch.matmul(torch.softmax(scores, -1), v)
        return self.binder(joined.swapaxes(1, 2).reshape(stream.shape))


class Stratum(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.regard = Regarder(width, heads)
        self.settle = nn.LayerNorm(width)
        self.swell, self.shrink = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.calm = nn.LayerNorm(width)

    def forward(self, stream: Tensor, veil: Tensor) -> Tensor:
        stream = self.settle(stream + self.regard(stream, veil))
        return self.calm(stream + self.shrink(nn.functional.gelu(self.swell(stream))))


class Mosaic(nn.Module):
    """Token ids and a mask in; `tokens` and `verdict` out."""

    def __init__(self, layers: int = 2, width: int = 32, heads: int = 4, words: int = 90, longest: int = 24):
        super().__init__()
        self.lexicon, self.places = nn.Embedding(words, width), nn.Embedding(longest, width)
        self.first = nn.LayerNorm(width)
        self.strata = nn.ModuleList(Stratum(width, heads) for _ in range(layers))
        self.judge = nn.Linear(width, 3)
        self.register_buffer("ruler", torch.arange(longest), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        stream = self.first(self.lexicon(input_ids) + self.places(self.ruler[: input_ids.shape[1]]))
        veil = (1.0 - attention_mask[:, None, None, :].to(stream.dtype)) * -1e4
        for stratum in self.strata:
            stream = stratum(stream, veil)
        return {"tokens": stream, "verdict": self.judge(stream[:, 0])}


# b: a causal decoder that normalises before; one map for queries, keys and values of grouped heads, rotary positions,
# gated feed-forward, a tied head; returns a tensor


class RootScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


class Spinner(nn.Module):
    """Attention: a fused map, two key heads for four query heads, rotated by position."""

    def __init__(self, width: int, heads: int, few: int):
        super().__init__()
        self.heads, self.few, self.size = heads, few, width // heads
        self.fused = nn.Linear(width, (heads + 2 * few) * self.size, bias=False)
        self.exit = nn.Linear(width, width, bias=False)
        speed = 1.0 / 100.0 ** (torch.arange(0, self.size, 2) / self.size)
        self.register_buffer("speed", speed, persistent=False)

    def turn(self, z: Tensor) -> Tensor:
        angle = torch.arange(z.shape[2], device=z.device)[:, None].to(self.speed.dtype) * self.speed
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
        left, right = z.chunk(2, -1)
        return z * cos + torch.cat([-right, left], -1) * sin

    def forward(self, stream: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = stream.shape
        sizes = [self.heads * self.size, self.few * self.size, self.few * self.size]
        q, k, v = (
            z.view(batch, length, -1, self.size).transpose(1, 2) for z in self.fused(stream).split(sizes, dim=-1)
        )
        q, k = self.turn(q), self.turn(k)
        k, v = (z.repeat_interleave(self.heads // self.few, dim=1) for z in (k, v))
        scores = q @ k.transpose(-1, -2) * self.size**-0.5
        joined = (scores + mask).softmax(-1) @ v
        return self.exit(joined.transpose(1, 2).reshape(batch, length, -1))


class GatedPair(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.valve, self.pipe = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.drain = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.drain(nn.functional.silu(self.valve(x)) * self.pipe(x))


class Storey(nn.Module):
    def __init__(self, width: int, heads: int, few: int):
        super().__init__()
        self.pre_spin, self.spin = RootScale(width), Spinner(width, heads, few)
        self.pre_pair, self.pair = RootScale(width), GatedPair(width, 2 * width)

    def forward(self, stream: Tensor, mask: Tensor) -> Tensor:
        stream = stream + self.spin(self.pre_spin(stream), mask)
        return stream + self.pair(self.pre_pair(stream))


class Tower(nn.Module):
    """Token ids and a mask in; scores of the next token out."""

    def __init__(self, layers: int = 2, width: int = 32, heads: int = 4, few: int = 2, words: int = 90):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.storeys = nn.ModuleList(Storey(width, heads, few) for _ in range(layers))
        self.roof = RootScale(width)
        self.voice = nn.Linear(width, words, bias=False)
        self.voice.weight = self.words.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = input_ids.shape[1]
        past = torch.arange(length, device=input_ids.device)
        seen = (past[:, None] >= past[None, :])[None, None] & attention_mask[:, None, None, :].bool()
        stream = self.words(input_ids)
        mask = torch.zeros_like(seen, dtype=stream.dtype).masked_fill(~seen, -1e4)
        for storey in self.storeys:
            stream = storey(stream, mask)
        return self.voice(self.roof(stream))


# c: branches between two norms each, added at a fraction; maps stored [in, out]; a bias by distance; returns a tuple


class Times(nn.Module):
    """x @ kernel + shift."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(inputs, outputs))
        self.shift = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel + self.shift


class Slope(nn.Module):
    """Attention with a bias that falls with the distance, steeper for each head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ask, self.tell, self.give, self.blend = (Times(width, width) for _ in range(4))
        self.register_buffer("steep", 2.0 ** -torch.arange(1, heads + 1).float())

    def forward(self, stream: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = stream.shape
        q, k, v = (
            m(stream).view(batch, length, self.heads, -1).permute(0, 2, 1, 3) for m in (self.ask, self.tell, self.give)
        )
        place = torch.arange(length, device=stream.device)
        distance = (place[:, None] - place[None, :]).abs().to(stream.dtype)
        scores = torch.matmul(q, k.transpose(2, 3)) * (width // self.heads) ** -0.5
        scores = scores - self.steep[:, None, None] * distance + mask
        joined = torch.matmul(scores.softmax(-1), v)
        return self.blend(joined.permute(0, 2, 1, 3).reshape(batch, length, width))


class Strand(nn.Module):
    """Each branch is normalised before and after, and joins the stream at a fraction of its size."""

    def __init__(self, width: int, heads: int, share: float):
        super().__init__()
        self.share = share
        self.before, self.slope, self.after = nn.LayerNorm(width), Slope(width, heads), nn.LayerNorm(width)
        self.early, self.late = nn.LayerNorm(width), nn.LayerNorm(width)
        self.wide, self.narrow = Times(width, 4 * width), Times(4 * width, width)

    def forward(self, stream: Tensor, mask: Tensor) -> Tensor:
        stream = stream + self.share * self.after(self.slope(self.before(stream), mask))
        thought = self.narrow(nn.functional.relu(self.wide(self.early(stream))).square())
        return stream + self.share * self.late(thought)


class Braid(nn.Module):
    """Token ids and a mask in; the stream and a pooled score out."""

    def __init__(self, layers: int = 2, width: int = 32, heads: int = 4, words: int = 90, share: float = 0.6):
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.strands = nn.ModuleList(Strand(width, heads, share) for _ in range(layers))
        self.end, self.score = nn.LayerNorm(width), Times(width, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        stream = self.table(input_ids) * self.table.embedding_dim**0.5
        weight = attention_mask.to(stream.dtype)
        mask = (weight[:, None, None, :] - 1) * 1e4
        for strand in self.strands:
            stream = strand(stream, mask)
        stream = self.end(stream)
        mean = (stream * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
        return stream, self.score(mean)


MODULES: dict[str, Any] = {"mosaic": Mosaic, "tower": Tower, "braid": Braid}


def build(name: str, **settings: Any) -> nn.Module:
    """A module by name with random weights, biases and norms, in eval mode."""
    torch.manual_seed(0)
    module: nn.Module = MODULES[name](**settings).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
        if parameter.dim() == 1:
            parameter.data += 1.0
    return module


def inputs(batch: int = 2, length: int = 12, words: int = 90) -> dict[str, Tensor]:
    """Example inputs, the last positions of the last sequence masked."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -3:] = 0
    torch.manual_seed(1)
    return {"input_ids": torch.randint(0, words, (batch, length)), "attention_mask": mask}
