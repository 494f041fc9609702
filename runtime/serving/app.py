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

from peltc.runtime.serving.growth_door import GrowthDoor
from peltc.runtime.serving.metrics import CONTENT_TYPE
from peltc.runtime.serving.protocol import HEADER, read, write
from peltc.runtime.serving.reading import body_of, caller_of
from peltc.runtime.serving.service import Service
from peltc.spec.diagnostics import PeltError

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
            *GrowthDoor(service).routes(),
        ],
        lifespan=lifespan,
    )


class Door:
    """The paths of the protocol, a method for each."""

    def __init__(self, service: Service):
        self.service = service

    async def about(self, request: Request) -> Response:
        """Server metadata."""
        return JSONResponse({"name": "peltc", "version": metadata.version("peltc"), "extensions": self._extensions()})

    def _extensions(self) -> list[str]:
        return ["binary_tensor_data", *(["generate"] if self.service.growth is not None else [])]

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
        body, size = await body_of(request, self.service.limits.body), request.headers.get(HEADER)
        asked = await self.service.aside(read, body, size)
        outputs = await self.service.answer(asked, caller_of(request))
        content, headers = await self.service.aside(write, asked, self.service.name, outputs)
        return Response(content, headers=headers)

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
