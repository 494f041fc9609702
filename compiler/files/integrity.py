"""Whether files are still what they were: cheap figures that tell of a change, and digests where those have moved.

An artifact that links its base shares the file's bytes, so that whoever overwrites the base in place changes the
artifact. Its manifest records size, time stamp, inode, device and SHA-256 of each file. Opening compares the former,
which costs a call per file, and reads the bytes only of a file for which they moved: a copy, a touched file, or
another base. Digests are remembered in the cache by the cheap figures, so that a file is read for it once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from peltc.compiler.files.cache import cache_folder
from peltc.spec.diagnostics import Diagnostic, PeltError, Place, fail

CHUNK = 1 << 24
"""Bytes read at a time: many, since a thread that digests waits for Python's lock after each."""
SETTLED = 2_000_000_000
"""Nanoseconds after which a file that changes once more surely gets another time stamp, on every file system."""

MEND = "restore the base's file, or compile again"


class Stamp(NamedTuple):
    """What changes when a file is written to or replaced; each by itself may stay as it was."""

    size: int
    mtime_ns: int
    inode: int
    device: int

    def to_json(self) -> dict[str, int]:
        """As in a manifest, where the size is called `bytes`."""
        return {"bytes": self.size, "mtime_ns": self.mtime_ns, "inode": self.inode, "device": self.device}


class Stopped(Exception):
    """A digest that nobody waits for any more."""


def stamp(file: Path) -> Stamp:
    """A file's stamp, links followed.

    Raises:
        OSError: there is none, or it is no regular file.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(0, "no regular file", str(file))
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)


def digest_file(file: Path) -> tuple[Stamp, str]:
    """A file's stamp and the SHA-256 of its bytes, from the cache or computed now and remembered there.

    Raises:
        PeltError: E622 the file changed while it was read.
        OSError: it cannot be read.
    """
    found, digest, settled = read_digest(file)
    if settled:
        remember(found, digest)
    return found, digest


def read_digest(file: Path, stop: Event | None = None) -> tuple[Stamp, str, bool]:
    """The digest of a file, as `digest_file` gives it, without writing anything. The second value says whether the
    digest may be remembered: it may not where the file was written a moment ago, since it could change once more under
    the same time stamp.

    Args:
        stop: set when the digest is of no use any more.
    """
    before, started = stamp(file), time.time_ns()
    with contextlib.suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", known := _memory(before).read_text(encoding="ascii")):
            return before, known, False
    found, buffer = hashlib.sha256(), memoryview(bytearray(min(CHUNK, before.size or 1)))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            if stop is not None and stop.is_set():
                raise Stopped
            found.update(buffer[:count])
    if stamp(file) != before:
        raise changed(file)
    return before, found.hexdigest(), started - before.mtime_ns > SETTLED


def remember(found: Stamp, digest: str) -> None:
    """Keep a digest in the cache, if that can be written."""
    with contextlib.suppress(OSError):
        _memory(found).parent.mkdir(parents=True, exist_ok=True)
        _replace(str(_memory(found)), digest.encode())


def _memory(found: Stamp) -> Path:
    return cache_folder() / "digests" / "-".join(f"{number:x}" for number in found)


@contextlib.contextmanager
def digesting(files: Iterable[Path]) -> Iterator[None]:
    """Compute the digests of files in a thread while the block runs, and wait for them when it has ended well."""
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            waiting = [pool.submit(read_digest, file.resolve(), stop) for file in files]
            yield
            for found, digest, settled in (each.result() for each in waiting):
                if settled:
                    remember(found, digest)
        finally:
            stop.set()


def changed(file: Path) -> PeltError:
    """The error for a file that somebody else writes to while it is compiled."""
    return fail("E622", "the file changed while it was read", Place(str(file)), "a base that nobody writes to",
                "try again when it is whole")  # fmt: skip


def check_unchanged(stamps: Mapping[Path, Stamp]) -> None:
    """Whether files have the stamps that they had.

    Raises:
        PeltError: E622.
    """
    for file, before in stamps.items():
        try:
            same = stamp(file) == before
        except OSError:
            same = False
        if not same:
            raise changed(file)


def check_record(manifest_file: Path, manifest: dict[str, Any]) -> None:
    """Hold the base's files in an artifact against what its manifest recorded. Where a file is the same under another
    stamp, the manifest gets the new one, in memory and, where it can be written, on disk.

    Raises:
        PeltError: E603 a malformed record; E621 files that are gone or are others, all of them.
    """
    findings: list[Diagnostic] = []
    moved: dict[str, tuple[str, Stamp]] = {}
    for entry in _entries(manifest_file, manifest):
        file = manifest_file.parent / entry["file"]
        try:
            now = stamp(file)
            if "sha256" not in entry:  # an older artifact, which knows the size alone
                found = "" if now.size == entry["bytes"] else f"{now.size:,} bytes"
            elif now.to_json() == {key: entry.get(key) for key in now.to_json()}:
                continue
            elif now.size != entry["bytes"]:
                found = f"{now.size:,} bytes"
            else:
                now, digest = digest_file(file)
                found = "" if digest == entry["sha256"] else f"the SHA-256 {digest[:16]}..."
                if not found:
                    moved[entry["file"]] = digest, now
        except OSError as error:
            message = f"cannot read the base's file in the artifact: {error.strerror or error}"
            findings.append(Diagnostic("E621", message, Place(str(file)), f"a file of {entry['bytes']:,} bytes", MEND))
            continue
        if found:
            findings.append(_other(file, entry, found))
    if findings:
        raise PeltError(findings)
    if moved:
        _renew(manifest, moved)
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            amend(manifest_file, lambda fresh: _renew(fresh, moved))


def _entries(manifest_file: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The manifest's record of the base's files.

    Raises:
        PeltError: E603 it is malformed, or leads out of the folder.
    """
    try:
        entries = list(manifest["base"]["files"])
        good = all(isinstance(e["bytes"], int) and Path(e["file"]).name == e["file"] for e in entries)
        good = good and not any("\0" in e["file"] for e in entries)
    except (LookupError, TypeError):
        good = False
    if not good:
        raise fail("E603", "the manifest's record of the base's files is malformed", Place(str(manifest_file)),
                   "files in the artifact's own folder")  # fmt: skip
    return entries


