"""Profiles of which each row of a batch picks its own, stacked in memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.files.manifest import LINK, PROFILE, PROFILE_WEIGHTS, STARTS
from peltc.runtime.running.device import HOST, value_on
from peltc.runtime.running.profiles import Array, Blend, Chosen, Profiles, Shares, Taken, is_one
from peltc.spec.diagnostics import PeltError, wrong_type
from peltc.spec.modes import BANK
from peltc.spec.packages import needing

FIRST_ROOM = 8
"""For how many profiles a bank has room at first."""
WHOLE = 1e-6
"""How far from 1 a sum of weights may be that is meant to be 1."""


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
        self.stacked = {name: value_on(HOST, array) for name, array in self.arrays.items()}
        self.moved.clear()

    def _lying(self) -> dict[str, Any]:
        """All profiles' values where graphs compute. On a device they are a copy, made anew after profiles were added:
        runs that have the one before go on reading it."""
        if self.device == HOST:
            return self.stacked
        if not self.moved:
            self.moved.update({name: value_on(self.device, array) for name, array in self.arrays.items()})
        return {str(name): value for name, value in self.moved.items()}

    def take(self, name: Hashable, arrays: Mapping[str, Array]) -> None:
        self.take_all([name], {key: array[None] for key, array in arrays.items()})

    def take_all(self, names: Sequence[Hashable], arrays: Mapping[str, Array]) -> None:
        with self.lock:
            if (missing := len(names) - len(self.free)) > 0:
                self._grow(max(2 * self.rows, self.rows + missing, FIRST_ROOM))
            rows = [self.free.pop() for _ in names]
            for key, array in arrays.items():
                self.arrays[key][rows] = array
            self.moved.clear()
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
            self.labels.pop(name, None)  # what lies on a device stays: nobody reads its row

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
        self.check_bare(each)
        with self.lock:
            places = [[0 if key is None else self._known(key) for key, _ in shares] for shares in each]
            used = [place for of_text in places for place in of_text]
            stacked = self._lying()
            self.running.update(used)
        most = max(map(len, each))  # texts with fewer profiles have the bare base beside them, with no weight
        picked = np.array([of_text + [0] * (most - len(of_text)) for of_text in places], np.int64) - 1
        weights = np.array([[w for _, w in shares] + [0.0] * (most - len(shares)) for shares in each], np.float32)

        def values(rows: int) -> dict[str, Any]:
            if not alone and rows % len(picked):
                raise _none_for_each(each, rows)
            times = rows // len(picked)
            if not self.blends:
                return {**stacked, PROFILE: value_on(HOST, np.repeat(picked[:, 0], 1 if alone else times))}
            chosen: dict[str, Array] = {
                PROFILE: np.repeat(picked, times, 0),
                PROFILE_WEIGHTS: np.repeat(weights, times, 0),
            }
            return {**stacked, **{name: value_on(HOST, array) for name, array in chosen.items()}}

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
        with self.lock:
            stacked = self._lying()  # rows that are read stay where they are, in arrays that have grown too
        rows = [taken(1) for taken in each]  # alive while their numbers are read, which are theirs
        chosen = {name: [row[name].numpy() for row in rows] for name in (PROFILE, PROFILE_WEIGHTS) if name in rows[0]}
        most = max(array.shape[-1] for array in chosen[PROFILE])  # of a text, where it may have several
        lacking: dict[str, float] = {PROFILE: -1, PROFILE_WEIGHTS: 0}
        whole: dict[str, Array] = {}
        for name, arrays in chosen.items():
            if arrays[0].ndim > 1:
                arrays = [
                    np.pad(array, [(0, 0), (0, most - array.shape[1])], constant_values=lacking[name])
                    for array in arrays
                ]
            whole[name] = np.concatenate(arrays)
        return lambda rows: {**stacked, **{name: value_on(HOST, array) for name, array in whole.items()}}


def _none_for_each(chosen: object, texts: int | None) -> PeltError:
    many = "one for each text" if texts is None else f"a list of {texts}, one for each text"
    return wrong_type("the profiles of a batch", chosen, f"a name, or {many}; None where a text has none")


def profiles_of(manifest: Mapping[str, Any], folder: Path) -> Profiles:
    """What an artifact can have of profiles."""
    record = manifest.get("profiles")
    return Bank(record, folder) if record and record["mode"] == BANK else Profiles(record, folder)
