"""Continuous batching: texts that grow run together, and join and leave between any two tokens."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from peltc.runtime.generating.decoder import Batch, Decoder
from peltc.runtime.generating.rows import Prepared, Row, Wish, prepared
from peltc.runtime.running.profiles import Taken
from peltc.spec.diagnostics import fail

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS = 4096
"""Tokens of prompts, padding included, that are read between two tokens of the texts that grow, unless one has more."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GrowthLimits:
    """What grows at once.

    Attributes:
        rows: texts.
        tokens: of all texts, each counted as long as the longest may become.
        padding: the share of the tokens of prompts read together that may be padding.
        queue: texts that wait; more are refused.
        profiles: how many different ones the texts may have.
        new: tokens that a text may get.
    """

    rows: int
    tokens: int
    padding: float
    queue: int
    profiles: int
    new: int


class Watch(Protocol):
    """Who counts."""

    def began(self, tokens: int, waited: float) -> None:
        """A prompt of so many tokens was read, so many seconds after it was asked for: its first token is there."""

    def stepped(self, rows: int, seconds: float) -> None:
        """Texts have got a token each."""

    def running(self, rows: int) -> None:
        """So many texts grow."""


@dataclass
class Group:
    """Texts that run together.

    Attributes:
        rows: in the order of the batch.
    """

    rows: list[Row]
    batch: Batch


