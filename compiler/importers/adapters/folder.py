"""A folder that the `adapters` library saved: its config, the names of its tensors, and a prediction head beside.

A tensor is called after the module that it is in, the kind of part, and the adapter's own name:
`bert.encoder.layer.0.output.adapters.NAME.adapter_up.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peltc.compiler.adapter.mismatch import names
from peltc.compiler.importers.adapters.interface import LIBRARY as LIBRARY
from peltc.compiler.importers.adapters.interface import read_interface
from peltc.compiler.importers.stored import Stored, read_json, read_tensors
from peltc.spec.diagnostics import Place, fail
from peltc.spec.foreign import CONFIG

TENSORS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
HEAD_CONFIG, HEAD_TENSORS, HEAD_PICKLE = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"
KINDS = ("adapters", "loras", "prefix_tunings", "prefix_gates", "prompt_tunings", "refts", "shared_parameters",
         "invertible_adapters")  # fmt: skip
"""The kinds of parts, as they stand before the adapter's name."""


@dataclass(frozen=True)
class Part:
    """All tensors of one kind in one module.

    Attributes:
        module: the module's name in the model, "" for the model itself.
        kind: one of `KINDS`.
        tensors: by what follows the adapter's name.
    """

    module: str
    kind: str
    tensors: dict[str, Stored] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """What a message calls it."""
        return f"{self.module}.{self.kind}" if self.module else self.kind


@dataclass(frozen=True)
class Head:
    """A prediction head.

    Attributes:
        config: what `head_config.json` says.
        tensors: by the names that they have in the model.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    place: Place


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter's folder.

    Attributes:
        said: what `adapter_config.json` says.
        config: the method's own part of it.
        parts: the tensors.
        head: the prediction head, where one was saved beside.
        interface: which modules the library hangs its hooks on, where it knows the model by these alone.
    """

    path: Path
    said: Mapping[str, Any]
    config: Mapping[str, Any]
    parts: tuple[Part, ...]
    head: Head | None
    interface: Mapping[str, Any] | None = None

    @property
    def place(self) -> Place:
        """Where its config stands."""
        return Place(str(self.path / CONFIG))

    @property
    def base(self) -> str:
        """The model that it says it is for, or ""."""
        found = self.said.get("model_name")
        return found if isinstance(found, str) else ""

    @property
    def version(self) -> str:
        """The version that wrote it, or ""."""
        found = re.fullmatch(r"adapters\.([\w.+-]{1,40})", str(self.said.get("version")))
        return found[1] if found else ""

    def of(self, *kinds: str) -> list[Part]:
        """The parts of some kinds."""
        return [part for part in self.parts if part.kind in kinds]


def read_adapter_folder(path: Path) -> AdapterFolder:
    """Read an adapter's folder.

    Raises:
        PeltError: E430 what of it cannot be read; E401 a tensors' file that is no safetensors file; E433 tensors that
            are no part of the adapter.
    """
    place = Place(str(path / CONFIG))
    said = read_json(path / CONFIG, LIBRARY)
    config, name = said.get("config"), said.get("name")
    if not isinstance(config, dict) or not isinstance(name, str) or not name:
        raise fail("E430", "the adapter's config names no method", place, "keys 'config' and 'name'")
    tensors = read_tensors(path, TENSORS, PICKLE)
    parts = sorted_parts(tensors, name, Place(str(path)))
    return AdapterFolder(path, said, config, parts, read_head(path), read_interface(path))


def read_head(path: Path) -> Head | None:
    """The prediction head in a folder; None where there is none."""
    if not any((path / file).exists() for file in (HEAD_CONFIG, HEAD_TENSORS, HEAD_PICKLE)):
        return None
    config = read_json(path / HEAD_CONFIG, LIBRARY)
    return Head(config, read_tensors(path, HEAD_TENSORS, HEAD_PICKLE), Place(str(path / HEAD_CONFIG)))


def sorted_parts(tensors: Mapping[str, Stored], name: str, place: Place) -> tuple[Part, ...]:
    """Tensors by the module and the kind that their names say.

    Raises:
        PeltError: E433 names that say none.
    """
    form = re.compile(rf"(?:(?P<module>.+?)\.)?(?P<kind>{'|'.join(KINDS)})\.{re.escape(name)}\.(?P<rest>.+)")
    found: dict[tuple[str, str], Part] = {}
    left = []
    for full, stored in tensors.items():
        match = form.fullmatch(full) if len(full) < 1000 else None
        if match is None:
            left.append(full)
            continue
        key = match["module"] or "", match["kind"]
        found.setdefault(key, Part(*key)).tensors[match["rest"]] = stored
    if left:
        told = f"{len(left)} of the {len(tensors)} tensors are no part of '{name[:60]}': {names(left)}"
        raise fail("E433", told, place,
                   "a file each of whose tensors is used once")  # fmt: skip
    return tuple(found.values())


def named(parts: Iterable[Part]) -> str:
    """Some parts by their names."""
    return names(part.source for part in parts)
