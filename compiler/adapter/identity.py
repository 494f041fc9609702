"""Which base an adapter was trained on: its class, its name, and a few of its values, by which a checkpoint on disk is
told from another of the same shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from peltc.compiler.adapter.mathematics import spread
from peltc.compiler.base.base import Base
from peltc.compiler.files.checkpoint import DTYPES, is_float
from peltc.spec.formula.syntax import shown

PARAMETERS, ELEMENTS = 64, 4
MAX_NAME = 200
Array = np.ndarray[Any, Any]
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Sample:
    """A few values of a parameter, taken at even distances, by which the parameter is known again. `size` is the number
    of all its values, and `code` the name that safetensors files give its type."""

    code: str
    size: int
    data: bytes

    @staticmethod
    def of(size: int, values: Array) -> Sample:
        """The sample that consists of these values."""
        return Sample(_CODES[values.dtype], size, values.astype(values.dtype.newbyteorder("<")).tobytes())

    @property
    def values(self) -> Array:
        return np.frombuffer(self.data, DTYPES[self.code])

    def to_json(self) -> list[Any]:
        """`[type, size, bytes in hexadecimal]`."""
        return [self.code, self.size, self.data.hex()]

    @staticmethod
    def from_json(data: Any) -> Sample:
        """What `to_json` gave.

        Raises:
            TypeError, KeyError, ValueError: it is something else.
        """
        code, size, text = data
        if not isinstance(text, str) or not isinstance(size, int) or not 0 < size < 2**62:
            raise TypeError("no sample")
        sample = Sample(code, size, bytes.fromhex(text))
        if not is_float(DTYPES[code]) or len(sample.values) != len(spread(size, ELEMENTS)):
            raise ValueError("no sample")
        return sample

    def agrees(self, other: Sample) -> bool:
        """Whether the two can be one parameter, stored in one type or in two: roundings of the same values."""
        if (self.size, self.code) == (other.size, other.code):
            return self.data == other.data
        if self.size != other.size:
            return False
        a, b = self.values.astype(np.float64), other.values.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            return bool((np.abs(a - b) <= (_spacing(self.values) + _spacing(other.values)) / 2).all())


def _spacing(values: Array) -> Array:
    """How far the next larger number of the type lies from each; what was rounded to it is at most half of that off."""
    return np.spacing(np.abs(values)).astype(np.float64)


Read = Callable[[str], Sample | None]


@dataclass(frozen=True)
class BaseRecord:
    """A base, to be known again.

    Attributes:
        architecture: its class.
        name: a hub id, or the last part of a path; may be empty.
        samples: values of parameters that the modules read and training left alone, by name.
        thawed: the same of some of those that were trained along with the modules, and that no adapter file holds.
        labels: what the classes of a head that the modules bring are called, in order.
    """

    architecture: str
    name: str = ""
    samples: Mapping[str, Sample] = field(default_factory=dict)
    thawed: Mapping[str, Sample] = field(default_factory=dict)
    labels: tuple[str, ...] = ()

    def __str__(self) -> str:
        return shown(f"{self.architecture} '{self.name}'" if self.name else self.architecture)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "architecture": self.architecture,
            "name": self.name,
            "samples": {name: sample.to_json() for name, sample in self.samples.items()},
            "thawed": {name: sample.to_json() for name, sample in self.thawed.items()},
            "labels": list(self.labels),
        }

    @staticmethod
    def from_json(data: Any) -> BaseRecord:
        """What `to_json` gave.

        Raises:
            TypeError, KeyError, ValueError: it is something else.
        """
        words = [data["architecture"], data["name"], *data["labels"]]
        if not all(isinstance(word, str) for word in words) or not isinstance(data["labels"], list):
            raise TypeError("no text")
        samples, thawed = (
            {str(name): Sample.from_json(entry) for name, entry in dict(data[key]).items()}
            for key in ("samples", "thawed")
        )
        return BaseRecord(data["architecture"], data["name"][:MAX_NAME], samples, thawed, tuple(data["labels"]))

    def differences(self, here: BaseRecord, read: Read) -> list[str]:
        """What distinguishes the base at hand from this one, one sentence each.

        Args:
            here: class and name of the base at hand.
            read: its parameters by name; None where it has no such parameter.
        """
        found = []
        if other := _others(self.samples, read):
            found.append(
                f"the modules were trained on another base: on {self}, and this is {here}, where {len(other)} of"
                f" {len(self.samples)} parameters compared, first '{shown(other[0])}', differ"
            )
        elif self.architecture.rpartition(".")[2] != here.architecture.rpartition(".")[2]:
            found.append(f"the modules were trained on {self}, and this is {here}")
        if not found and (lost := _others(self.thawed, read)):
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            found.append(
                f"'{shown(lost[0])}'{more} of the base were trained along with the modules, and this base does not have"
                f" what came of it: compile on the model that was trained"
            )
        return found


def _others(samples: Mapping[str, Sample], read: Read) -> list[str]:
    """The parameters that have other values here. One that only this graph lacks, unused, says nothing."""
    own = {name: read(name) for name in samples}
    if samples and not any(own.values()):
        return list(samples)
    return [name for name, sample in samples.items() if (found := own[name]) is not None and not sample.agrees(found)]


def pick(names: Iterable[str], count: int = PARAMETERS) -> list[str]:
    """At most `count` of the names, evenly spread in their order."""
    ordered = sorted(names)
    return [ordered[i] for i in spread(len(ordered), count)]


def stored_samples(base: Base) -> Read:
    """Reads parameters of a base where they lie: a few pages each."""

    def read(name: str) -> Sample | None:
        info = base.parameters.get(name)
        if info is not None and base.lacks(name):
            return None  # other rows than those that were trained on
        tensor = base.checkpoint.tensors.get(info.stored if info is not None else name)
        if tensor is None or not is_float(tensor.dtype):
            return None
        flat = tensor.array().reshape(-1)
        return Sample.of(flat.size, np.array(flat[spread(flat.size, ELEMENTS)])) if flat.size else None

    return read


def stored_record(base: Base, without: Collection[str] = ()) -> BaseRecord:
    """A base by what lies in its checkpoint.

    Args:
        without: parameters that modules replace, which say nothing of what the modules were trained on.
    """
    read = stored_samples(base)
    found = {name: read(name) for name in pick(set(base.parameters) - set(without))}
    samples = {name: sample for name, sample in found.items() if sample is not None}
    return BaseRecord(base.architecture, public_name(str(base.folder)), samples)


def public_name(path: str) -> str:
    """A hub id as it is, a path by its last part: where people keep their models is nobody else's business."""
    if cached := re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots", path):
        return f"{cached[1]}/{cached[2]}"
    hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) and len(path) <= MAX_NAME
    if hub and not Path(path).exists():
        return path
    last = PurePosixPath(path.replace("\\", "/")).name
    return "" if last.startswith(".") else last[:MAX_NAME]
