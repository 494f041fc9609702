"""The manifest of an artifact, `pelt.json`: read, and written whole. Whoever runs an artifact needs this and the check
of its files, and nothing else of the compiler; so nothing heavy is imported here."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peltc.spec.diagnostics import Place, fail

MANIFEST = "pelt.json"
CACHE = "cache.safetensors"
"""What the caches of keys and values begin with, by the graph's inputs."""

GIVEN, GROWN = "input.", "output."
"""What precedes the names of what a graph takes and gives again, such as caches."""
LENGTH = "cache_length"
"""The input of a graph that shares its cache: how many positions of the buffers are filled [1]."""
KEPT = "kept"
"""What a graph that generates keeps from the prompt, beside the cache: an input and an output [B, 0 or 1, N]."""

ADAPTER = "adapter.safetensors"
"""The adapter's tensors, in an artifact's folder."""
PROFILES = "profiles"
"""The folder of the profiles that lie in an artifact."""
LINK, STARTS = "link", "starts.safetensors"
"""The folder of what linking reads, and in it what the modules' tensors are where no profile brings them."""
PROFILE = "profile"
"""The input of a graph that says which profile each row has: a number, -1 for none."""
PROFILE_WEIGHTS = "profile_weights"
"""The input that says with which weights, where a row has several."""


def write_whole(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    new = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        new.write_bytes(content)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `pelt.json`, whole or not at all."""
    write_whole(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact.

    Raises:
        PeltError: E603 the folder is no artifact, or its manifest is malformed.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise fail(
            "E603", "the folder is no artifact: it has no pelt.json", Place(str(folder)), "what pelt-compile wrote"
        ) from None
    except ValueError as error:
        raise fail("E603", f"the manifest is not JSON: {error}", Place(str(file))) from None
    if not isinstance(manifest, dict) or manifest.get("pelt") != 1:
        raise fail("E603", "the manifest is of another version", Place(str(file)), "pelt: 1")
    return manifest
