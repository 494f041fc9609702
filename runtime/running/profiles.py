"""The profiles of a session: tensors that are exchanged while an artifact runs."""

from __future__ import annotations

import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.files.manifest import LINK, PROFILE, STARTS
from peltc.spec.diagnostics import PeltError, Place, fail, one_of, wrong_type
from peltc.spec.modes import BANK
from peltc.spec.packages import needing

Array = np.ndarray[Any, Any]
SUFFIX = ".onnx_adapter"
VERSION = 1
FIRST_ROOM = 8
"""For how many profiles a bank has room at first."""
Chosen = str | Sequence[str | None] | None
"""The profile of a run: a name, none, or one of these for each row of a batch."""
Taken = Callable[[int], Mapping[str, Any]]
"""ONNX Runtime's values by input name that a run takes of profiles, from the number of its rows."""
ROOM = 1 << 20
"""How many bytes a profile's file may have beside its tensors."""


def number_of(fingerprint: str) -> int:
    """A fingerprint as the number that a profile's file has room for; 31 bits, for ONNX Runtime keeps signed ones."""
    return int(fingerprint[:8], 16) & 0x7FFFFFFF


def write_profile(file: Path, tensors: Mapping[str, Array], fingerprint: str) -> None:
    """Write a profile in ONNX Runtime's own format, which its `LoraAdapter` reads too, whatever the method.

    Args:
        fingerprint: of what the profile belongs to.
    """
    import onnxruntime as ort

    from peltc.compiler.files.manifest import write_whole

    form = ort.AdapterFormat()
    form.set_adapter_version(VERSION)
    form.set_model_version(number_of(fingerprint))
    form.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.part")
    form.export_adapter(str(new))
    write_whole(file, new.read_bytes())
    new.unlink()


