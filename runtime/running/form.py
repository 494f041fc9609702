"""The form of an artifact's profiles: the tensors that one must have, and the file that they are read from and written
to."""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.files.labels import FAR, LABELS, read
from peltc.spec.diagnostics import Place, fail, wrong_type

Array = np.ndarray[Any, Any]
Source = str | Path | Mapping[str, Array]
"""What a profile is given as: a file that `pelt link` wrote, or arrays by input name."""
SUFFIX = ".onnx_adapter"
VERSION = 1
ROOM = 1 << 21
"""How many bytes a profile's file may have beside its tensors."""
END = b"PELTLABELS"
"""Ends a file that has names of labels behind what ONNX Runtime reads."""


def number_of(fingerprint: str) -> int:
    """A fingerprint as the number that a profile's file has room for; 31 bits, for ONNX Runtime keeps signed ones."""
    return int(fingerprint[:8], 16) & 0x7FFFFFFF


def write_profile(file: Path, tensors: Mapping[str, Array], fingerprint: str) -> None:
    """Write a profile in ONNX Runtime's own format, which its `LoraAdapter` reads too, whatever the method. The names
    of labels stand behind what ONNX Runtime reads.

    Args:
        tensors: what `peltc.link` gave.
        fingerprint: of what the profile belongs to.
    """
    import onnxruntime as ort

    from peltc.compiler.files.manifest import write_whole

    labels = tensors.get(LABELS)
    tensors = {name: array for name, array in tensors.items() if name != LABELS}

    form = ort.AdapterFormat()
    form.set_adapter_version(VERSION)
    form.set_model_version(number_of(fingerprint))
    form.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in tensors.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.part")
    form.export_adapter(str(new))
    write_whole(file, new.read_bytes() + (b"" if labels is None else behind(labels)))
    new.unlink()


def behind(labels: Array) -> bytes:
    """The names of labels as they stand at the end of a profile's file: their bytes, how many these are, and a mark."""
    return labels.tobytes() + len(labels).to_bytes(8, "little") + END


def labels_behind(content: bytes) -> Array | None:
    """What `behind` wrote, at the end of a file; None where it did not.

    Raises:
        ValueError: there are fewer bytes than it says.
    """
    if not content.endswith(END):
        return None
    content = content.removesuffix(END)
    size = int.from_bytes(content[-8:], "little")
    if not 0 < size <= len(content) - 8:
        raise ValueError("fewer bytes")
    return np.frombuffer(content[-8 - size : -8], np.uint8)


