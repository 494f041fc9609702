"""A folder that Hugging Face PEFT saved: its config and the header of its tensors' file, both of bounded size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.adapter.mismatch import names
from peltc.compiler.files.checkpoint import StoredTensor, is_float, read_header
from peltc.compiler.importers.pickled import HeldTensor, read_pickle
from peltc.spec.diagnostics import Place, fail
from peltc.spec.foreign import CONFIG, MAX_CONFIG, holders

Array = np.ndarray[Any, Any]
TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
APART = ("new_embeddings.safetensors", "new_embeddings.bin")
"""Rows of added tokens, as servers of adapters read them from a file of their own."""
PREFIX = "base_model.model."
"""What PEFT puts before the model's own names; some writers leave it out, and some put it twice."""
PREFIX_OF_THE_WHOLE = "base_model."
"""The same before what no module of the model has."""


@dataclass(frozen=True)
class Folder:
    """An adapter's folder.

    Attributes:
        config: what `adapter_config.json` says.
        tensors: the stored tensors by their names in the model, PEFT's own prefix taken off.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor | HeldTensor]

    @property
    def kind(self) -> str:
        """PEFT's name of the method."""
        return str(self.config["peft_type"])

    @property
    def base(self) -> str:
        """The model that it says it is for, or ""."""
        found = self.config.get("base_model_name_or_path")
        return found if isinstance(found, str) else ""

    @property
    def place(self) -> Place:
        """Where its config stands."""
        return Place(str(self.path / CONFIG))

    def values(self, name: str) -> Array:
        """A tensor's values: whole numbers as they are, others in float32. A number has one axis of size 1."""
        tensor = self.tensors[name]
        return np.atleast_1d(np.asarray(tensor.array(), np.float32 if is_float(tensor.dtype) else np.int64))


def read_folder(path: Path) -> Folder:
    """Read an adapter's folder; of a safetensors file, no tensor's values are read. What else lies there, a Trainer's
    state or a tokenizer, is left alone.

    Args:
        path: the folder, or one around it.

    Raises:
        PeltError: E430 the config cannot be read, or names no method; several folders below hold adapters; E401 the
            tensors' file is no safetensors file; E431 rows of added tokens in a file of their own.
    """
    path = only(path)
    file = path / CONFIG
    place = Place(str(file))
    try:
        if file.stat().st_size > MAX_CONFIG:
            raise fail("E430", f"the adapter's config has {file.stat().st_size:,} bytes", place,
                       f"at most {MAX_CONFIG:,}")  # fmt: skip
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise fail("E430", f"cannot read the adapter's config: {error.strerror}", place,
                   "a folder that PEFT's `save_pretrained` wrote") from None  # fmt: skip
    except (ValueError, RecursionError):
        raise fail("E430", "the adapter's config is not JSON", place, "JSON, as PEFT writes it") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise fail("E430", "the adapter's config names no method", place, "a key 'peft_type'")
    for name in APART:
        if (path / name).is_file():
            raise fail("E431", f"the adapter has rows of added tokens in a file of their own, '{name}'",
                       Place(str(path / name)), "all tensors in one file",
                       "save it again with PEFT, `save_embedding_layers=True`")  # fmt: skip
    held = path / TENSORS
    stored: Mapping[str, StoredTensor | HeldTensor]
    if not held.is_file() and (path / PICKLE).is_file():
        held = path / PICKLE
        stored = read_pickle(held)
    else:
        stored = read_header(held)
    tensors: dict[str, StoredTensor | HeldTensor] = {}
    for name, tensor in stored.items():
        own = name
        while own.startswith(PREFIX):
            own = own.removeprefix(PREFIX)
        own = own.removeprefix(PREFIX_OF_THE_WHOLE)
        if own in tensors:
            raise fail("E430", f"the file holds '{own}' twice, with and without '{PREFIX}'", Place(str(held)))
        tensors[own] = tensor
    return Folder(path, config, tensors)


def only(path: Path) -> Path:
    """The one folder that holds an adapter: the given one, or one right below it.

    Raises:
        PeltError: E430 several below do.
    """
    found = holders(path) if path.is_dir() else []
    if len(found) > 1:
        told = names([str(folder.relative_to(path)) for folder in found])
        raise fail("E430", f"{len(found)} folders below hold adapters: {told}", Place(str(path)), "one of them")
    return found[0] if found else path
