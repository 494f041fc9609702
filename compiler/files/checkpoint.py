"""Checkpoints where they lie: safetensors headers, and tensors by file, offset and length. No weight is read here
before somebody asks for its array."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from peltc.compiler.files.integrity import Stamp, stamp
from peltc.spec.diagnostics import Place, fail

MAX_HEADER = 100 * 1024 * 1024
MODULES = "pelt."
"""What the names of attached modules' tensors start with in a torch model's own state."""
SAMPLES, SAMPLE_BYTES = 64, 4096

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: `offset` and `length` in bytes from the file's start."""

    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    length: int

    @property
    def files(self) -> tuple[Path, ...]:
        """Where it lies."""
        return (self.file,)

    def array(self) -> np.ndarray[Any, Any]:
        """The values, mapped from the file: pages are read when touched."""
        if not self.length:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def _header(file: Path, code: str) -> tuple[Any, int, int]:
    """A safetensors file's header, its length, and the file's size."""
    place = Place(str(file))
    expected = "a safetensors file"
    if os.path.isdir(file):  # also of what is no path at all
        raise fail(code, "a folder is given where a file of tensors is wanted", place, expected, _hint_of(file))
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise fail(code, "the file is cut off, or no safetensors file", place, expected)
            header = json.loads(stream.read(length))
    except OSError as error:
        raise fail(code, f"cannot read the file: {error.strerror}", place, expected) from None
    except (ValueError, RecursionError):
        raise fail(code, "the file's header is not JSON: no safetensors file", place, expected) from None
    if not isinstance(header, dict):
        raise fail(code, "the file's header is not a mapping", place, expected)
    return header, length, size


def _hint_of(folder: Path) -> str:
    """What may have been meant by a folder in a file's place."""
    files = sorted(folder.glob("*.safetensors"))
    if any(name.startswith(MODULES) for file in files for name in _header(file, "E401")[0] if file.is_file()):
        return (
            "it is a checkpoint with modules in it: give it as MODEL to compile it, and to a Trainer as"
            " `resume_from_checkpoint=` to go on with the training"
        )
    adapters = [file.name for file in files if not file.name.startswith("model")]
    return f"the folder has {', '.join(adapters[:4])}" if adapters else "`model.save_adapter(path)` writes such a file"


def read_metadata(file: Path, code: str = "E401") -> dict[str, str]:
    """What a safetensors file says about itself.

    Raises:
        PeltError: as `read_header`.
    """
    found = _header(file, code)[0].get("__metadata__")
    return found if isinstance(found, dict) else {}


def read_header(file: Path, code: str = "E401") -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, from its header alone.

    Raises:
        PeltError: `code` where the file is missing, cut off, or no safetensors file.
    """
    place, expected = Place(str(file)), "a safetensors file"
    header, length, size = _header(file, code)
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
        except KeyError as error:
            raise fail(code, f"the tensor '{name}' has an unknown type or no {error}", place, expected) from None
        except (TypeError, ValueError, OverflowError):
            raise fail(code, f"the header's entry for '{name}' is malformed", place, expected) from None
        if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise fail(code, f"the tensor '{name}' has a wrong extent", place, expected)
        if 8 + length + end > size:
            raise fail(code, f"the file is cut off before the end of '{name}'", place, expected, "copy it again")
        tensors[name] = StoredTensor(file, dtype, shape, 8 + length + begin, end - begin)
    return tensors


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    """What the files were like before anything of them was read."""
    packed: tuple[str | int, ...] = ()
    """How some of its weights are packed, where they are: see `packed.Packing`."""

    @cached_property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({file for tensor in self.tensors.values() for file in tensor.files}))

    @cached_property
    def header_digest(self) -> str:
        """Names, types and shapes, whatever the values."""
        entries = sorted((name, str(t.dtype), t.shape) for name, t in self.tensors.items())
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """Tells checkpoints with equal headers apart: the header, how weights are packed, and samples of each file's
        bytes, evenly spread."""
        packed = json.dumps(self.packed) if self.packed else ""
        digest = hashlib.sha256((self.header_digest + packed).encode())
        for file in self.files:
            size = file.stat().st_size
            digest.update(str(size).encode())
            with file.open("rb") as stream:
                for i in range(SAMPLES):
                    stream.seek(max(0, (size - SAMPLE_BYTES) * i // (SAMPLES - 1)))
                    digest.update(stream.read(SAMPLE_BYTES))
        return digest.hexdigest()

    @property
    def float_dtype(self) -> np.dtype[Any]:
        """The type that most of the floating-point values have."""
        totals: dict[np.dtype[Any], int] = {}
        for tensor in self.tensors.values():
            if is_float(tensor.dtype):
                totals[tensor.dtype] = totals.get(tensor.dtype, 0) + math.prod(tensor.shape)
        return max(totals, key=lambda d: totals[d], default=np.dtype(np.float32))


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a type is floating point; numpy does not count bfloat16."""
    return dtype.kind == "f" or dtype == DTYPES["BF16"]


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder: one safetensors file, or shards by their index.

    Raises:
        PeltError: E503 where there is no safetensors checkpoint, or a shard is missing or leads out of the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        stamps = _stamps([single])
        return Checkpoint(folder, read_header(single, "E503"), stamps)
    if not index.is_file():
        raise fail(
            "E503",
            "the model folder holds no weights",
            Place(str(folder)),
            "model.safetensors, or model.safetensors.index.json with its shards",
        )
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name) for name in mapping.values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise fail("E503", "the index of the shards is malformed", Place(str(index)), "a 'weight_map'") from None
    tensors: dict[str, StoredTensor] = {}
    stamps = _stamps(folder / shard for shard in sorted(shards) if "\0" not in shard)
    for shard in sorted(shards):
        if Path(shard).name != shard or "\0" in shard:
            raise fail("E503", f"the shard '{shard}' lies outside the model folder", Place(str(index)), "a file name")
        tensors.update(read_header(folder / shard, "E503"))
    if missing := sorted(set(mapping) - set(tensors)):
        raise fail(
            "E503", f"the shards lack {len(missing)} tensors of the index, first '{missing[0]}'", Place(str(index))
        )
    return Checkpoint(folder, tensors, stamps)


def _stamps(files: Iterable[Path]) -> dict[Path, Stamp]:
    """The stamps of those files that are there."""
    found = {}
    for file in files:
        with contextlib.suppress(OSError):
            found[file] = stamp(file)
    return found


def spellings(name: str, stem: str) -> list[str]:
    """How a parameter may be called in a checkpoint: as it is, with or without the base model's stem, and with the
    names that norms' parameters had before they were called weight and bias."""
    forms = [name, f"{stem}.{name}"] if stem else [name]
    if stem and name.startswith(stem + "."):
        forms.append(name[len(stem) + 1 :])
    old = [f.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") for f in forms]
    return list(dict.fromkeys(forms + old))
