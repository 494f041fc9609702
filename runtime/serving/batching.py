"""Dynamic batching: requests wait in a bounded queue, and those that can be joined are answered by one run."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peltc.runtime.running.session import Session
from peltc.runtime.serving.joining import Ask, Joiner
from peltc.runtime.serving.limits import ServingLimits
from peltc.runtime.serving.metrics import Metrics
from peltc.spec.diagnostics import fail

Array = np.ndarray[Any, Any]
Answer = dict[str, Array]


@dataclass
class Waiting:
    """A request in the queue.

    Attributes:
        kind: what requests have in common that can be joined with it.
        arrived: when, in seconds of the clock that only goes forward.
    """

    ask: Ask
    kind: Hashable
    arrived: float
    answer: Future[Answer] = field(default_factory=Future)


class Batcher:
    """Answers requests in batches, in the order in which they came: the first that waits is always in the next batch,
    and all of its kind that fit go with it, whatever their profiles.

    Args:
        session: the artifact, with its profiles.
        limits: of the queue and of batches.
        metrics: where batches are counted.
        profiles: how many different ones a batch may have; as many as may be in memory where nothing is said.
    """

    def __init__(self, session: Session, limits: ServingLimits, metrics: Metrics, profiles: int | None = None):
        self.session, self.limits, self.metrics = session, limits, metrics
        self.joiner = Joiner(session)
        self.profiles = profiles or (session.residents.most if session.residents else limits.rows)
        self._queue: list[Waiting] = []
        self._changed, self._closing = threading.Condition(), False
        metrics.waiting.append(self.waiting)
        self._worker = threading.Thread(target=self._work, name="batches", daemon=True)
        self._worker.start()

    def waiting(self) -> int:
        """How many texts wait."""
        return sum(one.ask.rows for one in list(self._queue))

    def submit(self, ask: Ask) -> Future[Answer]:
        """Put a request into the queue.

        Returns:
            The outputs by name, once they are there, or the error for this request; cancelled, it is left out.

        Raises:
            PeltError: E802 more texts, tokens or profiles than a batch has; E803 the queue is full; E806 the server is
                being stopped.
        """
        self._check(ask)
        with self._changed:
            if self._closing:
                raise fail("E806", "the server is being stopped", hint="ask another one")
            if self.waiting() + ask.rows > self.limits.queue:
                raise fail("E803", f"the queue is full: {self.waiting()} texts wait", hint="try again later")
            waiting = Waiting(ask, self.joiner.kind(ask), time.monotonic())
            self._queue.append(waiting)
            self._changed.notify_all()
        return waiting.answer

    def close(self) -> None:
        """Answer what waits, and take nothing more."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._worker.join()

    def _check(self, ask: Ask) -> None:
        different = len({name for name in ask.profiles if name is not None})
        for found, most, what in ((ask.rows, self.limits.rows, "texts"),
                                  (ask.rows * ask.length, self.limits.tokens, "tokens, padding included,"),
                                  (different, self.profiles, "profiles")):  # fmt: skip
            if found > most:
                raise fail("E802", f"the request has {found:,} {what} and no batch may", expected=f"at most {most:,}")

    def _work(self) -> None:
        while batch := self._next():
            asked = [one for one in batch if one.answer.set_running_or_notify_cancel()]
            if asked:
                self._answer(asked)

    def _next(self) -> list[Waiting]:
        """The next batch, when it is full or its first request has waited long enough; none once all is answered."""
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            if not self._queue:
                return []
            until = self._queue[0].arrived + self.limits.delay
            while not self._closing and (left := until - time.monotonic()) > 0:
                if sum(one.ask.rows for one in self._fitting()) >= self.limits.rows:
                    break
                self._changed.wait(left)
            batch = self._fitting()
            taken = {id(one) for one in batch}
            self._queue = [one for one in self._queue if id(one) not in taken]
            return batch

    def _fitting(self) -> list[Waiting]:
        """The first request that waits, and those that can be joined with it: those of nearest length before others,
        for a batch may have so much padding and no more."""
        first, limits = self._queue[0], self.limits
        alike = [one for one in self._queue[1:] if one.kind == first.kind]
        alike.sort(key=lambda one: abs(one.ask.length - first.ask.length))
        batch, rows, length, own = [first], first.ask.rows, first.ask.length, first.ask.rows * first.ask.length
        profiles = {*first.ask.profiles} - {None}
        for one in alike:
            more, longest = rows + one.ask.rows, max(length, one.ask.length)
            tokens, real = more * longest, own + one.ask.rows * one.ask.length
            names = profiles | {*one.ask.profiles} - {None}
            if (more <= limits.rows and tokens <= limits.tokens and tokens - real <= limits.padding * tokens
                    and len(names) <= self.profiles):  # fmt: skip
                batch.append(one)
                rows, length, own, profiles = more, longest, real, names
        return batch

    def _answer(self, batch: Sequence[Waiting]) -> None:
        """Run a batch. Where it fails, each request is run alone, so that only the one at fault is refused."""
        started = time.monotonic()
        asks = [one.ask for one in batch]
        try:
            feeds, profiles = self.joiner.join(asks)
            answers = self.joiner.split(self.session.run(feeds, profiles), asks)
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            for one in batch:
                self._answer([one])
            return
        self.metrics.ran(sum(ask.rows for ask in asks), len(asks), time.monotonic() - started,
                         [started - one.arrived for one in batch])  # fmt: skip
        for one, answer in zip(batch, answers, strict=True):
            one.answer.set_result(answer)