def _other(file: Path, entry: Mapping[str, Any], found: str) -> Diagnostic:
    """The finding for a file that is not the recorded one."""
    digest = f" with the SHA-256 {str(entry['sha256'])[:16]}..." if "sha256" in entry else ""
    linked = entry.get("how") == "hard link"
    return Diagnostic(
        "E621",
        "the base's file in the artifact is not the one that was compiled"
        + (", whose bytes it shares with the model folder" if linked else "")
        + f"; found: {found}",
        Place(str(file)),
        f"{entry['bytes']:,} bytes{digest}",
        MEND + (", with --self-contained for a copy of one's own" * linked),
    )


def _renew(manifest: Mapping[str, Any], moved: Mapping[str, tuple[str, Stamp]]) -> None:
    """Write new stamps into a manifest, of files whose digests are the recorded ones."""
    for entry in manifest["base"]["files"]:
        digest, now = moved.get(entry["file"], ("", None))
        if now is not None and entry.get("sha256") == digest:
            entry.update(now.to_json())


def amend(file: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file, whole or not at all and one process at a time. It is read anew, and by its folder's
    descriptor: another process may have replaced the file, or the whole folder.

    Raises:
        OSError: it cannot be read or written.
        ValueError: it is not JSON.
    """
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with open(file.name, encoding="utf-8", opener=lambda name, flags: os.open(name, flags, dir_fd=folder)) as old:
            content = json.load(old)
        change(content)
        _replace(file.name, (json.dumps(content, indent=1) + "\n").encode(), folder)
    finally:
        os.close(folder)


def _replace(name: str, content: bytes, folder: int | None = None) -> None:
    """Write a file beside its place and move it there; the path is relative to the folder's descriptor, if given."""
    path = Path(name)
    staging = str(path.with_name(f".{path.name}.{secrets.token_hex(4)}"))
    try:
        handle = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(staging, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(staging, dir_fd=folder)
        raise
