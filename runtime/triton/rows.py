"""The rows of profiles: which number a name stands for in an export, and the file that has all of their tensors.

A number once given stays with its name in all exports that follow, and the rows of names that are gone keep their
values: while a server changes from one export to the next, whoever still goes by the older numbers is answered as
before. `renumber` gives all numbers anew; then the stamp is another one, and numbers of before are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.files.labels import LABELS
from peltc.compiler.linking.profiles import DIGITS

Array = np.ndarray[Any, Any]
DATA = "profiles.data"
"""The file of all profiles' tensors, in the folder of each version of a model."""
ALIGNMENT = 64


@dataclass(frozen=True)
class Numbers:
    """The numbers of profiles, as an export records them.

    Attributes:
        fingerprint: of what the profiles belong to.
        round: how many times all numbers were given anew, for whatever artifact.
        rows: of each name its number, from 0; row 0 of the arrays, before them, is the modules at their start values.
        gone: numbers of names that are there no more.
    """

    fingerprint: str
    round: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)
    gone: tuple[int, ...] = ()

    @property
    def stamp(self) -> str:
        """What these numbers are told by."""
        return hashlib.sha256(f"{self.fingerprint} {self.round}".encode()).hexdigest()[:DIGITS]

    @property
    def size(self) -> int:
        """How many rows the arrays have."""
        return 2 + max((*self.rows.values(), *self.gone), default=-1)

    def following(self, names: list[str], fingerprint: str, renumber: bool = False) -> Numbers:
        """The numbers of the next export, with these names; those of another artifact are new ones too."""
        if renumber or fingerprint != self.fingerprint:
            return Numbers(fingerprint, self.round + 1, {name: i for i, name in enumerate(names)})
        new = iter(range(self.size - 1, self.size - 1 + len(names)))
        rows = {name: self.rows[name] if name in self.rows else next(new) for name in names}
        gone = {*self.gone, *self.rows.values()} - {*rows.values()}
        return Numbers(fingerprint, self.round, rows, tuple(sorted(gone)))

    def to_json(self) -> dict[str, Any]:
        """As the export's record has it."""
        return {"fingerprint": self.fingerprint, "round": self.round, "rows": dict(self.rows), "gone": [*self.gone]}


@dataclass(frozen=True)
class Place:
    """Where an input's array [K, ...] lies in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def open(self, file: Path, mode: Any) -> Array:
        """The array, as it lies in the file."""
        return np.memmap(file, self.dtype, mode, self.offset, self.shape)


@dataclass(frozen=True)
class Stacked:
    """All profiles in one file.

    Attributes:
        size: how many rows there are.
        places: of each input's array, by the input's name.
    """

    file: Path
    stamp: str
    size: int
    places: Mapping[str, Place]

    def tensor(self, name: str) -> ir.ExternalTensor:
        """An input's array, where it lies."""
        place = self.places[name]
        kind = ir.DataType.from_numpy(place.dtype)
        return ir.ExternalTensor(self.file.name, place.offset, place.nbytes, kind, shape=ir.Shape(place.shape),
                                 name=name, base_dir=self.file.parent)  # fmt: skip


def places_of(starts: Mapping[str, Array], size: int) -> dict[str, Place]:
    """Where arrays of so many rows lie, one after the other."""
    found, at = {}, 0
    for name, start in starts.items():
        found[name] = Place(at, (size, *start.shape), start.dtype)
        at += found[name].nbytes
        at += -at % ALIGNMENT
    return found


def write_rows(
    file: Path,
    numbers: Numbers,
    starts: Mapping[str, Array],
    read: Callable[[str], Mapping[str, Array]],
    before: tuple[Path, Numbers] | None = None,
) -> Stacked:
    """Write all profiles, one in memory at a time.

    Args:
        starts: the modules' start values by the graph's inputs.
        read: a profile's tensors, held against the artifact, by its name.
        before: the file of the export before and its numbers, of which the rows of names that are gone are taken.
    """
    places = places_of(starts, numbers.size)
    with file.open("wb") as stream:
        stream.truncate(max((place.offset + place.nbytes for place in places.values()), default=0))
    arrays = {name: place.open(file, "r+") for name, place in places.items()}
    for name, start in starts.items():
        arrays[name][0] = start
    for name, row in numbers.rows.items():
        for key, array in read(name).items():
            if key != LABELS:  # which clients know, not the graph
                arrays[key][row + 1] = array
    if before is not None:
        older, known = before
        for name, place in places_of(starts, known.size).items() if numbers.gone else ():
            values = place.open(older, "r")
            for row in numbers.gone:
                arrays[name][row + 1] = values[row + 1]
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]
    return Stacked(file, numbers.stamp, numbers.size, places)
