"""Generation behind a server: prompts become texts that grow, and their pieces come back to whoever waits for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peltc.runtime.running.session import Session
from peltc.runtime.serving.asking import Asked
from peltc.runtime.serving.limits import ServingLimits
from peltc.runtime.serving.metrics import Metrics
from peltc.spec.diagnostics import fail
from peltc.spec.packages import needing

if TYPE_CHECKING:
    from peltc.runtime.generating.engine import Engine
    from peltc.runtime.generating.rows import Piece, Row

log = logging.getLogger(__name__)


@dataclass
class Growing:
    """A request's texts.

    Attributes:
        rows: in the order of the prompts, each as often as it gets texts.
        prompts: the ids of each prompt.
        before: the text of each prompt, where it is to come before what follows.
    """

    rows: list[Row]
    prompts: list[list[int]]
    before: list[str]
    arriving: asyncio.Queue[tuple[int, Piece]]


class Growth:
    """Lets texts grow on an artifact.

    Args:
        session: of an artifact that was compiled with generation.
        limits: of requests, of the queue and of what runs.
        metrics: where tokens are counted.
        profiles: how many different profiles texts may have that grow at once.

    Raises:
        PeltError: E611 the artifact does not generate, or in a way that is not served; E623 a package is missing; as
            `Session.generator`.
    """

    def __init__(self, session: Session, limits: ServingLimits, metrics: Metrics, profiles: int):
        with needing("generation in pelt serve"):
            import torch  # noqa: F401

            from peltc.runtime.generating.decoder import Decoder
            from peltc.runtime.generating.engine import Engine, GrowthLimits
            from peltc.runtime.generating.texts import Tokens

        self.session, self.limits, self.tokens = session, limits, Tokens(session.folder)
        self.decoder = Decoder(session)
        own = self.decoder.model.generation_config
        if (own.num_beams or 1) > 1:
            log.warning("the model's generation config asks for %d beams; what is served has one", own.num_beams)
        bounds = GrowthLimits(limits.rows, limits.tokens, limits.padding, limits.queue, profiles, limits.new)
        self.engine: Engine = Engine(self.decoder, bounds, metrics)
        metrics.waiting.append(self.engine.waiting)

    def begin(self, asked: Asked, loop: asyncio.AbstractEventLoop) -> Growing:
        """Let a request's texts grow.

        Args:
            loop: of who waits for them.

        Raises:
            PeltError: E606 to E617, E801, E802, E809, E810 what is wrong with the request; E803, E806 it has no place
                in the queue.
        """
        from peltc.runtime.generating.rows import Row
        from peltc.runtime.generating.texts import Reader

        manner = asked.manner
        texts = len(asked.prompts) * manner.count
        if texts > self.limits.rows:
            raise fail("E802", f"the request asks for {texts:,} texts", expected=f"at most {self.limits.rows:,}")
        prompts = [self._ids(prompt) for prompt in asked.prompts]
        if not self.tokens.there and (manner.stops or not asked.ids):
            self.tokens.tokenizer  # noqa: B018  # says that there is none
        wishes = [self._wish(asked, ids, texts) for ids in prompts]
        arriving: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        rows: list[Row] = []
        for wish in wishes:
            for _ in range(manner.count):
                index = len(rows)
                before = () if self.decoder.encodes else wish.ids
                reader = Reader(self.tokens, before, manner.stops) if self.tokens.there else None
                rows.append(Row(wish, index, reader, _teller(loop, arriving, index)))
        shown = [self.tokens.text(ids) if asked.echo else "" for ids in prompts]
        self.engine.submit(rows)
        return Growing(rows, prompts, shown, arriving)

    async def pieces(self, growing: Growing) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of a request's texts as they come, each with the number of its text. Who stops to listen lets go
        of the texts.

        Raises:
            PeltError: what kept one of them from going on.
        """
        left = len(growing.rows)
        try:
            while left:
                index, piece = await growing.arriving.get()
                if piece.error is not None:
                    raise piece.error
                left -= piece.end is not None
                yield index, piece
        finally:
            if left:
                self.engine.cancel(growing.rows)

    def close(self, grace: float) -> None:
        """Take nothing more, and end after so many seconds."""
        self.engine.close(grace)

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.tokens.ids(prompt)
        if prompt and isinstance(prompt[0], dict):
            return self.tokens.chat(prompt)
        return list(prompt)

    def _wish(self, asked: Asked, ids: Sequence[int], texts: int) -> Any:
        from peltc.runtime.generating.rows import Wish

        manner, own = asked.manner, self.decoder.model.generation_config
        options = dict(manner.options)
        if options.get("do_sample", own.do_sample):
            options["top_k"] = manner.top_k if manner.top_k is not None else own.top_k or 0
        wish = Wish(ids, asked.profile, 1, options, manner.penalties, manner.seed, manner.stops, manner.best)
        self.engine.check(wish, texts)
        wish = replace(wish, new=self.engine.room(ids) if manner.new is None else manner.new)
        self.engine.check(wish, texts)
        least = options.get("min_new_tokens", 0)
        if least > wish.new:
            raise fail("E801", f"'min_tokens' is {least}, more than a text gets", expected=f"at most {wish.new}")
        biased = [key[0] for key in options.get("sequence_bias", ()) if key[0] >= self.decoder.vocabulary]
        if biased:
            raise fail("E801", f"'logit_bias' names the token {biased[0]}",
                       expected=f"ids from 0 to {self.decoder.vocabulary - 1}")  # fmt: skip
        return wish


def _teller(loop: asyncio.AbstractEventLoop, arriving: asyncio.Queue[tuple[int, Piece]], index: int) -> Any:
    """What hands the pieces of a text from the thread that computes to the loop that waits for them."""

    def tell(piece: Piece) -> None:
        try:
            loop.call_soon_threadsafe(arriving.put_nowait, (index, piece))
        except RuntimeError:  # the loop has ended, and nobody waits any more
            return

    return tell
