"""A server in this process: uvicorn runs the door for HTTP, and the one for gRPC beside it, and ends what is under way
before it stops."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import uvicorn

from peltc.runtime.running.session import Session
from peltc.runtime.serving.app import build
from peltc.runtime.serving.limits import ServingLimits
from peltc.runtime.serving.service import Allow, Service
from peltc.spec.diagnostics import PeltError, fail
from peltc.spec.packages import needing


def serve(
    session: Session,
    host: str = "127.0.0.1",
    port: int = 8080,
    grpc_port: int | None = None,
    limits: ServingLimits | None = None,
    allow: Allow | None = None,
    ready: Callable[[str], object] | None = None,
) -> None:
    """Serve an artifact until the process is told to stop (SIGTERM or SIGINT), which it does after the requests that it
    has were answered.

    Args:
        session: the artifact, with a store or with profiles that were added.
        host: the address to listen at; this machine alone by default, for nobody is asked who they are.
        port: for HTTP, 0 for one that is free.
        grpc_port: for gRPC; None for none.
        limits: of requests, of the queue, and of batches.
        allow: whether a caller may use a profile.
        ready: is given the address of each door once it listens.

    Raises:
        PeltError: E808 an address cannot be listened at.
    """
    said = ready or (lambda address: None)
    failed: list[PeltError] = []
    with _listening(host, port) as listening:
        service = Service(session, limits, allow)
        shown = f"[{host}]" if ":" in host else host

        async def beside() -> Callable[[], Awaitable[object]] | None:
            server, number = None, 0
            if grpc_port is not None:
                try:
                    with needing("a server for gRPC"):
                        from peltc.runtime.serving.grpc_door import listen
                    server, number = await listen(service, f"{shown}:{grpc_port}")
                except PeltError as error:
                    failed.append(error)
                    runner.should_exit = True
                    return None
            said(f"http://{shown}:{listening.getsockname()[1]}/v2/models/{service.name}/infer")
            if service.growth is not None:
                said(f"http://{shown}:{listening.getsockname()[1]}/v1")
            if server is None:
                return None
            said(f"grpc://{shown}:{number}")
            return partial(server.stop, service.limits.grace)

        config = uvicorn.Config(build(service, beside), log_level="warning", ws="none", server_header=False,
                                limit_concurrency=service.limits.connections,
                                timeout_graceful_shutdown=max(1, round(service.limits.grace)))  # fmt: skip
        runner = uvicorn.Server(config)
        with suppress(KeyboardInterrupt):  # the signal that uvicorn has heard, passed on when all was answered
            runner.run(sockets=[listening])
        service.end()
    if failed:
        raise failed[0]


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or the ends of answers wait for 40 ms
        return listening
    except OSError as error:
        raise fail("E808", f"cannot listen at {host}:{port}: {error.strerror or error}",
                   hint="--port 0 takes one that is free") from None  # fmt: skip
