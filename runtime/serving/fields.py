"""The fields of a request in JSON, each taken by its name: what nobody takes is refused, so that nothing that somebody
asks for is passed over."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from peltc.spec.diagnostics import PeltError, Place, fail, nearest


class Fields:
    """An object in JSON. A field that is null is one that is not there.

    Args:
        said: the object.
        within: the field that holds it, for what is said about its own.

    Raises:
        PeltError: E801 it is no object.
    """

    def __init__(self, said: object, within: str = ""):
        if not isinstance(said, dict):
            raise self._wrong(within, f"{within or 'the request'} is {type(said).__name__}", "an object")
        self.within = f"{within}." if within else ""
        self.said = {name: value for name, value in said.items() if value is not None}
        self.known: list[str] = []

    @classmethod
    def parsed(cls, body: bytes) -> Fields:
        """Those of a request's body.

        Raises:
            PeltError: E801 it is not JSON, or no object.
        """
        try:
            return cls(json.loads(body))
        except (ValueError, RecursionError) as error:
            raise fail("E801", f"the body is not JSON: {str(error)[:100]}") from None

    def __contains__(self, name: str) -> bool:
        return name in self.said

    def take(self, name: str) -> Any:
        """The value of a field, whatever it is; None where it is not there."""
        self.known.append(name)
        return self.said.get(name)

    def text(self, name: str, most: int = 1000, needed: bool = False) -> str | None:
        """A text."""
        value = self.take(name)
        if value is None and not needed:
            return None
        if not isinstance(value, str) or len(value) > most:
            raise self._wrong(name, self._is(name, value), f"a text of at most {most:,} characters")
        return value

    def number(self, name: str, low: float, high: float, above: bool = False) -> float | None:
        """A number between two; not the lower one itself, where it is to be above it."""
        value = self.take(name)
        if value is None:
            return None
        fits = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
        if not fits or (above and value == low):
            between = f"a number above {low:g}, at most {high:g}" if above else f"a number from {low:g} to {high:g}"
            raise self._wrong(name, self._is(name, value), between)
        return float(value)

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number between two."""
        value = self.take(name)
        if value is None:
            return None
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(name, self._is(name, value), f"a whole number from {low:,} to {high:,}")
        return value

    def truth(self, name: str) -> bool:
        """Whether something is asked for."""
        value = self.take(name)
        if value not in (None, True, False) or (isinstance(value, int) and not isinstance(value, bool)):
            raise self._wrong(name, self._is(name, value), "true or false")
        return value is True

    def inner(self, name: str) -> Fields:
        """An object within."""
        value = self.take(name)
        return Fields({} if value is None else value, self.within + name)

    def neutral(self, name: str, *values: object) -> None:
        """Take a field that is served in no other way than that which changes nothing.

        Raises:
            PeltError: E809 it asks for another.
        """
        value = self.take(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in values):
            shown = json.dumps(value)
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            expected = " or ".join(json.dumps(one) for one in values)
            raise fail("E809", f"'{self.within}{name}' is not served: {shown}", Place(key=self.within + name),
                       f"{expected}, or nothing" if values else "")  # fmt: skip

    def passed(self, *names: str) -> None:
        """Take fields that say something about the caller, and nothing about the answer."""
        self.known += names

    def done(self) -> None:
        """Whether all was taken.

        Raises:
            PeltError: E809 a field that nobody has taken.
        """
        for name in self.said:
            if name not in self.known:
                raise fail("E809", f"'{self.within}{name:.60}' is not served", Place(key=f"{self.within}{name:.60}"),
                           hint=nearest(name, self.known))  # fmt: skip

    def wrong(self, name: str, what: str, expected: str = "") -> PeltError:
        """The finding about a field: E801."""
        return self._wrong(name, f"'{self.within}{name}' {what}", expected)

    def _is(self, name: str, value: object) -> str:
        shown = "missing" if value is None else json.dumps(value)
        return f"'{self.within}{name}' is {shown if len(shown) <= 60 else f'{shown[:57]}...'}"

    def _wrong(self, name: str, what: str, expected: str) -> PeltError:
        return fail("E801", what, Place(key=getattr(self, "within", "") + name), expected)


def texts(fields: Fields, name: str, count: int, size: int) -> Sequence[str]:
    """A text or a list of some, none of them empty."""
    value = fields.take(name)
    if value is None:
        return ()
    found = [value] if isinstance(value, str) else value
    right = isinstance(found, list) and all(isinstance(one, str) and 0 < len(one) <= size for one in found)
    if not right or len(found) > count:
        raise fields.wrong(name, "is no list of texts", f"at most {count} texts of 1 to {size:,} characters")
    return found
