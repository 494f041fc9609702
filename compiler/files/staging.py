"""Folders that are built beside their place and moved there whole; and those that killed processes left, swept away.

    <parent>/<prefix>xxxxxxxx/   ours: `peltc.lock`, which the process that builds here holds locked while it lives
                      content/   what is built; it is moved out of here when it is whole
                      old/       what stood in its place, where the file system cannot exchange two folders in one step

A folder of this form whose lock can be had belongs to no living process. One without a lock file may be anybody's, and
is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

LOCK, CONTENT, OLD = "peltc.lock", "content", "old"


@contextlib.contextmanager
def staging(parent: Path, prefix: str) -> Iterator[Path]:
    """An empty folder to build in, on the file system of `parent`, gone when the block ends however it ends.

    Args:
        parent: an existing folder.
        prefix: what the name of the folder around it starts with, a dot first.

    Raises:
        OSError: the folder cannot be made.
    """
    around, lock = _make(parent, prefix)
    try:
        content = around / CONTENT
        content.mkdir()
        yield content
    finally:
        _remove(around)
        os.close(lock)


def _make(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder around a locked file, and the file's descriptor."""
    while True:
        around = Path(tempfile.mkdtemp(None, prefix, parent))
        try:
            lock = os.open(around / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue
        except BaseException:
            shutil.rmtree(around, ignore_errors=True)
            raise
        with contextlib.suppress(OSError):  # a file system without locks: nobody can prove the folder dead there
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return around, lock
        os.close(lock)  # taken for dead by another process, between making the file and locking it


def sweep(parent: Path, prefix: str, place: Path | None = None) -> list[Path]:
    """Remove the folders that killed processes left; returns which. What cannot be proven dead or removed stays.

    Args:
        parent: where they are; it need not exist.
        prefix: as for `staging`.
        place: where the content was to go: what had been moved aside from there returns, if nothing took its place.
    """
    name = re.compile(re.escape(prefix) + r"[a-z0-9_]{8}")
    try:
        with os.scandir(parent) as entries:
            found = [Path(e.path) for e in entries if name.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    swept = []
    for around in found:
        with contextlib.suppress(OSError):
            lock = os.open(around / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not {entry.name for entry in around.iterdir()} <= {LOCK, CONTENT, OLD}:
                    continue
                if place is not None and (around / OLD).is_dir() and not place.exists():
                    (around / OLD).rename(place)
                _remove(around)
                swept.append(around)
            finally:
                os.close(lock)
    return swept


def _remove(around: Path) -> None:
    """Remove a folder of ours, the lock last: what is left when this is cut short can still be told for ours."""
    for name in (CONTENT, OLD):
        shutil.rmtree(around / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        if [entry.name for entry in around.iterdir()] == [LOCK]:
            (around / LOCK).unlink()
            around.rmdir()
