"""The profiles of a session: tensors that are exchanged while an artifact runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.files.manifest import LINK, PROFILE, STARTS
from peltc.spec.diagnostics import Place, fail, one_of, wrong_type
from peltc.spec.modes import BANK
from peltc.spec.packages import needing

Array = np.ndarray[Any, Any]
SUFFIX = ".onnx_adapter"
VERSION = 1
FIRST_ROOM = 8
"""For how many profiles a bank has room at first."""
Chosen = str | Sequence[str | None] | None
"""The profile of a run: a name, none, or one of these for each row of a batch."""
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
        arrays = dict(source) if isinstance(source, Mapping) else self._read(Path(source))
        if set(arrays) != set(inputs):
            raise self._foreign(name, "has other tensors than")
        for key, array in arrays.items():
            if list(array.shape) != inputs[key] or array.dtype != np.float32:
                raise self._foreign(name, f"has {key} as {array.dtype} {list(array.shape)}, which is {inputs[key]} in")
            if not np.isfinite(array).all():
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
    def values(self, chosen: Chosen, rows: int) -> Iterator[dict[str, Any]]:
        """ONNX Runtime's values by input name, for as long as a run takes; none where no profile is meant.

        Args:
            chosen: the name of a profile, or None.
            rows: how many texts the batch has.

        Raises:
            PeltError: E216 several profiles, where one is taken at a time; E626 there is no profile of that name; E627
                none is meant, and the modules change the base whatever their values.
        """
        if chosen is not None and not isinstance(chosen, str):
            raise wrong_type("the profile of a run", chosen, "one name, in an artifact of `mode: swappable`",
                             "`mode: bank` has another profile for each row")  # fmt: skip
        if chosen is None:
            self._check_bare()
        yield {} if chosen is None else self._known(chosen)

    def _take(self, name: str, arrays: Mapping[str, Array]) -> None:
        import onnxruntime as ort

        self.held[name] = {key: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for key, a in arrays.items()}

    def _check_bare(self) -> None:
        if self.record and (why := self.record["no_bare_base"]):
            raise fail("E627", f"no profile is named, and this artifact has no bare base: {why}", self.place,
                       "profile=NAME", "session.add_profile(name, file)")  # fmt: skip

    def _known(self, name: str) -> Any:
        if name not in self.held:
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
            if file.stat().st_size > most:
                raise self._foreign(file.name, f"has {file.stat().st_size:,} bytes, more than any of")
            form = ort.AdapterFormat.read_adapter(str(file))
        except OSError as error:
            raise fail("E625", f"cannot read the profile: {error.strerror}", Place(str(file))) from None
        except RuntimeError:
            raise fail("E625", "the file is no profile", Place(str(file)), "what `pelt link` wrote") from None
        if form.get_model_version() != number_of(self.record["fingerprint"]):
            raise self._foreign(file.name, "was made for another artifact than")
        return {name: np.array(value.numpy()) for name, value in form.get_parameters().items()}  # the file is let go

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
    def values(self, chosen: Chosen, rows: int) -> Iterator[dict[str, Any]]:
        """The profiles of all rows, and which one each row has.

        Args:
            chosen: one name for all rows, None for the bare base, or a list with one of these for each row.

        Raises:
            PeltError: E216 another number of profiles than of rows; E626, E627 as for one profile.
        """
        import onnxruntime as ort

        each = [chosen] if chosen is None or isinstance(chosen, str) else list(chosen)  # one stands for all rows
        if len(each) not in (1, rows) or not all(name is None or isinstance(name, str) for name in each):
            raise wrong_type("the profiles of a batch", chosen, f"a name, or a list of {rows}, one for each row; None"
                                                                " where a row has none")  # fmt: skip
        if None in each:
            self._check_bare()
        with self.lock:
            picked = np.array([-1 if name is None else self._known(name) - 1 for name in each], np.int64)
            found = {**self.stacked, PROFILE: ort.OrtValue.ortvalue_from_numpy(picked)}
            self.running += 1
        try:
            yield found
        finally:
            with self.lock:
                self.running -= 1
                if not self.running and self.left:
                    self.free, self.left = self.free + self.left, []


def profiles_of(manifest: Mapping[str, Any], folder: Path) -> Profiles:
    """What an artifact can have of profiles."""
    record = manifest.get("profiles")
    return Bank(record, folder) if record and record["mode"] == BANK else Profiles(record, folder)


class Bound:
    """A session of ONNX Runtime that binds a profile's tensors beside the inputs of each run.

    Args:
        session: of ONNX Runtime.
        chosen: gives the profile's values by input name, from the number of rows.

    Attributes:
        rows: how many rows the batch of the next run has.
    """

    def __init__(self, session: Any, chosen: Callable[[int], Mapping[str, Any]]):
        self._session, self._chosen, self.rows = session, chosen, 1

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
