"""A store of profiles: one file with the profiles of all users of an artifact."""

from __future__ import annotations

import json
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peltc.compiler.files.manifest import read_manifest
from peltc.compiler.files.talk import Talk, logged
from peltc.runtime.running.form import SUFFIX, Form, write_profile
from peltc.runtime.running.records import Record, Records, StoreLimits, parts
from peltc.spec.diagnostics import Diagnostic, PeltError, Place, fail, wrong_type

if TYPE_CHECKING:
    from peltc.compiler.linking.linker import Linker

Array = np.ndarray[Any, Any]
Given = bytes | str | Path | Mapping[str, Array]
"""What a profile is given as: a file or its bytes, a folder that `pelt import` reads, or arrays by input name."""
MARK = b"TORT"
"""What stands at the fifth byte of a file in ONNX Runtime's format of adapters."""


def _silent(line: str) -> None:
    pass


class ProfileStore:
    """Profiles of one artifact on disk, by names `tenant/name`; several threads and processes may use it at once.

    A profile is stored as the file that was given: as `pelt link` wrote it, or an adapter's own file, which is linked
    when the profile is brought into memory. Each is held against the artifact before it is stored, and has a checksum.
    The file is an SQLite database; `peltc.runtime.running.records` says why.

    Args:
        path: the store's file; it is made where there is none and the artifact is given.
        artifact: the folder of the artifact that the profiles belong to. A store knows it, once it is made, and needs
            the folder for adapters alone, which are linked.
        limits: what is taken from each tenant.
        create: whether a file that is not there is made.

    Raises:
        PeltError: E602 the file cannot be written; E603, E624 no artifact with profiles; E630 the file is no store, or
            damaged; E631 the store belongs to another artifact, or there is none.
    """

    def __init__(
        self,
        path: str | Path,
        artifact: str | Path | None = None,
        limits: StoreLimits | None = None,
        create: bool = True,
    ):
        if not isinstance(path, (str, PathLike)):
            raise wrong_type("a store", path, "the path of its file")
        about = None
        if artifact is not None:
            record = read_manifest(Path(artifact)).get("profiles")
            form = Form(record, Place(str(artifact)))
            said = {"inputs": form.inputs, "masks": form.masks} | ({"labels": form.labels} if form.labels else {})
            assert record is not None
            about = {"fingerprint": record["fingerprint"]} | {k: json.dumps(v, sort_keys=True) for k, v in said.items()}
        self.artifact, self.place = artifact, Place(str(path))
        try:
            self.records = Records(path, about, limits, create=create)
        except PeltError as error:
            if error.diagnostics[0].code != "E631":
                raise
            expected = f"profiles of {artifact}" if artifact is not None else "the file of a store"
            raise fail("E631", error.diagnostics[0].message, self.place, expected,
                       "pelt profiles add STORE NAME FILE --artifact OUT, which makes a new one") from None  # fmt: skip
        self.form = Form(_record(self.records.about, self.place), self.place)
        self.fingerprint: str = self.records.about["fingerprint"]
        self._linking = threading.Lock()

    def __repr__(self) -> str:
        return f"<ProfileStore {self.place.path!r} of artifact {self.fingerprint[:8]}>"

    def __enter__(self) -> ProfileStore:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go; what is called afterwards opens it again."""
        self.records.close()

    def put(self, name: str, source: Given, talk: Talk = logged) -> None:
        """Store a profile, in place of the one of that name. It is on the disk on return, and whole or not there.

        Args:
            name: `tenant/name`.
            source: a file that `pelt link` wrote, an adapter's safetensors file, the bytes of either; a folder that
                `pelt import` reads; or the arrays that `peltc.link` gave.

        Raises:
            PeltError: E602 no room on the disk; E625 a profile of another artifact; E631 an adapter, and the store does
                not know its artifact's folder; E632 a name of another form; E633 more than the limits allow; E635
                another process writes all the time; or what is wrong with the adapter.
        """
        self.put_all({name: source}, talk)

    def put_all(self, sources: Mapping[str, Given], talk: Talk = logged) -> None:
        """Store several profiles, all or none of them; what is given and raised is as for `put`."""
        for name in sources:
            parts(name)
        self.records.put([(name, self._content(name, source, talk)) for name, source in sources.items()])

    def get(self, name: str) -> bytes:
        """A profile's file, as it was given.

        Raises:
            PeltError: E626 there is no profile of that name; E634 it is damaged; E635 another process writes all the
                time.
        """
        return self.records.get(name)

    def read(self, name: str) -> tuple[bytes, dict[str, Array]]:
        """What tells a profile from an earlier one of its name, and its tensors by the names of the graph's inputs.

        Raises:
            PeltError: as `get`; E631 it is an adapter, and the store does not know its artifact's folder.
        """
        digest, content = self.records.read(name)
        return digest, self._arrays(name, content, _silent)

    def delete(self, *names: str) -> None:
        """Delete profiles, all of them or none; their bytes are overwritten.

        Raises:
            PeltError: E626 there is no profile of a name; E602, E635 as `put`.
        """
        self.records.delete(*names)

    def list(self, tenant: str | None = None) -> Iterator[Record]:
        """Names and sizes of all profiles by name, or of one tenant's."""
        return self.records.list(tenant)

    def stats(self, tenant: str | None = None) -> dict[str, int]:
        """Numbers of the store, or of one tenant: `profiles` and `bytes`; of the whole store also `tenants`, the
        `file`'s bytes, and how many of them `compact` would give back (`free`)."""
        return self.records.stats(tenant)

    def compact(self) -> tuple[int, int]:
        """Write the file anew without the room of deleted profiles, which takes as much room again while it lasts.

        Returns:
            Bytes of the file before and after.
        """
        return self.records.compact()

    def check(self) -> tuple[Diagnostic, ...]:
        """Hold every profile against its checksum, and the file against its own structure.

        Returns:
            What is wrong: E630 the file, E634 a profile by name; nothing where all is well.
        """
        return self.records.check()

    # what is in a profile's file

    @cached_property
    def _linker(self) -> Linker:
        from peltc.compiler.linking.linker import Linker

        if self.artifact is None:
            raise fail("E631", "an adapter is linked by its artifact, whose folder the store does not know", self.place,
                       "ProfileStore(path, artifact)", "or give what `pelt link` writes")  # fmt: skip
        return Linker(self.artifact)

    def _content(self, name: str, source: Given, talk: Talk) -> bytes:
        """The file to store, held against the artifact."""
        if isinstance(source, bytes):
            content = source
        elif isinstance(source, Mapping):
            return self._written(name, source)
        elif isinstance(source, (str, PathLike)):
            if Path(source).is_dir():
                with self._linking:
                    return self._written(name, self._linker.link(source, talk))
            content = self._file(name, Path(source))
        else:
            raise wrong_type("a profile", source, "a file or its bytes, or the arrays that `peltc.link` gave")
        self.records.check_size(name, len(content))
        self._arrays(name, content, talk)
        return content

    def _file(self, name: str, file: Path) -> bytes:
        try:
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):
                raise fail("E625", "the profile is no file", Place(str(file)), "what `pelt link` wrote")
            self.records.check_size(name, status.st_size)
            with file.open("rb") as stream:
                return stream.read(status.st_size)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise fail("E625", f"cannot read the profile: {reason}", Place(str(file))) from None

    def _written(self, name: str, arrays: Mapping[str, Array]) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"profile{SUFFIX}"
            write_profile(file, self.form.arrays(name, arrays), self.fingerprint)
            return file.read_bytes()

    def _arrays(self, name: str, content: bytes, talk: Talk) -> dict[str, Array]:
        """A profile's tensors, held against the artifact. Both kinds of files are read from a folder of this call."""
        linked = content[4:8] == MARK
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / (f"profile{SUFFIX}" if linked else "adapter.safetensors")
            file.write_bytes(content)
            if linked:
                return self.form.arrays(name, file)
            with self._linking:
                return self.form.arrays(name, self._linker.link(file, talk))


def _record(about: Mapping[str, str], place: Place) -> dict[str, Any]:
    """What a store says of its artifact's profiles, as the artifact's manifest does.

    Raises:
        PeltError: E630 it says something else.
    """
    try:
        fingerprint, inputs, masks = about["fingerprint"], json.loads(about["inputs"]), json.loads(about["masks"])
        int(fingerprint, 16)
        numbers = [*dict(inputs).values(), *dict(masks).values()]
        if not all(type(size) is int and size >= 0 for shape in numbers for size in shape):
            raise ValueError
        labels = json.loads(about["labels"]) if "labels" in about else None
        if not all(len(mask) == 2 for mask in masks.values()) or (labels and labels["input"] not in inputs):
            raise ValueError
    except (KeyError, ValueError, TypeError, RecursionError):
        raise fail("E630", "the store does not say what artifact it belongs to", place) from None
    return {"fingerprint": fingerprint, "inputs": inputs, "masks": masks, "labels": labels}
