"""An artifact that answers requests, whichever door they come through: who may use which profile, what is refused with
which status, and what is counted."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from peltc.runtime.running.session import Session
from peltc.runtime.serving.asking import Asked
from peltc.runtime.serving.batching import Batcher
from peltc.runtime.serving.growth import Growing, Growth
from peltc.runtime.serving.inference import PROFILE, Inference, datatype, wrong
from peltc.runtime.serving.joining import Ask
from peltc.runtime.serving.limits import ServingLimits
from peltc.runtime.serving.metrics import Metrics
from peltc.spec.diagnostics import PeltError, fail, one_of

Array = np.ndarray[Any, Any]
STATUS = {"E626": 404, "E803": 429, "E804": 403, "E805": 404, "E806": 503, "E807": 413}
"""The HTTP status of findings; of others it is 400, or 500 where the server's own files are at fault."""
OURS = ("E602", "E605", "E612", "E621", "E625", "E630", "E634", "E635")
"""Findings about the server's own files and machine."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """Who asks, as far as the protocol tells.

    Attributes:
        headers: of HTTP, or gRPC's metadata, by names in small letters.
        address: where the connection comes from.
    """

    headers: Mapping[str, str]
    address: str


Allow = Callable[[Caller, str | None], bool | Awaitable[bool]]
"""Whether a caller may use a profile, or the bare base where the name is None. It is asked for each name of a request
once, before it is looked up."""


class Service:
    """An artifact with its queue, its counters and its hook.

    Args:
        session: the artifact, with a store or with profiles that were added.
        limits: of requests, of the queue, and of batches.
        allow: whether a caller may use a profile; without it, whoever reaches the server may use all.
    """

    def __init__(self, session: Session, limits: ServingLimits | None = None, allow: Allow | None = None):
        self.session, self.limits, self.allow = session, limits or ServingLimits(), allow
        self.name = str(session.manifest["name"])
        self.metrics = Metrics(session)
        self.generates = "decode" in session.manifest.get("graphs", ())
        self._opening = threading.Lock()
        self._batcher: Batcher | None = None
        self.growth, self._without = self._growth()
        if self.growth is None:
            self.batcher  # noqa: B018  # what is wrong with it, now rather than later
        self._threads = ThreadPoolExecutor(4, "requests")
        """Who read and write requests, so that a long one keeps no other waiting."""

    @property
    def batcher(self) -> Batcher:
        """Who answers single passes. Where an artifact generates as well, the graph for them is opened when somebody
        asks for one: it takes as much memory again."""
        with self._opening:
            if self._batcher is None:
                self._batcher = Batcher(self.session, self.limits, self.metrics, self._shares()[0])
            return self._batcher

    async def close(self) -> None:
        """Answer what waits, and take nothing more."""
        if self.growth is not None:
            await self.aside(self.growth.close, self.limits.grace)
        await self.aside(self.end)

    def end(self) -> None:
        """Take no single pass any more; those that wait are answered."""
        if self._batcher is not None:
            self._batcher.close()

    def _growth(self) -> tuple[Growth | None, PeltError | None]:
        """Who lets texts grow, or why nobody does; single passes are served all the same."""
        if not self.generates:
            return None, fail("E611", "the artifact has no graphs with a cache, which generation takes",
                              expected="an artifact compiled with --generation")  # fmt: skip
        try:
            return Growth(self.session, self.limits, self.metrics, self._shares()[1]), None
        except PeltError as error:
            if error.diagnostics[0].code not in ("E611", "E623"):
                raise
            log.warning("generation is not served: %s", error)
            return None, error

    def _shares(self) -> tuple[int, int]:
        """How many different profiles a batch of single passes and texts that grow may have at once: together no more
        than may be in memory, so that neither waits for ever for what the other holds.

        Raises:
            PeltError: E636 there is room for one.
        """
        residents = self.session.residents
        if residents is None or not self.generates:
            most = residents.most if residents is not None else self.limits.rows
            return most, most
        if residents.most < 2:
            raise fail("E636", "single passes and texts that grow take profiles at the same time, and one may be in"
                       " memory", expected="at least 2", hint="--resident 2")  # fmt: skip
        return residents.most - residents.most // 2, residents.most // 2

    async def aside(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What a call returns, made in another thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    async def answer(self, asked: Inference, caller: Caller) -> dict[str, Array]:
        """The outputs of a request by name.

        Raises:
            PeltError: E804 a profile is not allowed; E626 there is none of a name; E801, E606, E613 to E617 what is
                wrong with the request; E802, E803, E806 it has no place in the queue.
        """
        names = asked.profile if isinstance(asked.profile, list) else [asked.profile]
        for name in dict.fromkeys(names):
            await self.check_allowed(caller, name)
        ask = await self.aside(self._held, asked)
        outputs = await asyncio.wrap_future(self.batcher.submit(ask))
        return {name: outputs[name] for name in asked.outputs or outputs}

    async def allows(self, caller: Caller, name: str | None) -> bool:
        """Whether a caller may use a profile, or the bare base where the name is None."""
        allowed = self.allow is None or self.allow(caller, name)
        return bool(await allowed if inspect.isawaitable(allowed) else allowed)

    async def check_allowed(self, caller: Caller, name: str | None) -> None:
        """Whether a caller may use a profile.

        Raises:
            PeltError: E804.
        """
        if not await self.allows(caller, name):
            raise fail("E804", f"the profile {name!r:.140} is not allowed" if name else "the bare base is not allowed")

    async def grow(self, asked: Asked, caller: Caller) -> Growing:
        """Let a request's texts grow.

        Raises:
            PeltError: E611 the artifact does not generate; E804 the profile is not allowed; E626 there is none of the
                name; and as `Growth.begin`.
        """
        if self.growth is None:
            raise PeltError(self._without.diagnostics if self._without else ())
        await self.check_allowed(caller, asked.profile)
        await self.aside(self.session.check_profiles, asked.profile, 1)
        growing: Growing = await self.aside(self.growth.begin, asked, asyncio.get_running_loop())
        return growing

    def check_name(self, name: str) -> None:
        """Whether a model is the one that is served.

        Raises:
            PeltError: E805.
        """
        if name != self.name:
            raise fail("E805", f"there is no model {name!r:.60}", expected=f"'{self.name}'")

    def metadata(self) -> dict[str, Any]:
        """The model's inputs and outputs, -1 where a size is the request's own, as the protocol writes them."""
        inputs = [_tensor(i.name, i.type, i.shape) for i in self.session.inputs.values()]
        if self.session.kept.record:
            inputs.append({"name": PROFILE, "datatype": "BYTES", "shape": [-1]})
        outputs = [_tensor(o.name, o.type, o.shape) for o in self.session.inference.get_outputs()]
        return {"name": self.name, "versions": [], "platform": "onnx_peltc", "inputs": inputs, "outputs": outputs}

    def refusal(self, error: BaseException) -> tuple[int, str]:
        """The HTTP status of what went wrong, and what a caller is told: nothing of the server's own paths."""
        if not isinstance(error, PeltError):
            log.error("a request failed", exc_info=error)
            return 500, "the server failed; its log says more"
        found = error.diagnostics[0].code
        status = STATUS.get(found, 500 if found in OURS else 400)
        if status == 500:
            log.error("%s", error)
        lines = [
            f"{d.code} {d.message}" + (f"; expected {d.expected}" if d.expected else "") for d in error.diagnostics
        ]
        return status, "\n".join(lines)

    def count(self, door: str, status: int, started: float | None) -> None:
        """Count a request.

        Args:
            door: `http`, `grpc` or `openai`.
            started: when it came, by the clock that only goes forward; None where texts grew, as long as was asked for.
        """
        self.metrics.requests.labels(door, str(status)).inc()
        if started is not None:
            self.metrics.seconds.observe(time.monotonic() - started)

    def _held(self, asked: Inference) -> Ask:
        """A request's texts, held against the model; its profiles are there."""
        unknown = [name for name in asked.outputs or () if name not in self.session.outputs]
        if unknown:
            raise wrong(f"the model has no output {unknown[0]!r:.60}", one_of(self.session.outputs))
        feeds = self.session.feeds(asked.inputs)
        rows = len(next(iter(feeds.values())))
        each = asked.profile if isinstance(asked.profile, list) else [asked.profile] * rows
        alike = not self.batcher.joiner.mixes and len(set(each)) == 1
        self.session.check_profiles(each[0] if alike else each, rows)
        return Ask(feeds, tuple(each))


def _tensor(name: str, kind: str, shape: list[Any]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype(kind), "shape": [s if isinstance(s, int) else -1 for s in shape]}
