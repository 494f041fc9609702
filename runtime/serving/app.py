"""The server's application: the paths of the Open Inference Protocol, health, and metrics."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from peltc.runtime.running.session import Session
from peltc.runtime.serving.batching import Batcher
from peltc.runtime.serving.joining import Ask
from peltc.runtime.serving.limits import ServingLimits
from peltc.runtime.serving.metrics import CONTENT_TYPE, Metrics
from peltc.runtime.serving.protocol import HEADER, PROFILE, Inference, datatype, read, write, wrong
from peltc.spec.diagnostics import PeltError, fail

Array = np.ndarray[Any, Any]
Allow = Callable[[Request, str | None], bool | Awaitable[bool]]
"""Whether a request may use a profile, or the bare base where the name is None. It is asked for each name once."""
STATUS = {"E626": 404, "E803": 429, "E804": 403, "E805": 404, "E806": 503, "E807": 413}
"""The HTTP status of findings; of others it is 400, or 500 where the server's own files are at fault."""
OURS = ("E602", "E605", "E612", "E621", "E625", "E630", "E634", "E635")
"""Findings about the server's own files and machine."""
log = logging.getLogger(__name__)


def build(session: Session, limits: ServingLimits | None = None, allow: Allow | None = None) -> Starlette:
    """An application that serves one artifact, for any ASGI server.

    Args:
        session: the artifact, with a store or with profiles that were added.
        limits: of requests, of the queue, and of batches.
        allow: whether a request may use a profile; without it, whoever reaches the server may use all.
    """
    served = Served(session, limits or ServingLimits(), allow)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(served.batcher.close)

    model = "/v2/models/{model}"
    return Starlette(
        routes=[
            Route("/v2", served.about),
            Route("/v2/health/live", served.live),
            Route("/v2/health/ready", served.ready),
            Route(model, served.model),
            Route(f"{model}/ready", served.model_ready),
            Route(f"{model}/infer", served.infer, methods=["POST"]),
            Route("/metrics", served.counted),
        ],
        lifespan=lifespan,
    )


class Served:
    """An artifact behind the paths of the protocol."""

    def __init__(self, session: Session, limits: ServingLimits, allow: Allow | None):
        self.session, self.limits, self.allow = session, limits, allow
        self.name = str(session.manifest["name"])
        self.metrics = Metrics(session)
        self.batcher = Batcher(session, limits, self.metrics)

    async def about(self, request: Request) -> Response:
        """Server metadata."""
        return JSONResponse(
            {"name": "peltc", "version": metadata.version("peltc"), "extensions": ["binary_tensor_data"]}
        )

    async def live(self, request: Request) -> Response:
        """Health: the process answers."""
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """Health: the artifact is open, which it is since before the server listens."""
        return JSONResponse({"ready": True})

    async def model_ready(self, request: Request) -> Response:
        """Health of the model."""
        if missing := self._other(request):
            return missing
        return JSONResponse({"name": self.name, "ready": True})

    async def model(self, request: Request) -> Response:
        """Model metadata: inputs and outputs, -1 where a size is the request's own."""
        if missing := self._other(request):
            return missing
        inputs = [_tensor(i.name, i.type, i.shape) for i in self.session.inputs.values()]
        if self.session.kept.record:
            inputs.append({"name": PROFILE, "datatype": "BYTES", "shape": [-1]})
        outputs = [_tensor(o.name, o.type, o.shape) for o in self.session.inference.get_outputs()]
        said = {"name": self.name, "versions": [], "platform": "onnx_peltc", "inputs": inputs, "outputs": outputs}
        return JSONResponse(said)

    async def counted(self, request: Request) -> Response:
        """Counters for Prometheus."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def infer(self, request: Request) -> Response:
        """Answer a request."""
        started = time.monotonic()
        try:
            response = self._other(request) or await self._answered(request)
        except PeltError as error:
            response = refused(error)
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception:
            log.exception("a request failed")
            response = JSONResponse({"error": "the server failed; its log says more"}, 500)
        self.metrics.requests.labels(str(response.status_code)).inc()
        self.metrics.seconds.observe(time.monotonic() - started)
        return response

    async def _answered(self, request: Request) -> Response:
        if request.headers.get("content-encoding", "identity") != "identity":
            raise wrong("the body is compressed")
        body = await self._body(request)
        asked = await run_in_threadpool(read, body, request.headers.get(HEADER))
        ask = await self._ask(request, asked)
        answer = self.batcher.submit(ask)
        outputs = await asyncio.wrap_future(answer)
        content, headers = await run_in_threadpool(write, asked, self.name, outputs)
        return Response(content, headers=headers)

    async def _body(self, request: Request) -> bytes:
        """The body, of which no more is read than is allowed."""
        found = bytearray()
        async for part in request.stream():
            found += part
            if len(found) > self.limits.body:
                raise fail("E807", f"the request has more than {self.limits.body:,} bytes")
        return bytes(found)

    async def _ask(self, request: Request, asked: Inference) -> Ask:
        """A request's texts, after its profiles were allowed and are there."""
        names = [asked.profile] if not isinstance(asked.profile, list) else asked.profile
        for name in dict.fromkeys(names):
            allowed = self.allow is None or self.allow(request, name)
            if not (await allowed if inspect.isawaitable(allowed) else allowed):
                raise fail(
                    "E804", f"the profile {name!r:.140} is not allowed" if name else "the bare base is not allowed"
                )
        return await run_in_threadpool(self._held, asked, names)

    def _held(self, asked: Inference, names: list[str | None]) -> Ask:
        unknown = [name for name in asked.outputs or () if name not in self.session.outputs]
        if unknown:
            raise wrong(f"the model has no output {unknown[0]!r:.60}", ", ".join(self.session.outputs))
        feeds = self.session.feeds(asked.inputs)
        rows = len(next(iter(feeds.values())))
        each = names * rows if not isinstance(asked.profile, list) else names
        self.session.check_profiles(each if self.batcher.joiner.mixes else _one(each), rows)
        return Ask(feeds, tuple(each))

    def _other(self, request: Request) -> Response | None:
        """The answer where another model is asked for."""
        if (name := request.path_params["model"]) != self.name:
            return refused(fail("E805", f"there is no model {name!r:.60}", expected=f"'{self.name}'"))
        return None


def _one(names: list[str | None]) -> Any:
    """The one profile of all texts, where batches are not mixed."""
    return names[0] if len(set(names)) == 1 else names


def _tensor(name: str, kind: str, shape: list[Any]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype(kind), "shape": [s if isinstance(s, int) else -1 for s in shape]}


def refused(error: PeltError) -> Response:
    """The protocol's error: what is wrong and what was expected, without the server's paths."""
    found = error.diagnostics[0]
    status = STATUS.get(found.code, 500 if found.code in OURS else 400)
    if status == 500:
        log.error("%s", error)
    lines = [f"{d.code} {d.message}" + (f"; expected {d.expected}" if d.expected else "") for d in error.diagnostics]
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse({"error": "\n".join(lines)}, status, headers)
