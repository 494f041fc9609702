"""The door for HTTP: the paths of the Open Inference Protocol, health, and metrics."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import metadata

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from peltc.runtime.serving.inference import wrong
from peltc.runtime.serving.metrics import CONTENT_TYPE
from peltc.runtime.serving.protocol import HEADER, read, write
from peltc.runtime.serving.service import Caller, Service
from peltc.spec.diagnostics import PeltError, fail

Beside = Callable[[], Awaitable[Callable[[], Awaitable[object]] | None]]
GONE = 499
"""The status in the counters of a request whose caller went away while it was read."""


def build(service: Service, beside: Beside | None = None) -> Starlette:
    """An application for any ASGI server.

    Args:
        beside: starts something that lives as long as the application, and gives what ends it.
    """
    door = Door(service)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        end = await beside() if beside else None
        yield
        if end:
            await end()
        await service.close()

    model = "/v2/models/{model}"
    return Starlette(
        routes=[
            Route("/v2", door.about),
            Route("/v2/health/live", door.live),
            Route("/v2/health/ready", door.ready),
            Route(model, door.model),
            Route(f"{model}/ready", door.model_ready),
            Route(f"{model}/infer", door.infer, methods=["POST"]),
            Route("/metrics", door.counted),
        ],
        lifespan=lifespan,
    )


class Door:
    """The paths of the protocol, a method for each."""

    def __init__(self, service: Service):
        self.service = service

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
        return self._other(request) or JSONResponse({"name": self.service.name, "ready": True})

    async def model(self, request: Request) -> Response:
        """Model metadata."""
        return self._other(request) or JSONResponse(self.service.metadata())

    async def counted(self, request: Request) -> Response:
        """Counters for Prometheus."""
        return Response(self.service.metrics.text(), media_type=CONTENT_TYPE)

    async def infer(self, request: Request) -> Response:
        """Answer a request."""
        started = time.monotonic()
        try:
            response = self._other(request) or await self._answered(request)
        except ClientDisconnect:
            response = Response(status_code=GONE)
        except Exception as error:
            response = self._refused(error)
        self.service.count("http", response.status_code, started)
        return response

    async def _answered(self, request: Request) -> Response:
        if request.headers.get("content-encoding", "identity") != "identity":
            raise wrong("the body is compressed")
        body, size = await self._body(request), request.headers.get(HEADER)
        asked = await self.service.aside(read, body, size)
        address = request.client.host if request.client else ""
        outputs = await self.service.answer(asked, Caller(dict(request.headers), address))
        content, headers = await self.service.aside(write, asked, self.service.name, outputs)
        return Response(content, headers=headers)

    async def _body(self, request: Request) -> bytes:
        """The body, of which no more is read than is allowed."""
        found, most = bytearray(), self.service.limits.body
        async for part in request.stream():
            found += part
            if len(found) > most:
                raise fail("E807", f"the request has more than {most:,} bytes")
        return bytes(found)

    def _other(self, request: Request) -> Response | None:
        """The answer where another model is asked for."""
        try:
            self.service.check_name(request.path_params["model"])
        except PeltError as error:
            return self._refused(error)
        return None

    def _refused(self, error: Exception) -> Response:
        """The protocol's error."""
        status, said = self.service.refusal(error)
        return JSONResponse({"error": said}, status, {"Retry-After": "1"} if status in (429, 503) else None)
