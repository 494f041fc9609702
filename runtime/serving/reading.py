"""What every door for HTTP reads of a request: its body, and who asks."""

from __future__ import annotations

from starlette.requests import Request

from peltc.runtime.serving.inference import wrong
from peltc.runtime.serving.service import Caller
from peltc.spec.diagnostics import fail


async def body_of(request: Request, most: int) -> bytes:
    """The body, of which no more is read than is allowed.

    Args:
        most: bytes.

    Raises:
        PeltError: E801 it is compressed; E807 it is larger.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise wrong("the body is compressed")
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > most:
            raise fail("E807", f"the request has more than {most:,} bytes")
    return bytes(found)


def caller_of(request: Request) -> Caller:
    """Who asks."""
    return Caller(dict(request.headers), request.client.host if request.client else "")
