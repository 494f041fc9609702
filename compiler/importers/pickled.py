"""Tensors in a file of `torch.save`, as adapters were saved before safetensors: torch opens it without running code
from it, and nothing in it may be larger than the file."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from peltc.spec.diagnostics import PeltError, Place, fail

Array = np.ndarray[Any, Any]
MAX_PICKLE = 2**33


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that lies in memory, read like one that lies in a file."""

    values: Array

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.values.shape
        return shape

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self.values.dtype
        return dtype

    def array(self) -> Array:
        """The values."""
        return self.values


def read_pickle(file: Path) -> dict[str, HeldTensor]:
    """The tensors of a file by name.

    Raises:
        PeltError: E430 it is too large, compressed, cut off, or holds anything else than tensors by name.
    """
    place, hint = Place(str(file)), "save it again with `safe_serialization=True`"
    expected = "tensors by name, as `torch.save` writes them"
    try:
        if (size := file.stat().st_size) > MAX_PICKLE:
            raise fail("E430", f"the file has {size:,} bytes", place, f"at most {MAX_PICKLE:,}", hint)
        with zipfile.ZipFile(file) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise fail("E430", "the file is compressed, which `torch.save` never does", place, expected, hint)
            if sum(part.file_size for part in parts.infolist()) > size:
                raise fail("E430", "the file says that its parts are larger than it is", place, expected, hint)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        raise fail("E430", "the file of tensors cannot be read: it is cut off, or of a torch before 1.6", place,
                   expected, hint) from None  # fmt: skip
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or hostile file makes torch say
        first = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise fail("E430", f"torch does not open the file without running code from it: {first}", place, expected,
                   hint) from None  # fmt: skip
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        raise fail("E430", "the file holds something else than tensors by name", place, expected, hint)
    if sum(tensor.numel() * tensor.element_size() for tensor in found.values()) > size:
        raise fail("E430", "the file says that its tensors are larger than it is", place, expected, hint)
    return {name: HeldTensor(_array(tensor, name, place)) for name, tensor in found.items()}


def _array(tensor: Any, name: str, place: Place) -> Array:
    import torch

    try:
        if tensor.dtype == torch.bfloat16:
            return np.asarray(tensor.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
        return np.asarray(tensor.detach().contiguous().numpy())
    except (TypeError, RuntimeError):
        raise _unlike(tensor, name, place) from None


def _unlike(tensor: Any, name: str, place: Place) -> PeltError:
    return fail("E430", f"the tensor '{name[:120]}' is a {tensor.layout} one of the type {tensor.dtype}", place,
                "dense floating-point values")  # fmt: skip
