"""Where an adapter came from, in the metadata of its tensors' file: so that the manifest says it too where a spec was
imported first and compiled later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from peltc import schemas
from peltc.compiler.files.checkpoint import read_metadata
from peltc.spec.diagnostics import Place, fail

KEY = "pelt.imported"
MAX_CHARACTERS = 1 << 16


def metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file that says where its tensors came from."""
    return {KEY: json.dumps(record, separators=(",", ":"))}


def recorded(file: Path) -> dict[str, Any] | None:
    """Where a file's tensors came from; None where it says nothing.

    Raises:
        PeltError: E401 no safetensors file; E409 what it says is malformed.
    """
    text = read_metadata(file).get(KEY)
    if text is None:
        return None
    try:
        if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
            raise ValueError("too long")
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = ""
    form = schemas.load("manifest")["properties"]["imported"]
    if not isinstance(found, dict) or not Draft202012Validator(form).is_valid(found):
        raise fail("E409", "what the file says of the adapter that it was imported from is malformed", Place(str(file)),
                   "what `pelt import` wrote", "import the adapter again")  # fmt: skip
    return found