class Form:
    """What the profiles of an artifact look like.

    Args:
        record: what the artifact's manifest says of profiles; None where its modules are fixed.
        place: the artifact, for messages.
    """

    def __init__(self, record: Mapping[str, Any] | None, place: Place):
        self.record, self.place = record, place
        self.masks: Mapping[str, Sequence[int]] = record["masks"] if record else {}
        self.labels: Mapping[str, Any] | None = record.get("labels") if record else None
        """Where profiles may have fewer labels: the input that hides the others, and the names of the most."""

    @property
    def inputs(self) -> dict[str, list[int]]:
        """The shapes of a profile's tensors, by the names of the graph's inputs.

        Raises:
            PeltError: E624 the artifact has no profiles.
        """
        if not self.record:
            raise fail("E624", "the modules of this artifact are fixed in it", self.place,
                       "an artifact compiled with `mode: swappable` or `mode: bank`")  # fmt: skip
        return dict(self.record["inputs"])

    def arrays(self, name: str, source: Source) -> dict[str, Array]:
        """A profile's tensors, held against the form.

        Args:
            name: the profile's, for messages.

        Raises:
            PeltError: E216 neither a file nor arrays; E624 the artifact has no profiles; E625 a profile of another
                artifact, or one that cannot be read.
        """
        inputs = self.inputs
        if not isinstance(source, (str, PathLike, Mapping)):
            raise wrong_type("a profile", source, "a file that `pelt link` wrote, or the arrays that `peltc.link` gave")
        arrays = dict(source) if isinstance(source, Mapping) else self._read(Path(source), inputs)
        labels = arrays.pop(LABELS, None)
        self._check(name, arrays, ())
        if labels is not None:
            try:
                fitting = self.labels is not None and len(read(labels)) == self._count(arrays)
            except ValueError:
                fitting = False
            if not fitting:
                raise self._foreign(name, "has names of other labels than")
            arrays[LABELS] = labels
        return arrays

    def names(self, arrays: Mapping[str, Array]) -> list[str] | None:
        """What the labels of a profile are called, of which `arrays` gave the tensors; None where all profiles have
        those of the artifact."""
        if self.labels is None:
            return None
        if LABELS in arrays:
            return read(arrays[LABELS])
        count, most = self._count(arrays), list(self.labels["names"])
        return most if count == len(most) else [f"LABEL_{i}" for i in range(count)]

    def _count(self, arrays: Mapping[str, Array]) -> int:
        """How many labels a profile has."""
        assert self.labels is not None
        return int((arrays[self.labels["input"]] == 0).sum())

    def stacked(self, names: Sequence[str], arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The tensors of several profiles, [profiles, ...] each, held against the form.

        Raises:
            PeltError: as `arrays`; of what is wrong with one of them.
        """
        if not isinstance(arrays, Mapping):
            raise wrong_type("profiles", arrays, "arrays by input name, stacked along their first axis")
        self._check(f"{names[0]} and {len(names) - 1:,} more" if names[1:] else names[0], arrays, (len(names),))
        return dict(arrays)

    def _check(self, name: str, arrays: Mapping[str, Array], lead: tuple[int, ...]) -> None:
        """Whether tensors are those of profiles.

        Args:
            lead: the axes before their own.

        Raises:
            PeltError: E624, E625.
        """
        inputs = {key: [*lead, *shape] for key, shape in self.inputs.items()}
        if set(arrays) != set(inputs):
            raise self._foreign(name, "has other tensors than")
        for key, array in arrays.items():
            dtype = np.dtype(np.uint8 if key in self.masks else np.float32)
            if not isinstance(array, np.ndarray) or list(array.shape) != inputs[key] or array.dtype != dtype:
                found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
                raise self._foreign(name, f"has {key} as {found}, which is {dtype} {inputs[key]} in")
            if key in self.masks:
                size, ones = self.masks[key]
                bits = np.unpackbits(array, axis=-1, bitorder="little")
                if (bits.sum(-1) != ones).any() or bits[..., size:].any():
                    raise self._foreign(name, f"does not choose {ones} of {size} modules in {key}, as every profile of")
            elif self.labels is not None and key == self.labels["input"]:
                counts = (array == 0).sum(-1, keepdims=True)
                if (counts < 1).any() or (array != np.where(np.arange(array.shape[-1]) < counts, 0, FAR)).any():
                    raise self._foreign(name, f"does not say in {key} which labels it has, as every profile of")
            elif not np.isfinite(array).all():
                raise self._foreign(name, f"has values in {key} that are no numbers, for")

    def _read(self, file: Path, inputs: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        import onnxruntime as ort

        assert self.record is not None
        most = ROOM + sum(4 * int(np.prod(shape)) for shape in inputs.values())
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
            if self.labels is not None and (labels := labels_behind(file.read_bytes())) is not None:
                arrays[LABELS] = labels
        except Exception:  # bytes that others wrote: ONNX Runtime and its bindings say it in many ways
            raise fail("E625", "the file is no profile", Place(str(file)), "what `pelt link` wrote") from None
        if version != number_of(self.record["fingerprint"]):
            raise self._foreign(file.name, "was made for another artifact than")
        return arrays

    def _foreign(self, name: str, what: str) -> Exception:
        return fail("E625", f"the profile {name!r:.80} {what} this artifact", self.place,
                    "a profile that was linked for it", "pelt link OUT --weights FILE -o PROFILE")  # fmt: skip
