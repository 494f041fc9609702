"""What a server takes of requests and does with them at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServingLimits:
    """Bounds of requests, of the queue, and of batches.

    Attributes:
        body: bytes of a request.
        rows: texts of a request, and of a batch; so many grow at once.
        tokens: of a batch and of a request, padding included; of texts that grow, as long as they may become.
        padding: the share of a batch's tokens that may be padding, from 0 (equal lengths alone) to 1.
        new: tokens that a text may get where it grows.
        queue: texts that wait; a request that would make them more is refused (429).
        delay: seconds that the first request of a batch waits for others to join it.
        connections: through one door, at once; one more is refused (503).
        grace: seconds that requests have to end when the server is stopped.
    """

    body: int = 16 << 20
    rows: int = 64
    tokens: int = 32_768
    padding: float = 0.1
    new: int = 4096
    queue: int = 512
    delay: float = 0.002
    connections: int = 1024
    grace: float = 30.0