class Profiles:
    """Profiles by name, each held against the artifact when it is added.

    Args:
        record: what the artifact's manifest says of profiles; None where its modules are fixed.
        folder: the artifact's.
    """

    def __init__(self, record: Mapping[str, Any] | None, folder: Path):
        self.record, self.place = record, Place(str(folder))
        self.masks: Mapping[str, Sequence[int]] = record["masks"] if record else {}
        self.held: dict[str, Any] = {}

    def add(self, name: str, source: str | Path | Mapping[str, Array]) -> None:
        """Add a profile, or replace the one of that name.

        Args:
            source: a file that `pelt link` wrote, or arrays by input name.

        Raises:
            PeltError: E216 no name; E624 an artifact without profiles; E625 a profile of another artifact, or one that
                cannot be read.
        """
        if not isinstance(name, str) or not name:
            raise wrong_type("a profile's name", name, "a text")
        inputs = self._inputs()
        if not isinstance(source, (str, PathLike, Mapping)):
            raise wrong_type("a profile", source, "a file that `pelt link` wrote, or the arrays that `peltc.link` gave")
        arrays = dict(source) if isinstance(source, Mapping) else self._read(Path(source))
        if set(arrays) != set(inputs):
            raise self._foreign(name, "has other tensors than")
        for key, array in arrays.items():
            dtype = np.dtype(np.uint8 if key in self.masks else np.float32)
            if not isinstance(array, np.ndarray) or list(array.shape) != inputs[key] or array.dtype != dtype:
                found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
                raise self._foreign(name, f"has {key} as {found}, which is {dtype} {inputs[key]} in")
            if key in self.masks:
                size, ones = self.masks[key]
                bits = np.unpackbits(array, bitorder="little")
                if bits.sum() != ones or bits[size:].any():
                    raise self._foreign(name, f"does not choose {ones} of {size} modules in {key}, as every profile of")
            elif not np.isfinite(array).all():
                raise self._foreign(name, f"has values in {key} that are no numbers, for")
        self._take(name, arrays)

    def remove(self, name: str) -> None:
        """Forget a profile.

        Raises:
            PeltError: E626 there is none of that name.
        """
        self._known(name)
        del self.held[name]

    @contextmanager
    def taken(self, chosen: Chosen, texts: int | None) -> Iterator[Taken]:
        """What runs take of profiles, as they are now: whatever is added or removed meanwhile changes nothing of it.

        Args:
            chosen: the name of a profile, or None.
            texts: how many texts the batch has; None where that is not known.

        Returns:
            ONNX Runtime's values by input name, from a run's number of rows; none where no profile is meant.

        Raises:
            PeltError: E216 several profiles, where one is taken at a time; E626 there is no profile of that name; E627
                none is meant, and the modules change the base whatever their values.
        """
        if chosen is not None and not isinstance(chosen, str):
            raise wrong_type("the profile of a run", chosen, "one name, in an artifact of `mode: swappable`",
                             "`mode: bank` has another profile for each row")  # fmt: skip
        if chosen is None:
            self._check_bare()
        found = {} if chosen is None else self._known(chosen)
        yield lambda rows: found

    def _take(self, name: str, arrays: Mapping[str, Array]) -> None:
        import onnxruntime as ort

        self.held[name] = {key: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for key, a in arrays.items()}

    def _check_bare(self) -> None:
        if self.record and (why := self.record["no_bare_base"]):
            raise fail("E627", f"no profile is named, and this artifact has no bare base: {why}", self.place,
                       "profile=NAME", "session.add_profile(name, file)")  # fmt: skip

    def _known(self, name: str) -> Any:
        if not isinstance(name, str) or name not in self.held:
            raise fail("E626", f"there is no profile {name!r:.80}", self.place,
                       one_of(sorted(self.held)) if self.held else "a profile that was added",
                       "session.add_profile(name, file)")  # fmt: skip
        return self.held[name]

    def _inputs(self) -> dict[str, list[int]]:
        if not self.record:
            raise fail("E624", "the modules of this artifact are fixed in it", self.place,
                       "an artifact compiled with `mode: swappable` or `mode: bank`")  # fmt: skip
        return dict(self.record["inputs"])

    def _read(self, file: Path) -> dict[str, Array]:
        import onnxruntime as ort

        assert self.record is not None
        most = ROOM + sum(4 * int(np.prod(shape)) for shape in self.record["inputs"].values())
        try:
            status = file.stat()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise fail("E625", f"cannot read the profile: {reason}", Place(str(file))) from None
        if status.st_size > most:
            raise self._foreign(file.name, f"has {status.st_size:,} bytes, more than any of")
        try:
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("no file")
            form = ort.AdapterFormat.read_adapter(str(file))
            version, found = form.get_model_version(), form.get_parameters()
            arrays = {name: np.array(value.numpy()) for name, value in found.items()}  # the file is let go
        except Exception:  # bytes that others wrote: ONNX Runtime and its bindings say it in many ways
            raise fail("E625", "the file is no profile", Place(str(file)), "what `pelt link` wrote") from None
        if version != number_of(self.record["fingerprint"]):
            raise self._foreign(file.name, "was made for another artifact than")
        return arrays

    def _foreign(self, name: str, what: str) -> Exception:
        return fail("E625", f"the profile {name!r:.80} {what} this artifact", self.place,
                    "a profile that was linked for it", "pelt link OUT --weights FILE -o PROFILE")  # fmt: skip


