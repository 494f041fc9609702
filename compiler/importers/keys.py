"""The keys of an adapter's config, held against what is known of its method: each is understood, says nothing of the
function, is off, or is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from jsonschema import Draft202012Validator

from peltc.compiler.importers.formats import is_off
from peltc.spec.diagnostics import Diagnostic, PeltError, Place, one_of


class Known(Protocol):
    """What is known of a method's keys: see `formats.Format`."""

    @property
    def read(self) -> Mapping[str, Any]:
        """Keys that are understood, with the JSON Schema of their values."""

    @property
    def inert(self) -> frozenset[str]:
        """Keys that change nothing."""

    @property
    def refused(self) -> Mapping[str, str]:
        """Keys that must be off, with the reason."""

    @property
    def only(self) -> Mapping[str, tuple[tuple[Any, ...], str]]:
        """Keys of which some values alone are understood, with these and the reason."""


def check_config(config: Mapping[str, Any], known: Known, file: Place, library: str) -> None:
    """Whether each key of a config is understood, or off.

    Args:
        file: where the config stands.
        library: who writes it, for messages.

    Raises:
        PeltError: E430 a value that is none of the key; E431, a finding for each key that is not understood.
    """
    findings = []
    for key, value in config.items():
        place = Place(file.path, key=key)
        if key in known.read:
            if error := next(Draft202012Validator(known.read[key]).iter_errors(value), None):
                findings.append(Diagnostic("E430", f"'{key}' is {value!r:.60}, as {library} never writes it", place,
                                           f"by its schema, {error.message[:120]}"))  # fmt: skip
            continue
        if key in known.inert:
            continue
        if key in known.only:
            allowed, why = known.only[key]
            if not any(value is one or (value == one and type(value) is type(one)) for one in allowed):
                findings.append(Diagnostic("E431", f"'{key}' is {value!r:.60}: {why}", place,
                                           one_of([repr(one) for one in allowed])))  # fmt: skip
        elif not is_off(value):
            why = known.refused.get(key, "the key is not known here")
            findings.append(Diagnostic("E431", f"'{key}' is {value!r:.60}: {why}", place, "the key left out"))
    if findings:
        raise PeltError(findings)
