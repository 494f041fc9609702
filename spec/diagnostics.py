"""What the compiler says when it cannot go on: subject, place, expectation, finding, hint, and a code per kind.

Codes: E1xx the document, E2xx the spec against the reference architecture, E3xx formulas, E4xx weights, E5xx the
model, E6xx the artifact, E7xx the numbers, E8xx requests to a server.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from peltc.spec.aliases import ours, said


@dataclass(frozen=True)
class Place:
    """A point in a user's file: `path:line:column`, and the key path that leads to it (`attach[1].at`)."""

    path: str = ""
    line: int = 0
    column: int = 0
    key: str = ""

    def __str__(self) -> str:
        where = ":".join([self.path, *(str(n) for n in (self.line, self.column) if n)])
        return "  ".join(part for part in (where, self.key) if part)


NOWHERE = Place()


def printable(line: str) -> str:
    """A line from somebody's file without the characters that would move a terminal's cursor or colours."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


@dataclass(frozen=True)
class Diagnostic:
    """One finding.

    Attributes:
        code: the kind of finding, `E203`.
        message: what is wrong, naming the thing found.
        place: where it is.
        expected: what would have been right, or empty.
        hint: what to do, or empty.
    """

    code: str
    message: str
    place: Place = NOWHERE
    expected: str = ""
    hint: str = ""

    def __str__(self) -> str:
        lines = [str(self.place)] if str(self.place) else []
        indent = "  " if lines else ""
        lines.append(f"{indent}{self.code} {self.message}")
        if self.expected:
            lines.append(f"{indent}expected {self.expected}")
        if self.hint:
            lines.append(f"{indent}hint: {self.hint}")
        return "\n".join(map(printable, "\n".join(lines).split("\n")))

    def to_dict(self) -> dict[str, object]:
        """The finding as plain data, for `--json`."""
        return asdict(self)


class PeltError(Exception):
    """The user's input cannot be compiled. Carries every finding of the stage that stopped."""

    def __init__(self, diagnostics: Diagnostic | Iterable[Diagnostic]):
        self.diagnostics: tuple[Diagnostic, ...] = (
            (diagnostics,) if isinstance(diagnostics, Diagnostic) else tuple(diagnostics)
        )
        super().__init__("\n\n".join(str(d) for d in self.diagnostics))


def fail(code: str, message: str, place: Place | None = None, expected: str = "", hint: str = "") -> PeltError:
    """A `PeltError` with one finding: `raise fail("E501", ...)`."""
    return PeltError(Diagnostic(code, message, place or Place(), expected, hint))


def wrong_type(what: str, given: object, expected: str, hint: str = "") -> PeltError:
    """A `PeltError` for an argument of another type than is taken: E216."""
    shown = repr(given).split("\n")[0]
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return fail("E216", f"{what} is given as {type(given).__name__}: {shown}", None, expected, hint)


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint for what others call `word`, or "did you mean ...?" for the nearest known word; or empty."""
    words = list(known)
    if sentence := said(word):
        return sentence
    if own := ours(word, words):
        return f"did you mean '{own}'?"
    match = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"did you mean '{match[0]}'?" if match else ""


def one_of(words: Sequence[str], limit: int = 40) -> str:
    """`one of: a, b, c`, cut after `limit` words."""
    shown = ", ".join(words[:limit])
    return f"one of: {shown}" + (f", ... ({len(words)} in all)" if len(words) > limit else "")


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, at most 300 characters; its name where it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
