"""The folder that compilations keep between them: bases, converted weights, digests. All of it can be deleted."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from peltc.compiler.files.staging import sweep
from peltc.spec.diagnostics import Place, fail

BUILDING = ".building-"
"""What the names of the folders start with in which entries are built."""


def cache_folder() -> Path:
    """`$PELTC_CACHE`, or `peltc` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PELTC_CACHE") or Path(home) / "peltc")


def writable(folder: Path) -> Path:
    """A folder in the cache, made where it is not there yet, of which it is certain that files can be written to it.
    Asked before what takes time is begun.

    Raises:
        PeltError: E620 it cannot be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"?")
    except OSError as error:
        raise fail("E620", f"cannot write to the cache: {error.strerror or error}", Place(str(folder)),
                   "a folder that can be written, on a disk with room",
                   "the environment variable PELTC_CACHE names another folder") from None  # fmt: skip
    return folder


def tidy_cache() -> None:
    """Remove what killed processes left half-built in the cache."""
    for name in ("bases", "weights"):
        sweep(cache_folder() / name, BUILDING)
