"""The paths under which texts grow: OpenAI's completions, chats and models, and the extension `generate` of the Open
Inference Protocol; answers at once, or in pieces as events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from peltc.runtime.serving.completions import Chat, Completion
from peltc.runtime.serving.continuing import Continuation
from peltc.runtime.serving.fields import Fields
from peltc.runtime.serving.reading import body_of, caller_of
from peltc.runtime.serving.service import Service
from peltc.spec.diagnostics import PeltError

if TYPE_CHECKING:
    from peltc.runtime.generating.rows import Piece
    from peltc.runtime.serving.growth import Growing, Growth

Form = Completion | Continuation
KINDS = {400: "invalid_request_error", 403: "permission_error", 404: "not_found_error", 413: "invalid_request_error",
         429: "rate_limit_error"}  # fmt: skip
"""What OpenAI's protocol calls a status; others are the server's fault."""
NAMES = 1000
"""How many models a list has at most: a store may have millions of profiles."""
GONE = 499
AGAIN = {"Retry-After": "1"}


class GrowthDoor:
    """The paths, a method for each."""

    def __init__(self, service: Service):
        self.service = service

    def routes(self) -> list[Route]:
        """All of them."""
        model = "/v2/models/{model}"
        return [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.one),
            Route(f"{model}/generate", self.generate, methods=["POST"]),
            Route(f"{model}/generate_stream", self.generate_stream, methods=["POST"]),
        ]

    async def completions(self, request: Request) -> Response:
        """Completions of prompts."""
        return await self._answer(request, lambda said: Completion(said, self.service.name))

    async def chat(self, request: Request) -> Response:
        """The next message of a chat."""
        return await self._answer(request, lambda said: Chat(said, self.service.name))

    async def generate(self, request: Request) -> Response:
        """The continuation of a text."""
        return await self._answer(request, lambda said: self._continuation(request, said, False))

    async def generate_stream(self, request: Request) -> Response:
        """The continuation of a text in pieces."""
        return await self._answer(request, lambda said: self._continuation(request, said, True))

    async def models(self, request: Request) -> Response:
        """The models that the caller may use: the base, and profiles."""
        found, caller = [], caller_of(request)
        for name in await self.service.aside(self._names):
            if await self.service.allows(caller, None if name == self.service.name else name):
                found.append(_model(name))
        return JSONResponse({"object": "list", "data": found})

    async def one(self, request: Request) -> Response:
        """One model."""
        name = request.path_params["model"]
        try:
            profile = None if name == self.service.name else name
            await self.service.check_allowed(caller_of(request), profile)
            await self.service.aside(self.service.session.check_profiles, profile, 1)
        except Exception as error:
            return self.refused(error, True)
        return JSONResponse(_model(name))

    def _names(self) -> list[str]:
        residents = self.service.session.residents
        stored = () if residents is None else (record.name for record in residents.store.list())
        return [*islice(dict.fromkeys(chain([self.service.name], self.service.session.profiles, islice(stored, NAMES))),
                        NAMES)]  # fmt: skip

    def _continuation(self, request: Request, said: Fields, stream: bool) -> Form:
        self.service.check_name(request.path_params["model"])
        return Continuation(said, self.service.name, stream)

    async def _answer(self, request: Request, read: Callable[[Fields], Form]) -> Response:
        """Let texts grow, and answer with them."""
        openai = request.url.path.startswith("/v1/")
        door = "openai" if openai else "http"
        try:
            body = await body_of(request, self.service.limits.body)
            form = await self.service.aside(lambda: read(Fields.parsed(body)))
            growing = await self.service.grow(form.asked, caller_of(request))
            growth = self.service.growth
            assert growth is not None
            pieces = growth.pieces(growing)
            if form.asked.stream:
                first = await _unless_gone(request, anext(pieces))  # what keeps it from beginning has a status
                return Events(self, form, growing, growth, first, pieces, door)
            found: list[list[Piece]] = [[] for _ in growing.rows]
            await _unless_gone(request, _collected(pieces, found))
            answer = await self.service.aside(form.whole, growing, found, growth.tokens)
            self.service.count(door, 200, None)
            return JSONResponse(answer)
        except ClientDisconnect:
            response = Response(status_code=GONE)
        except Exception as error:
            response = self.refused(error, openai)
        self.service.count(door, response.status_code, None)
        return response

    def refused(self, error: Exception, openai: bool) -> Response:
        """The error as the protocol writes it."""
        status, said = self.service.refusal(error)
        if openai and isinstance(error, PeltError) and error.diagnostics[0].code == "E632":
            status = 404  # a name that no store has is that of no model
        headers = AGAIN if status in (429, 503) else None
        if not openai:
            return JSONResponse({"error": said}, status, headers)
        code = field = None
        if isinstance(error, PeltError):
            code, field = error.diagnostics[0].code, error.diagnostics[0].place.key or None
        code = "model_not_found" if status == 404 else code
        kind = KINDS.get(status, "server_error")
        return JSONResponse({"error": {"message": said, "type": kind, "param": field, "code": code}}, status, headers)


class Events(StreamingResponse):
    """An answer in pieces. Where the caller goes away, before the first or between two, the texts are let go of.

    Args:
        door: whose request it is.
        first: the first piece, which is there.
        rest: the others.
        name: of the door, for the counters.
    """

    def __init__(
        self, door: GrowthDoor, form: Form, growing: Growing, growth: Growth, first: tuple[int, Piece],
        rest: AsyncIterator[tuple[int, Piece]], name: str,
    ):  # fmt: skip
        self.door, self.form, self.growing, self.growth, self.name = door, form, growing, growth, name
        self.status = GONE
        super().__init__(self._written(first, rest), media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache"})  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.growth.engine.cancel(self.growing.rows)
            self.door.service.count(self.name, self.status, None)

    async def _written(self, first: tuple[int, Piece], rest: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[str]:
        form, tokens = self.form, self.growth.tokens
        try:
            for said in (*form.opened(self.growing), *form.went_on(*first, tokens)):
                yield _event(said)
            async for index, piece in rest:
                for said in form.went_on(index, piece, tokens):
                    yield _event(said)
            for said in form.closed():
                yield _event(said)
            if self.name == "openai":
                yield "data: [DONE]\n\n"
            self.status = 200
        except Exception as error:
            refused = self.door.refused(error, self.name == "openai")
            self.status = refused.status_code
            yield f"data: {bytes(refused.body).decode()}\n\n"


async def _collected(pieces: AsyncIterator[tuple[int, Piece]], found: list[list[Piece]]) -> None:
    async for index, piece in pieces:
        found[index].append(piece)


async def _unless_gone(request: Request, wanted: Awaitable[Any]) -> Any:
    """What is waited for, unless the caller goes away first.

    Raises:
        ClientDisconnect: it does.
    """
    task = asyncio.ensure_future(wanted)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(said: dict[str, Any]) -> str:
    return f"data: {json.dumps(said, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "peltc"}
