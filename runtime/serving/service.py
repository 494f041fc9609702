"""An artifact that answers requests, whichever door they come through: who may use which profile, what is refused with
which status, and what is counted."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from peltc.runtime.running.session import Session
from peltc.runtime.serving.batching import Batcher
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
        self.batcher = Batcher(session, self.limits, self.metrics)
        self._threads = ThreadPoolExecutor(4, "requests")
        """Who read and write requests, so that a long one keeps no other waiting."""

    async def close(self) -> None:
        """Answer what waits, and take nothing more."""
        await self.aside(self.batcher.close)

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
            allowed = self.allow is None or self.allow(caller, name)
            if not (await allowed if inspect.isawaitable(allowed) else allowed):
                raise fail(
                    "E804", f"the profile {name!r:.140} is not allowed" if name else "the bare base is not allowed"
                )
        ask = await self.aside(self._held, asked)
        outputs = await asyncio.wrap_future(self.batcher.submit(ask))
        return {name: outputs[name] for name in asked.outputs or outputs}

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

    def count(self, door: str, status: int, started: float) -> None:
        """Count a request.

        Args:
            door: `http` or `grpc`.
            started: when it came, by the clock that only goes forward.
        """
        self.metrics.requests.labels(door, str(status)).inc()
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
