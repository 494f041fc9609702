"""A server in this process: uvicorn runs the application, and ends what is under way before it stops."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from peltc.runtime.running.session import Session
from peltc.runtime.serving.app import Allow, build
from peltc.runtime.serving.limits import ServingLimits


def serve(
    session: Session,
    host: str = "127.0.0.1",
    port: int = 8080,
    limits: ServingLimits | None = None,
    allow: Allow | None = None,
    ready: Callable[[str], object] | None = None,
) -> None:
    """Serve an artifact until the process is told to stop (SIGTERM or SIGINT), which it does after the requests that it
    has were answered.

    Args:
        session: the artifact, with a store or with profiles that were added.
        host: the address to listen at; this machine alone by default, for nobody is asked who they are.
        port: 0 for one that is free.
        limits: of requests, of the queue, and of batches.
        allow: whether a request may use a profile.
        ready: is given the server's address once it listens.

    Raises:
        OSError: the address cannot be listened at.
    """
    held = limits or ServingLimits()
    listening = socket.create_server((host, port), backlog=2048)
    app = build(session, held, allow)
    config = uvicorn.Config(app, log_level="warning", ws="none", server_header=False,
                            timeout_graceful_shutdown=max(1, round(held.grace)))  # fmt: skip
    if ready is not None:
        where, number = listening.getsockname()[:2]
        ready(f"http://{where}:{number}")
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        pass  # the signal that uvicorn has heard, passed on when all was answered
    finally:
        listening.close()
