"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from peltc.runtime.running.session import Session

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The counters of one server.

    Args:
        session: whose profiles are counted.
    """

    def __init__(self, session: Session):
        self.session, self.registry = session, CollectorRegistry()
        self.waiting: list[Callable[[], int]] = []
        """What tells how many texts wait, of each queue."""
        self.queue = Gauge("pelt_queue_rows", "Texts that wait in the queue.", registry=self.registry)
        self.queue.set_function(lambda: sum(count() for count in self.waiting))
        self.requests = Counter("pelt_requests", "Requests by HTTP status.", ["door", "status"], registry=self.registry)
        self.seconds = Histogram("pelt_request_seconds", "From a request's last byte to its answer.", buckets=SECONDS,
                                 registry=self.registry)  # fmt: skip
        self.waits = Histogram("pelt_queue_seconds", "How long a request waits in the queue.", buckets=SECONDS,
                               registry=self.registry)  # fmt: skip
        self.rows = Histogram("pelt_batch_rows", "Texts of a batch.", buckets=ROWS, registry=self.registry)
        self.joined = Histogram("pelt_batch_requests", "Requests of a batch.", buckets=ROWS, registry=self.registry)
        self.runs = Histogram("pelt_batch_seconds", "How long a batch runs.", buckets=SECONDS, registry=self.registry)
        self.growing = Gauge("pelt_growing_rows", "Texts that grow.", registry=self.registry)
        self.read = Counter("pelt_prompt_tokens", "Tokens of prompts that were read.", registry=self.registry)
        self.written = Counter("pelt_generated_tokens", "Tokens that were generated.", registry=self.registry)
        self.firsts = Histogram("pelt_first_token_seconds", "From when a text is asked for to its first token.",
                                buckets=SECONDS, registry=self.registry)  # fmt: skip
        self.steps = Histogram("pelt_step_rows", "Texts that get a token in one run.", buckets=ROWS,
                               registry=self.registry)  # fmt: skip
        self.step = Histogram("pelt_step_seconds", "How long such a run takes.", buckets=SECONDS,
                              registry=self.registry)  # fmt: skip
        self.registry.register(self)

    def began(self, tokens: int, waited: float) -> None:
        """Count a prompt of so many tokens, whose text got its first token so many seconds after it was asked for."""
        self.read.inc(tokens)
        self.written.inc()
        self.firsts.observe(waited)

    def stepped(self, rows: int, seconds: float) -> None:
        """Count a run by which each of some texts got a token."""
        self.written.inc(rows)
        self.steps.observe(rows)
        self.step.observe(seconds)

    def running(self, rows: int) -> None:
        """Count the texts that grow."""
        self.growing.set(rows)

    def ran(self, rows: int, requests: int, seconds: float, waits: Sequence[float]) -> None:
        """Count a batch.

        Args:
            rows: texts; of so many requests.
            seconds: how long it ran.
            waits: how long each request waited before, in seconds.
        """
        self.rows.observe(rows)
        self.joined.observe(requests)
        self.runs.observe(seconds)
        for wait in waits:
            self.waits.observe(wait)

    def text(self) -> bytes:
        """All counters in Prometheus' text format."""
        return bytes(generate_latest(self.registry))

    def collect(self) -> Iterable[Metric]:
        """The profiles in memory, which the session counts itself."""
        if self.session.residents is None:
            return
        found = self.session.residents.stats()
        yield GaugeMetricFamily("pelt_profiles_resident", "Profiles in memory.", value=found["resident"])
        for key, words in (("hits", "Profiles that a run found in memory."),
                           ("misses", "Profiles that were brought into memory."),
                           ("evictions", "Profiles that left memory.")):  # fmt: skip
            yield CounterMetricFamily(f"pelt_profile_{key}", words, value=found[key])
