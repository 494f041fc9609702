"""A text that grows: which token follows, when it ends, and what whoever asked for it is told."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peltc.runtime.generating.decoder import Begun, Decoder
from peltc.runtime.generating.texts import Reader
from peltc.runtime.running.profiles import Taken
from peltc.spec.diagnostics import fail

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Weighed:
    """A token and how likely the model found it, before anything changed that.

    Attributes:
        logprob: the logarithm of its probability.
        best: the likeliest tokens with theirs, the likeliest first.
    """

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What has become of a text since the last piece.

    Attributes:
        tokens: its new ones.
        text: what they add to it; nothing while that may be the beginning of a stop string, or of a character.
        weighed: of each token, where that was asked for.
        end: why it ended, `stop` or `length`; None while it goes on.
        error: what kept it from going on.
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    weighed: tuple[Weighed, ...] = ()
    end: str | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Wish:
    """A prompt and how it is to go on.

    Attributes:
        ids: of the prompt.
        profile: its name; None for the bare base.
        new: how many tokens it may get.
        options: of `generate`; where they are silent, the model's own generation config speaks.
        penalties: by how much a token's logit falls for each time that it was generated, and once it was at all.
        seed: of the tokens that are drawn; None for any.
        stops: strings at which the text ends, without them.
        best: how many of the likeliest tokens are told beside each; None for none, and no probability either.
    """

    ids: Sequence[int]
    profile: str | None
    new: int
    options: Mapping[str, Any] = field(default_factory=dict)
    penalties: tuple[float, float] = (0.0, 0.0)
    seed: int | None = None
    stops: Sequence[str] = ()
    best: int | None = None


@dataclass(frozen=True)
class Prepared:
    """What `generate` would do with a prompt, told by itself.

    Attributes:
        begun: what the decoder begins with.
        process: changes the logits [1, V] of what follows ids [1, S].
        ended: whether ids [1, S] are at their end.
        samples: whether tokens are drawn.
        ends: the tokens that end a text.
    """

    begun: Begun
    process: Callable[[Tensor, Tensor], Tensor]
    ended: Callable[[Tensor, Any], Tensor]
    samples: bool
    ends: tuple[int, ...]


def prepared(decoder: Decoder, wish: Wish, taken: Taken) -> Prepared:
    """What `generate` would do: it is called, and what it hands to the method that generates is taken from it. The
    encoder, where there is one, reads the text.

    Raises:
        PeltError: E809 an option that it refuses, or one by which rows do not grow alone; E606 to E617 as `generate`.
    """
    found: list[Prepared] = []

    def take(model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
             **inputs: Any) -> Any:  # fmt: skip
        if generation_config.guidance_scale not in (None, 1) or generation_config.num_return_sequences not in (None, 1):
            raise fail("E809", "the model's generation config asks for guidance, which the server does not have",
                       hint="Session.generate has it")  # fmt: skip
        ends = generation_config.eos_token_id
        ends = () if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
        begun = Begun(input_ids[0].tolist(), inputs.get("encoder_outputs"), inputs.get("attention_mask"))
        found.append(Prepared(begun, logits_processor, stopping_criteria, bool(generation_config.do_sample), ends))
        return input_ids

    import torch

    ids = torch.tensor([list(wish.ids)])
    own = [Penalised(*wish.penalties, 1 if decoder.encodes else len(wish.ids))] if any(wish.penalties) else []
    with decoder.lending(taken):
        try:
            decoder.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=wish.new, num_beams=1,
                logits_processor=own, custom_generate=take, **wish.options,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise fail("E809", f"the options are refused: {str(error).splitlines()[0][:200]}") from None
    return found[0]


class Row:
    """A text that grows, one of those that a wish asks for.

    Args:
        wish: what is asked for.
        index: which of the texts of one request it is; the seed goes up with it.
        reader: makes text of its tokens; None where tokens alone are asked for.
        tell: is given each piece, in the thread that computes.

    Attributes:
        cancelled: whether nobody waits for it any more.
        arrived: when it was asked for, by the clock that only goes forward.
        longest: how many tokens the decoder may come to have of it.
    """

    def __init__(self, wish: Wish, index: int, reader: Reader | None, tell: Callable[[Piece], object]):
        self.wish, self.index, self.reader, self.tell = wish, index, reader, tell
        self.cancelled, self.arrived, self.longest = False, 0.0, 0
        self.held = ExitStack()
        """Its profile, as long as it grows."""
        self.taken: Taken = lambda rows: {}
        self.prepared: Prepared | None = None
        self.grown = 0

    def begin(self, found: Prepared, taken: Taken) -> None:
        """Begin to grow."""
        import torch

        self.prepared, self.taken = found, taken
        self.ids = torch.tensor([found.begun.ids])
        if found.samples:
            seed = secrets.randbits(63) if self.wish.seed is None else (self.wish.seed + self.index) % (1 << 63)
            self.draws = torch.Generator().manual_seed(seed)

    @property
    def last(self) -> int:
        """The last token."""
        return int(self.ids[0, -1])

    def grow(self, logits: Tensor) -> bool:
        """Choose what follows, and tell it.

        Args:
            logits: of the next token [1, V].

        Returns:
            Whether the text goes on.
        """
        import torch

        assert self.prepared is not None
        scores = self.prepared.process(self.ids, logits.clone())
        if self.prepared.samples:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self.draws)
        else:
            token = scores.argmax(-1, keepdim=True)
        self.ids, self.grown = torch.cat([self.ids, token], 1), self.grown + 1
        chosen = int(token)
        over = bool(self.prepared.ended(self.ids, None)[0])
        end = None if not over else "stop" if chosen in self.prepared.ends else "length"
        text = ""
        if self.reader is not None:
            text, stopped = self.reader.read(chosen, over)
            end = "stop" if stopped else end
        weighed = () if self.wish.best is None else (_weighed(logits[0], chosen, self.wish.best),)
        self.tell(Piece((chosen,), text, weighed, end))
        return end is None

    def fail(self, error: BaseException) -> None:
        """Tell that it does not go on."""
        self.tell(Piece(error=error))

    def end(self) -> None:
        """Let go of what it holds."""
        self.held.close()


def _weighed(logits: Tensor, token: int, best: int) -> Weighed:
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(best, len(logprobs)))
    return Weighed(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


class Penalised:
    """What OpenAI's protocol calls penalties: each token's logit falls by one number for each time that it was
    generated, and by another once it was at all. A processor of logits for `generate`.

    Args:
        prompt: how many tokens were there before.
    """

    def __init__(self, frequency: float, presence: float, prompt: int):
        self.frequency, self.presence, self.prompt = frequency, presence, prompt

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        import torch

        counts = torch.stack([torch.bincount(row, minlength=scores.shape[-1]) for row in ids[:, self.prompt :]])
        return scores - self.frequency * counts - self.presence * (counts > 0)
