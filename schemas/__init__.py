"""JSON Schemas (draft 2020-12) of specs, methods, weights-free manifests; see the JSON files beside this one."""

import json
from functools import cache
from importlib import resources
from typing import Any


@cache
def load(name: str) -> dict[str, Any]:
    """The schema in `<name>.schema.json`.

    Raises:
        FileNotFoundError: there is no such schema.
    """
    text = resources.files(__name__).joinpath(f"{name}.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema
