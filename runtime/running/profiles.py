"""The profiles of a session: tensors that are exchanged while an artifact runs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.files.labels import LABELS
from peltc.compiler.files.manifest import LINK, PROFILE, PROFILE_WEIGHTS, STARTS
from peltc.runtime.running.form import Form, Source
from peltc.spec.diagnostics import PeltError, Place, fail, one_of, wrong_type
from peltc.spec.modes import BANK
from peltc.spec.packages import needing

Array = np.ndarray[Any, Any]
FIRST_ROOM = 8
"""For how many profiles a bank has room at first."""
Blend = Mapping[str, float]
"""Several profiles of a text, each with its weight."""
Chosen = str | Blend | Sequence[str | Blend | None] | None
"""The profile of a run: a name, none, several with weights, or one of these for each row of a batch."""
Shares = tuple[tuple[Hashable, float], ...]
"""The profiles of a text, None for the bare base, and their weights, which sum to 1."""
WHOLE = 1e-6
"""How far from 1 a sum of weights may be that is meant to be 1."""
Taken = Callable[[int], Mapping[str, Any]]
"""ONNX Runtime's values by input name that a run takes of profiles, from the number of its rows."""


class Profiles:
    """Profiles by name, each held against the artifact when it is added.

    Args:
        record: what the artifact's manifest says of profiles; None where its modules are fixed.
        folder: the artifact's.

    Attributes:
        held: what is kept of each profile, by its name, or by a key that is no text for those of a store.
        labels: what the labels of each are called, where they may have others.
    """

    def __init__(self, record: Mapping[str, Any] | None, folder: Path):
        self.record, self.place = record, Place(str(folder))
        self.form = Form(record, self.place)
        self.held: dict[Hashable, Any] = {}
        self.labels: dict[Hashable, list[str]] = {}

    @property
    def names(self) -> list[str]:
        """The names of the profiles that were added."""
        return [name for name in list(self.held) if isinstance(name, str)]

    def add(self, name: str, source: Source) -> None:
        """Add a profile, or replace the one of that name.

        Args:
            source: a file that `pelt link` wrote, or arrays by input name.

        Raises:
            PeltError: E216 no name; E624 an artifact without profiles; E625 a profile of another artifact, or one that
                cannot be read.
        """
        if not isinstance(name, str) or not name:
            raise wrong_type("a profile's name", name, "a text")
        self.receive(name, self.form.arrays(name, source))

    def add_all(self, names: Sequence[str], arrays: Mapping[str, Array]) -> None:
        """Add profiles, or replace those of these names: all, or none.

        Args:
            arrays: by input name, [profiles, ...].

        Raises:
            PeltError: E216 something else than different names; E624, E625 as `add`.
        """
        wrong = isinstance(names, str) or not all(isinstance(name, str) and name for name in names)
        if wrong or len(set(names)) < len(names):
            raise wrong_type("the names of profiles", names, "a list of different texts")
        if names:
            self.take_all(names, self.form.stacked(names, arrays))

    def remove(self, name: Hashable) -> None:
        """Forget a profile.

        Raises:
            PeltError: E626 there is none of that name.
        """
        self._known(name)
        del self.held[name]
        self.labels.pop(name, None)

    def labels_of(self, name: str) -> list[str] | None:
        """What the labels of a profile are called; None where all have the artifact's.

        Raises:
            PeltError: E626 there is none of that name.
        """
        self._known(name)
        return self.labels.get(name)

    def each(self, chosen: Chosen, texts: int | None) -> list[Shares]:
        """What is chosen as a list: one entry alone where the choice is for all texts.

        Args:
            chosen: the name of a profile, or None.
            texts: how many texts the batch has; None where that is not known.

        Raises:
            PeltError: E216 several profiles, where one is taken at a time; another number of profiles than of texts;
                weights that are no numbers.
        """
        if chosen is not None and not isinstance(chosen, str):
            raise wrong_type("the profile of a run", chosen, "one name, in an artifact of `mode: swappable`",
                             "`mode: bank` has another profile for each row")  # fmt: skip
        return [((chosen, 1.0),)]

    def check(self, chosen: Chosen, texts: int | None) -> None:
        """Whether there are the profiles that are chosen; raises as `taken`."""
        each = self.each(chosen, texts)
        self.check_bare(each)
        for name in names_of(each):
            self._known(name)

    @contextmanager
    def taken(self, chosen: Chosen, texts: int | None) -> Iterator[Taken]:
        """What runs take of profiles, as they are now: whatever is added or removed meanwhile changes nothing of it.

        Args:
            chosen: the name of a profile, None for the bare base, several with weights where the artifact blends them,
                or, where each row of a batch picks its own, a list with one of these for each text: all rows of a
                text, as its beams, have its profile.
            texts: how many texts the batch has; None where that is not known.

        Returns:
            ONNX Runtime's values by input name, from a run's number of rows; none where no profile is meant.

        Raises:
            PeltError: E216 as `each`; E626 there is no profile of that name; E627 none is meant, and the modules change
                the base whatever their values.
        """
        with self.lent(self.each(chosen, texts), is_one(chosen)) as taken:
            yield taken

    @contextmanager
    def lent(self, each: Sequence[Shares], alone: bool) -> Iterator[Taken]:
        """What runs take of the profiles of these keys; see `taken`.

        Args:
            alone: whether the one entry is for all texts.
        """
        self.check_bare(each)
        ((key, _),) = each[0]
        found = {} if key is None else self._known(key)
        yield lambda rows: found

    def joined(self, each: Sequence[Taken]) -> Taken:
        """What one run takes whose rows were each given their profile apart, some time ago.

        Args:
            each: what `taken` gave for each row, all of them alive; of one profile, where one is taken at a time.
        """
        return each[0]

    def check_offered(self, sessions: Iterable[Any]) -> None:
        """Whether graphs have all inputs that profiles bring, of which each takes its own.

        Args:
            sessions: of ONNX Runtime.

        Raises:
            PeltError: E605.
        """
        found = {value.name for session in sessions for value in session.get_overridable_initializers()}
        if lacking := set(self.record["inputs"] if self.record else ()) - found:
            raise fail("E605", f"no graph has the input {min(lacking)}, which profiles bring", self.place,
                       "the graphs as they were compiled", "another tool may have taken out inputs with defaults"
                       )  # fmt: skip

    def reserve(self, profiles: int) -> None:
        """Make room for so many profiles at once, where profiles lie in arrays."""

    def receive(self, name: Hashable, arrays: Mapping[str, Array]) -> None:
        """Keep a profile whose tensors were held against the form, and what its labels are called."""
        self.take(name, {key: array for key, array in arrays.items() if key != LABELS})
        if (labels := self.form.names(arrays)) is not None:
            self.labels[name] = labels

    def take(self, name: Hashable, arrays: Mapping[str, Array]) -> None:
        """Keep the tensors of a profile."""
        import onnxruntime as ort

        self.held[name] = {key: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for key, a in arrays.items()}

    def take_all(self, names: Sequence[Hashable], arrays: Mapping[str, Array]) -> None:
        """Keep profiles whose tensors, stacked, were held against the form."""
        for i, name in enumerate(names):
            self.take(name, {key: array[i] for key, array in arrays.items()})

    def check_bare(self, each: Sequence[Shares]) -> None:
        """Whether the bare base may be asked for, where it is.

        Raises:
            PeltError: E627.
        """
        if self.record and (why := self.record["no_bare_base"]) and any(None in dict(shares) for shares in each):
            what = "no profile is named" if all(len(shares) == 1 for shares in each) else "a part of 1 is left"
            raise fail("E627", f"{what}, and this artifact has no bare base: {why}", self.place,
                       "profile=NAME, or weights that sum to 1", "session.add_profile(name, file)")  # fmt: skip

    def _known(self, name: Hashable) -> Any:
        if not isinstance(name, Hashable) or name not in self.held:
            raise fail("E626", f"there is no profile {name!r:.80}", self.place,
                       one_of(sorted(self.names)) if self.names else "a profile that was added",
                       "session.add_profile(name, file)")  # fmt: skip
        return self.held[name]


class Bank(Profiles):
    """Profiles stacked in one array for each input, so that each row of a batch picks its own. Row 0 is the modules at
    their start values. A profile is added by writing its rows; what runs meanwhile goes on reading the others, and a
    row is written again when no run reads it any more."""

    def __init__(self, record: Mapping[str, Any], folder: Path):
        super().__init__(record, folder)
        with needing("a bank of profiles"):
            from safetensors.numpy import load_file

        starts = load_file(folder / LINK / STARTS)
        self.arrays = {name: np.ascontiguousarray(starts[name][None]) for name in record["inputs"]}
        self.lock = threading.Lock()
        self.rows = 1
        self.running: Counter[int] = Counter()
        """How many runs read a row."""
        self.free: list[int] = []
        self.left: set[int] = set()
        """Rows of profiles that were removed, which a run still reads."""
        self._bind()

    def _bind(self) -> None:
        import onnxruntime as ort

        self.stacked = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in self.arrays.items()}

    def take(self, name: Hashable, arrays: Mapping[str, Array]) -> None:
        self.take_all([name], {key: array[None] for key, array in arrays.items()})

    def take_all(self, names: Sequence[Hashable], arrays: Mapping[str, Array]) -> None:
        with self.lock:
            if (missing := len(names) - len(self.free)) > 0:
                self._grow(max(2 * self.rows, self.rows + missing, FIRST_ROOM))
            rows = [self.free.pop() for _ in names]
            for key, array in arrays.items():
                self.arrays[key][rows] = array
            before = [self.held[name] for name in names if name in self.held]
            self.held.update(zip(names, rows, strict=True))
            for row in before:
                self._leave(row)

    def reserve(self, profiles: int) -> None:
        with self.lock:
            if (missing := profiles - len(self.free)) > 0:
                self._grow(self.rows + missing)

    def _grow(self, room: int) -> None:
        """Room for more rows, in new arrays: a run that has the old ones keeps them. The system gives memory to rows
        that are written, and to no others."""
        grown = {name: np.zeros((room, *array.shape[1:]), array.dtype) for name, array in self.arrays.items()}
        for name, array in self.arrays.items():
            grown[name][: self.rows] = array
        self.arrays = grown
        self.free = [*range(room - 1, self.rows - 1, -1), *self.free]
        self.rows = room
        self._bind()

    def _leave(self, row: int) -> None:
        if self.running[row]:
            self.left.add(row)
        else:
            self.free.append(row)

    def remove(self, name: Hashable) -> None:
        with self.lock:
            self._leave(self._known(name))
            del self.held[name]
            self.labels.pop(name, None)

    def each(self, chosen: Chosen, texts: int | None) -> list[Shares]:
        alone = is_one(chosen)
        listed = not alone and isinstance(chosen, (Sequence, np.ndarray))
        each: list[Any] = [*chosen] if listed else [chosen]  # type: ignore[misc]
        fitting = alone or (listed and bool(each) and texts in (None, len(each)))
        if not fitting or not all(is_one(one) for one in each):
            raise _none_for_each(chosen, texts)
        return [self._shares(one) for one in each]

    def _shares(self, one: str | Blend | None) -> Shares:
        """What is chosen for a text. What its weights leave of 1 is the bare base's, so that changes of the base are
        scaled by their weights."""
        if not isinstance(one, Mapping):
            return ((one, 1.0),)
        if not self.blends:
            raise wrong_type("the profile of a text", dict(one), "one name, or None", "an artifact compiled with"
                             " `deploy: {blend: true}` takes several with weights")  # fmt: skip
        for name, weight in one.items():
            number = isinstance(weight, (int, float, np.number)) and not isinstance(weight, bool)
            if not isinstance(name, str) or not number or not np.isfinite(np.float32(weight)):
                raise wrong_type("the weight of a profile", {name: weight}, "a finite number by the profile's name")
        shares: list[tuple[Hashable, float]] = [(name, float(weight)) for name, weight in one.items()]
        if abs(left := 1 - sum(weight for _, weight in shares)) > WHOLE:
            shares.append((None, left))
        return tuple(shares)

    @property
    def blends(self) -> bool:
        """Whether a text may have several profiles with weights."""
        assert self.record is not None
        return bool(self.record.get("blend"))

    @contextmanager
    def lent(self, each: Sequence[Shares], alone: bool) -> Iterator[Taken]:
        import onnxruntime as ort

        self.check_bare(each)
        with self.lock:
            places = [[0 if key is None else self._known(key) for key, _ in shares] for shares in each]
            used = [place for of_text in places for place in of_text]
            stacked = self.stacked
            self.running.update(used)
        most = max(map(len, each))  # texts with fewer profiles have the bare base beside them, with no weight
        picked = np.array([of_text + [0] * (most - len(of_text)) for of_text in places], np.int64) - 1
        weights = np.array([[w for _, w in shares] + [0.0] * (most - len(shares)) for shares in each], np.float32)

        def values(rows: int) -> dict[str, Any]:
            if not alone and rows % len(picked):
                raise _none_for_each(each, rows)
            if not self.blends:
                of_rows = picked[:, 0] if alone else np.repeat(picked[:, 0], rows // len(picked))
                return {**stacked, PROFILE: ort.OrtValue.ortvalue_from_numpy(of_rows)}
            times = rows // len(picked)
            chosen = {PROFILE: np.repeat(picked, times, 0), PROFILE_WEIGHTS: np.repeat(weights, times, 0)}
            return {**stacked, **{n: ort.OrtValue.ortvalue_from_numpy(array) for n, array in chosen.items()}}

        try:
            yield values
        finally:
            with self.lock:
                self.running.subtract(used)
                self.running += Counter()  # without those that nobody reads any more
                done = [row for row in self.left if not self.running[row]]
                self.free += done
                self.left.difference_update(done)

    def joined(self, each: Sequence[Taken]) -> Taken:
        import onnxruntime as ort

        with self.lock:
            stacked = self.stacked  # rows that are read stay where they are, in arrays that have grown too
        values = [taken(1)[PROFILE] for taken in each]  # alive while their numbers are read, which are theirs
        picked = np.concatenate([value.numpy() for value in values])
        return lambda rows: {**stacked, PROFILE: ort.OrtValue.ortvalue_from_numpy(picked)}


def is_one(chosen: object) -> bool:
    """Whether a choice of profiles is one for all texts."""
    return chosen is None or isinstance(chosen, (str, Mapping))


def names_of(each: Sequence[Shares]) -> list[Any]:
    """The names that are chosen, each once."""
    return list(dict.fromkeys(name for shares in each for name, _ in shares if name is not None))


def _none_for_each(chosen: object, texts: int | None) -> PeltError:
    many = "one for each text" if texts is None else f"a list of {texts}, one for each text"
    return wrong_type("the profiles of a batch", chosen, f"a name, or {many}; None where a text has none")


def profiles_of(manifest: Mapping[str, Any], folder: Path) -> Profiles:
    """What an artifact can have of profiles."""
    record = manifest.get("profiles")
    return Bank(record, folder) if record and record["mode"] == BANK else Profiles(record, folder)
