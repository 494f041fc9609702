"""Findings about a plan, gathered until all are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peltc.spec.diagnostics import Diagnostic, Place
from peltc.spec.specification import Attachment


class Findings(list[Diagnostic]):
    """What is wrong, in the order in which it is found."""

    def find(self, code: str, message: str, place: Place, expected: str = "", hint: str = "") -> None:
        """Add a finding."""
        self.append(Diagnostic(code, message, place, expected, hint))

    def told(self) -> list[Diagnostic]:
        """The findings; those that repeat from site to site once each, with their number."""
        groups: dict[tuple[Any, ...], list[Diagnostic]] = {}
        for finding in dict.fromkeys(self):
            apart = () if finding.code in ("E205", "E206", "E310") else (finding.message,)
            groups.setdefault((finding.code, finding.place, finding.hint, *apart), []).append(finding)
        told = []
        for first, *more in groups.values():
            again = f" (and {len(more)} more like it)" if more else ""
            told.append(replace(first, message=first.message + again))
        return told


def at(entry: Attachment, key: str = "") -> Place:
    """Where an attachment says something: under `key`, or where it names its sites."""
    return entry.at_key(key or ("parameter" if entry.by_parameter else "at"))
