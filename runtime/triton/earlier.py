"""The export that is at a place already: its version, the numbers of its profiles, and whether it is as it was
written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peltc.compiler.files.talk import Talk
from peltc.runtime.triton.rows import DATA, Numbers
from peltc.spec.diagnostics import Place, fail

RECORD, WHAT = "pelt-triton.json", "export for Triton"
"""The file by which an export is known, and what it is called."""


@dataclass(frozen=True)
class Earlier:
    """What an export recorded of itself.

    Attributes:
        version: the number of its version; 0 where there is none.
        file: that of its profiles, where it has any.
    """

    version: int = 0
    numbers: Numbers = field(default_factory=lambda: Numbers(""))
    file: Path | None = None

    def data(self) -> Path:
        """The file of its profiles.

        Raises:
            PeltError: E603 it is gone.
        """
        if self.file is None:
            raise fail("E603", f"the earlier export has no {DATA} any more, of which rows are to be kept",
                       expected="the folder as it was written", hint="--renumber needs no earlier rows")  # fmt: skip
        return self.file

    @staticmethod
    def read(place: Path, talk: Talk) -> Earlier:
        """The export at a place, which need not have one.

        Raises:
            PeltError: E601 there is more than was written; E603 what it recorded is malformed.
        """
        file = place / RECORD
        if not file.is_file():
            return Earlier()
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            found = _earlier(record, place)
            models = [str(name) for name in record["models"]]
            digests = {str(name): str(digest) for name, digest in record["configs"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            raise fail("E603", "what an earlier export recorded of itself is malformed", Place(str(file)),
                       "another folder, or this one without what is in it") from None  # fmt: skip
        more = sorted({entry.name for entry in place.iterdir()} - {RECORD, *models})
        if more:
            raise fail("E601", f"the export for Triton holds '{more[0]}', which no export has written and which would"
                       " be lost", Place(str(place)), "a repository of its own, for Triton takes several")  # fmt: skip
        for name in models:
            if Earlier.digest(place / name) != digests.get(name):
                talk(f"warning: what was changed by hand in {place / name / 'config.pbtxt'} is lost")
        return found

    @staticmethod
    def digest(model: Path) -> str:
        """What a model's config is told by."""
        file = model / "config.pbtxt"
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _earlier(record: Any, place: Path) -> Earlier:
    version, said = record["version"], record["profiles"]
    if type(version) is not int or version < 1:
        raise ValueError
    if said is None:
        return Earlier(version)
    numbers = Numbers(str(said["fingerprint"]), said["round"], dict(said["rows"]), tuple(said["gone"]))
    each = [*numbers.rows.values(), *numbers.gone, numbers.round]
    if not all(type(row) is int and 0 <= row < 1 << 31 for row in each) or len({*each[:-1]}) < len(each) - 1:
        raise ValueError
    files = (place / str(name) / str(version) / DATA for name in record["models"])
    return Earlier(version, numbers, next((file for file in files if file.is_file()), None))
