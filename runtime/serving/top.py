"""What a server is doing, in a few lines: read from its counters twice, for what happened in between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from peltc.spec.diagnostics import Place, fail

MOST = 1 << 20
"""Bytes of an answer that are read."""
TIMEOUT = 5.0
"""Seconds that a server has to answer."""
Label = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Counts:
    """A server's counters at one time: values by name and labels."""

    values: Mapping[tuple[str, Label], float]

    def of(self, name: str) -> float:
        """The sum of a counter over its labels; 0 where there is none."""
        return sum(value for (known, _), value in self.values.items() if known == name)

    def by(self, name: str, label: str) -> dict[str, float]:
        """A counter by one of its labels, summed over the others."""
        found: dict[str, float] = {}
        for (known, labels), value in self.values.items():
            if known == name and (key := dict(labels).get(label)) is not None:
                found[key] = found.get(key, 0) + value
        return found

    def since(self, before: Counts) -> Counts:
        """What was counted in between; a server that was started anew has counted all that it says."""
        if any(value < before.values.get(key, 0) for key, value in self.values.items() if not _moves(key[0])):
            return self
        return Counts({key: value - (0 if _moves(key[0]) else before.values.get(key, 0))
                       for key, value in self.values.items()})  # fmt: skip

    def quantile(self, name: str, share: float) -> float:
        """The bound below which a share of a histogram's values lies; nan of none, infinity above the last bound."""
        bounds = sorted((float(bound), count) for bound, count in self.by(f"{name}_bucket", "le").items())
        total = bounds[-1][1] if bounds else 0
        return next((bound for bound, count in bounds if count >= share * total), math.inf) if total else math.nan

    def mean(self, name: str) -> float:
        """The mean of a histogram's values; nan of none."""
        count = self.of(f"{name}_count")
        return self.of(f"{name}_sum") / count if count else math.nan


def _moves(name: str) -> bool:
    """Whether what a name counts goes up and down, and is told as it is now."""
    return name in ("pelt_queue_rows", "pelt_profiles_resident", "pelt_growing_rows")


def counted(text: str) -> Counts:
    """A server's counters from Prometheus' text format.

    Raises:
        ValueError: it is no such text.
    """
    return Counts({(sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
                   for family in text_string_to_metric_families(text) for sample in family.samples
                   if not sample.name.endswith("_created")})  # fmt: skip


def ask(address: str) -> Counts:
    """The counters of the server at an address, `http://HOST:PORT`.

    Raises:
        PeltError: E638 no address, or nothing there that counts as a server of ours does.
    """
    place, expected = Place(address), "the address of `pelt serve`, as http://127.0.0.1:8080"
    try:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it is no address of HTTP")
        with urlopen(f"{parts.scheme}://{parts.netloc}/metrics", timeout=TIMEOUT) as answer:
            found = counted(answer.read(MOST).decode("utf-8"))
    except (URLError, OSError, ValueError) as error:
        raise fail(
            "E638", f"cannot read a server's counters: {getattr(error, 'reason', error)}", place, expected
        ) from None
    if not any(name == "pelt_queue_rows" for name, _ in found.values):
        raise fail("E638", "what answers there is no server of artifacts", place, expected)
    return found


def told(now: Counts, seconds: float) -> list[str]:
    """The lines of a display.

    Args:
        now: what was counted.
        seconds: in how long; 0 where that is not known, and sums are told instead of rates.
    """
    statuses = now.by("pelt_requests_total", "status")
    total, per = sum(statuses.values()), f" in {seconds:.0f} s" if seconds else ""
    rate = f", {total / seconds:,.1f} a second" if seconds else ""
    hits, misses = now.of("pelt_profile_hits_total"), now.of("pelt_profile_misses_total")
    share = f", {hits / (hits + misses):.0%} of those asked for were in memory" if hits + misses else ""
    lines = [
        f"requests   {total:,.0f}{per}{rate}" + "".join(f", {n:,.0f} × {s}" for s, n in sorted(statuses.items()) if n),
        f"latency    half within {_time(now.quantile('pelt_request_seconds', 0.5))},"
        f" 95 % within {_time(now.quantile('pelt_request_seconds', 0.95))},"
        f" 99 % within {_time(now.quantile('pelt_request_seconds', 0.99))}",
        f"queue      {now.of('pelt_queue_rows'):,.0f} texts wait;"
        f" 95 % of requests waited {_time(now.quantile('pelt_queue_seconds', 0.95))} or less",
        f"batches    {now.of('pelt_batch_rows_count'):,.0f}, of {_number(now.mean('pelt_batch_rows'))} texts and"
        f" {_number(now.mean('pelt_batch_requests'))} requests in {_time(now.mean('pelt_batch_seconds'))} each",
        f"profiles   {now.of('pelt_profiles_resident'):,.0f} in memory{share};"
        f" {misses:,.0f} came, {now.of('pelt_profile_evictions_total'):,.0f} left",
    ]  # fmt: skip
    return [*lines, *_grown(now, seconds)]


def _grown(now: Counts, seconds: float) -> list[str]:
    """The lines about texts that grow; none where none ever did."""
    tokens, read = now.of("pelt_generated_tokens_total"), now.of("pelt_prompt_tokens_total")
    growing = now.of("pelt_growing_rows")
    if not (tokens or growing):
        return []
    rate = f", {tokens / seconds:,.1f} a second" if seconds else ""
    return [
        f"tokens     {tokens:,.0f} generated{rate}, {read:,.0f} of prompts read; {growing:,.0f} texts grow",
        f"growth     {_number(now.mean('pelt_step_rows'))} texts a run, of {_time(now.mean('pelt_step_seconds'))};"
        f" 95 % had their first token within {_time(now.quantile('pelt_first_token_seconds', 0.95))}",
    ]


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    return "more than 10 s" if math.isinf(seconds) else f"{1000 * seconds:,.3g} ms"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"