class Engine:
    """Lets texts grow, in the order in which they came: one that finds no room lets none pass.

    In a round each text gets one token. Texts that may run together do so in one run, with their own profiles where the
    artifact has them for each row; which may, the decoder says. A text keeps its profile as it was when it began.

    Args:
        decoder: of the artifact.
        limits: of what grows at once and of what waits.
        watch: is told what happens.
    """

    def __init__(self, decoder: Decoder, limits: GrowthLimits, watch: Watch):
        self.decoder, self.limits, self.watch = decoder, limits, watch
        self._queue: list[Row] = []
        self._groups: list[Group] = []
        self._changed, self._closing = threading.Condition(), False
        self._worker = threading.Thread(target=self._work, name="generation", daemon=True)
        self._worker.start()

    def waiting(self) -> int:
        """How many texts wait."""
        return len(self._queue)

    def check(self, wish: Wish, texts: int) -> None:
        """Whether a wish can be met at all.

        Args:
            texts: how many the request asks for in all.

        Raises:
            PeltError: E802 more texts or tokens than may be; E615 to E617 the prompt; E616 no positions for so many.
        """
        self.decoder.check(wish.ids)
        longest, most = self._longest(wish), self.decoder.most
        for found, bound, what in ((texts, self.limits.rows, "texts"), (wish.new, self.limits.new, "new tokens"),
                                   (longest, self.limits.tokens, "tokens")):  # fmt: skip
            if found > bound:
                raise fail("E802", f"the request asks for {found:,} {what}", expected=f"at most {bound:,}")
        if most is not None and longest > most:
            raise fail("E616", f"a text of {longest} tokens, those asked for included, is too long for the model",
                       expected=f"at most {most} tokens: the model has no positions for more")  # fmt: skip

    def room(self, ids: Sequence[int]) -> int:
        """How many tokens a prompt may get at most."""
        own = 0 if self.decoder.encodes else len(ids)
        most = min(n for n in (self.decoder.most, self.limits.tokens) if n is not None)
        return max(min(self.limits.new, most - own), 1)

    def submit(self, rows: Sequence[Row]) -> None:
        """Let texts grow, as soon as there is room: all, or none.

        Raises:
            PeltError: E803 the queue is full; E806 the server is being stopped.
        """
        with self._changed:
            if self._closing:
                raise fail("E806", "the server is being stopped", hint="ask another one")
            if len(self._queue) + len(rows) > self.limits.queue:
                raise fail("E803", f"the queue is full: {len(self._queue)} texts wait", hint="try again later")
            for row in rows:
                row.arrived, row.longest = time.monotonic(), self._longest(row.wish)
            self._queue.extend(rows)
            self._changed.notify_all()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Let go of texts that nobody waits for any more."""
        with self._changed:
            for row in rows:
                row.cancelled = True
            self._queue = [row for row in self._queue if not row.cancelled]
            self._changed.notify_all()

    def close(self, grace: float = 0.0) -> None:
        """Take nothing more, and end once all that was taken has grown, or after so many seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._worker.join(grace)
        with self._changed:
            left = [*self._queue, *(row for group in self._groups for row in group.rows)]
        self.cancel(left)
        for row in left:
            row.fail(fail("E806", "the server is being stopped", hint="ask another one"))
        self._worker.join()

    def _longest(self, wish: Wish) -> int:
        return wish.new + (1 if self.decoder.encodes else len(wish.ids))

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._groups and not self._closing:
                    self._changed.wait()
                if not self._queue and not self._groups:
                    return
                admitted = self._admitted()
            try:
                self._drop()
                self._begin(admitted)
                self._round()
            except Exception as error:  # a fault of ours: no text waits for ever
                log.exception("generation failed")
                for row in [*admitted, *(row for group in self._groups for row in group.rows)]:
                    row.fail(error)
                    row.end()
                self._groups = []
            self.watch.running(sum(len(group.rows) for group in self._groups))

    def _admitted(self) -> list[Row]:
        """The first texts that wait, as far as there is room."""
        growing = [row for group in self._groups for row in group.rows if not row.cancelled]
        rows, longest = len(growing), max((row.longest for row in growing), default=0)
        profiles = {row.wish.profile for row in growing} - {None}
        found: list[Row] = []
        tokens = 0
        for row in self._queue:
            longest, rows = max(longest, row.longest), rows + 1
            profiles |= {row.wish.profile} - {None}
            tokens += len(row.wish.ids)
            if (rows > self.limits.rows or rows * longest > self.limits.tokens or len(profiles) > self.limits.profiles
                    or (found and tokens > PROMPTS)):  # fmt: skip
                break
            found.append(row)
        self._queue = self._queue[len(found) :]
        return found

    def _drop(self) -> None:
        """Let go of texts that were cancelled."""
        for group in self._groups:
            self._keep(group, [not row.cancelled for row in group.rows])
        self._groups = [group for group in self._groups if group.rows]

    def _keep(self, group: Group, going: Sequence[bool]) -> None:
        """Let go of the texts of a group that do not go on."""
        if all(going):
            return
        for row, goes in zip(group.rows, going, strict=True):
            if not goes:
                row.end()
        kept = [i for i, goes in enumerate(going) if goes]
        group.rows = [group.rows[i] for i in kept]
        if kept:
            group.batch = self.decoder.chosen(group.batch, kept)

    def _begin(self, rows: Sequence[Row]) -> None:
        """Read prompts, those together that may be."""
        ready: list[Row] = []
        known: dict[int, Prepared] = {}
        for row in rows:
            try:
                taken = row.held.enter_context(self.decoder.session.taken([row.wish.profile], 1)
                                               if self.decoder.mixes
                                               else self.decoder.session.taken(row.wish.profile, 1))  # fmt: skip
                found = known.get(id(row.wish)) or prepared(self.decoder, row.wish, taken)
                known[id(row.wish)] = found
                row.begin(found, taken)
                ready.append(row)
            except Exception as error:
                row.fail(error)
                row.end()
        kinds: dict[Hashable, list[Row]] = {}
        for row in ready:
            length = None if self.decoder.pads_prompts else self._read(row)
            kinds.setdefault((self._profile(row), length), []).append(row)
        for alike in kinds.values():
            alike.sort(key=self._read)
            while alike:
                count = self._fitting([self._read(row) for row in alike])
                self._prompts(alike[:count])
                alike = alike[count:]

    def _fitting(self, lengths: Sequence[int]) -> int:
        """How many texts, of lengths that go up, are read together."""
        count = 1
        for count in range(2, len(lengths) + 1):
            tokens = count * lengths[count - 1]
            if tokens > PROMPTS or tokens - sum(lengths[:count]) > self.limits.padding * tokens:
                return count - 1
        return count

    def _prompts(self, rows: Sequence[Row]) -> None:
        """Read prompts together; where that fails, each alone, so that only the one at fault is refused. A prompt that
        several texts begin with, with one profile, is read once."""
        first: dict[Hashable, int] = {}
        places = [first.setdefault((id(row.prepared), row.wish.profile), len(first)) for row in rows]
        unlike = [rows[places.index(i)] for i in range(len(first))]
        try:
            texts = [row.prepared.begun for row in unlike if row.prepared is not None]
            batch, logits = self.decoder.read(texts, self._taken(unlike))
        except Exception as error:
            if len(rows) == 1:
                rows[0].fail(error)
                rows[0].end()
                return
            for row in rows:
                self._prompts([row])
            return
        if len(first) < len(rows):
            batch, logits = self.decoder.chosen(batch, places), logits[places]
        now = time.monotonic()
        for row in rows:
            self.watch.began(len(row.wish.ids), now - row.arrived)
        self._groups.append(Group([*rows], batch))
        self._grow(self._groups[-1], logits)

    def _round(self) -> None:
        """Join what may run together, and let each text get a token."""
        groups: dict[Hashable, list[Group]] = {}
        for group in self._groups:
            if group.rows:
                length = None if self.decoder.pads else group.batch.lengths[0]
                groups.setdefault((self._profile(group.rows[0]), length), []).append(group)
        self._groups = [
            Group([row for group in alike for row in group.rows], self.decoder.joined([group.batch for group in alike]))
            for alike in groups.values()
        ]  # fmt: skip
        for group in self._groups:
            started = time.monotonic()
            try:
                taken = self._taken(group.rows)
                group.batch, logits = self.decoder.go_on(group.batch, [row.last for row in group.rows], taken)
            except Exception as error:
                for row in group.rows:
                    row.fail(error)
                    row.end()
                group.rows = []
                continue
            count = len(group.rows)
            self._grow(group, logits)
            self.watch.stepped(count, time.monotonic() - started)
        self._groups = [group for group in self._groups if group.rows]

    def _grow(self, group: Group, logits: Tensor) -> None:
        going = []
        for i, row in enumerate(group.rows):
            try:
                going.append(not row.cancelled and row.grow(logits[i : i + 1]))
            except Exception as error:
                row.fail(error)
                going.append(False)
        self._keep(group, going)

    def _profile(self, row: Row) -> str | None:
        """What rows that run together have in common of profiles."""
        return None if self.decoder.mixes else row.wish.profile

    def _taken(self, rows: Sequence[Row]) -> Taken:
        return self.decoder.session.kept.joined([row.taken for row in rows])

    @staticmethod
    def _read(row: Row) -> int:
        """How many tokens the decoder reads at first."""
        assert row.prepared is not None
        return len(row.prepared.begun.ids)
