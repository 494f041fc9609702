"""Files of an adapter's folder, which may be anybody's: JSON of bounded size, and tensors, of a safetensors file or of
what torch loads as plain tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from peltc.compiler.files.checkpoint import is_float, read_header
from peltc.spec.diagnostics import Place, fail
from peltc.spec.foreign import MAX_CONFIG

MAX_PICKLE = 2**32
"""How many bytes of torch's own format are opened."""
Array = np.ndarray[Any, Any]


class Stored(Protocol):
    """A tensor of a file."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    def array(self) -> Array:
        """Its values."""


@dataclass(frozen=True)
class Loaded:
    """A tensor that has been loaded."""

    values: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its values."""
        found: np.dtype[Any] = self.values.dtype
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.values.shape)

    def array(self) -> Array:
        """Its values."""
        return self.values


def read_json(file: Path, library: str) -> dict[str, Any]:
    """A mapping from a JSON file.

    Args:
        library: who writes such a file, for messages.

    Raises:
        PeltError: E430.
    """
    place = Place(str(file))
    try:
        if file.stat().st_size > MAX_CONFIG:
            raise fail("E430", f"the adapter's config has {file.stat().st_size:,} bytes", place,
                       f"at most {MAX_CONFIG:,}")  # fmt: skip
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise fail("E430", f"cannot read the adapter's config: {error.strerror}", place,
                   f"a folder that {library} wrote") from None  # fmt: skip
    except (ValueError, RecursionError):
        raise fail("E430", "the adapter's config is not JSON", place, f"JSON, as {library} writes it") from None
    if not isinstance(found, dict):
        raise fail("E430", "the adapter's config is not a mapping", place, f"JSON, as {library} writes it")
    return found


def read_tensors(folder: Path, safe: str, pickled: str) -> Mapping[str, Stored]:
    """The tensors of a folder by name, from its safetensors file, or from torch's own format where it has only that.

    Raises:
        PeltError: E401 no safetensors file; E430 what is no plain tensor of floating-point values.
    """
    file = folder / (safe if (folder / safe).exists() or not (folder / pickled).is_file() else pickled)
    tensors: Mapping[str, Stored] = read_header(file) if file.name == safe else read_pickled(file)
    for name, tensor in tensors.items():
        if not is_float(tensor.dtype):
            raise fail("E430", f"the tensor '{name[:120]}' is of the type {tensor.dtype}", Place(str(file)),
                       "floating-point values")  # fmt: skip
    return tensors


def read_pickled(file: Path) -> dict[str, Stored]:
    """The tensors in a file that `torch.save` wrote, opened as plain tensors: no code of the file runs.

    Raises:
        PeltError: E430 a file that is too large, is not torch's, or holds anything else than a dict of tensors.
    """
    place, size = Place(str(file)), file.stat().st_size
    expected = "a dict of tensors, which `weights_only` loading accepts"
    if size > MAX_PICKLE:
        raise fail("E430", f"the file has {size:,} bytes", place, f"at most {MAX_PICKLE:,}",
                   "save it again with `use_safetensors=True`")  # fmt: skip
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        raise fail("E430", f"the file cannot be loaded: {detail[:120]}", place, expected,
                   "save it again with `use_safetensors=True`") from None  # fmt: skip
    if not isinstance(found, dict):
        raise fail("E430", f"the file holds a {type(found).__name__}", place, expected)
    tensors: dict[str, Stored] = {}
    for name, tensor in found.items():
        plain = isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
        if not plain or tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() > size:
            raise fail("E430", f"{str(name)[:120]!r} is no tensor whose values the file holds", place, expected)
        if not tensor.dtype.is_floating_point or tensor.is_quantized:
            raise fail("E430", f"the tensor '{name[:120]}' is of the type {tensor.dtype}", place,
                       "floating-point values")  # fmt: skip
        tensors[name] = Loaded(tensor.detach().float().contiguous().numpy())
    return tensors