class Bank(Profiles):
    """Profiles stacked in one array for each input, so that each row of a batch picks its own. Row 0 is the modules at
    their start values. A profile is added by writing its rows; what runs meanwhile goes on reading the others."""

    def __init__(self, record: Mapping[str, Any], folder: Path):
        super().__init__(record, folder)
        with needing("a bank of profiles"):
            from safetensors.numpy import load_file

        starts = load_file(folder / LINK / STARTS)
        self.arrays = {name: np.ascontiguousarray(starts[name][None]) for name in record["inputs"]}
        self.lock, self.running = threading.Lock(), 0
        self.free: list[int] = []
        self.left: list[int] = []  # rows of profiles that were removed, which a run may still read
        self._bind()

    def _bind(self) -> None:
        import onnxruntime as ort

        self.stacked = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self.arrays.items()}

    def _take(self, name: str, arrays: Mapping[str, Array]) -> None:
        with self.lock:
            if not self.free:
                self._grow()
            row = self.free.pop()
            for key, array in arrays.items():
                self.arrays[key][row] = array
            before = self.held.get(name)
            self.held[name] = row
            if before is not None:
                self._leave(before)

    def _grow(self) -> None:
        """Twice the room, in new arrays: a run that has the old ones keeps them."""
        rows = len(next(iter(self.arrays.values()))) if self.arrays else 1
        room = max(2 * rows, FIRST_ROOM)
        for name, array in self.arrays.items():
            self.arrays[name] = np.concatenate([array, np.zeros((room - rows, *array.shape[1:]), array.dtype)])
        self.free += range(rows, room)
        self._bind()

    def _leave(self, row: int) -> None:
        self.left.append(row)
        if not self.running:
            self.free, self.left = self.free + self.left, []

    def remove(self, name: str) -> None:
        with self.lock:
            self._leave(self._known(name))
            del self.held[name]

    @contextmanager
    def taken(self, chosen: Chosen, texts: int | None) -> Iterator[Taken]:
        """The profiles of all rows, and which one each row has: of texts with several rows, as beams, each its text's.

        Args:
            chosen: one name for all texts, None for the bare base, or a list with one of these for each text.

        Raises:
            PeltError: E216 another number of profiles than of texts; E626, E627 as for one profile.
        """
        import onnxruntime as ort

        alone = chosen is None or isinstance(chosen, str)
        listed = not alone and isinstance(chosen, (Sequence, np.ndarray))
        each: list[Any] = [*chosen] if listed else [chosen]  # type: ignore[misc]
        fitting = alone or (listed and bool(each) and texts in (None, len(each)))
        if not fitting or not all(name is None or isinstance(name, str) for name in each):
            raise _none_for_each(chosen, texts)
        if None in each:
            self._check_bare()
        with self.lock:
            picked = np.array([-1 if name is None else self._known(name) - 1 for name in each], np.int64)
            stacked = self.stacked
            self.running += 1

        def values(rows: int) -> dict[str, Any]:
            if not alone and rows % len(picked):
                raise _none_for_each(chosen, rows)
            of_rows = picked if alone else np.repeat(picked, rows // len(picked))
            return {**stacked, PROFILE: ort.OrtValue.ortvalue_from_numpy(of_rows)}

        try:
            yield values
        finally:
            with self.lock:
                self.running -= 1
                if not self.running and self.left:
                    self.free, self.left = self.free + self.left, []


def _none_for_each(chosen: object, texts: int | None) -> PeltError:
    many = "one for each text" if texts is None else f"a list of {texts}, one for each text"
    return wrong_type("the profiles of a batch", chosen, f"a name, or {many}; None where a text has none")


def profiles_of(manifest: Mapping[str, Any], folder: Path) -> Profiles:
    """What an artifact can have of profiles."""
    record = manifest.get("profiles")
    return Bank(record, folder) if record and record["mode"] == BANK else Profiles(record, folder)


class Bound:
    """A session of ONNX Runtime that binds a profile's tensors beside the inputs of each run.

    Args:
        session: of ONNX Runtime.
        chosen: gives the profile's values by input name, from the number of rows.
    """

    def __init__(self, session: Any, chosen: Taken):
        self._session, self._chosen, self._own = session, chosen, threading.local()

    @property
    def rows(self) -> int:
        """How many rows the batch of this thread's next run has."""
        return getattr(self._own, "rows", 1)

    @rows.setter
    def rows(self, rows: int) -> None:
        self._own.rows = rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_inputs(self) -> list[Any]:
        """The graph's inputs, but which profile each row has."""
        return [i for i in self._session.get_inputs() if i.name != PROFILE]

    def io_binding(self) -> Any:
        """A binding with the profile's tensors in it. Graphs of one artifact need not all have the same inputs."""
        binding, known = self._session.io_binding(), {i.name for i in self._session.get_overridable_initializers()}
        for name, value in self._chosen(self.rows).items():
            if name in known or name == PROFILE:
                binding.bind_ortvalue_input(name, value)
        return binding
