"""Adapters that other libraries wrote, recognised by facts wherever somebody gives one: no tensor of theirs is read.

Hugging Face PEFT leaves `adapter_config.json` with a `peft_type`, and tensors called
`base_model.model.[...].lora_A.weight`; the `adapters` library leaves `adapter_config.json` with a `config` and the
model's name. A live model has torch modules of their classes in it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from peltc.spec.diagnostics import PeltError, Place, fail

PEFT, ADAPTERS = "Hugging Face PEFT", "the adapters library"
CONFIG, SETUP = "adapter_config.json", "adapter_setup.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_adapter.bin", "adapter.safetensors")
AS_TRAINED, FIXED = "as_trained", "fixed"
QUIRKS = (AS_TRAINED, FIXED)
"""What becomes of what a library computes otherwise than the method says: it is computed so here too, or not."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json", "pytorch_model.bin")
"""By which a folder with a config is a whole model's."""
CHECKPOINT = "checkpoint-"
"""How the name of a folder begins that a Trainer saved in between."""
MAX_CONFIG, MAX_HEADER, MAX_BELOW = 2**20, 2**24, 1000
OURS = {
    "LORA": "lora",
    "DORA": "dora",
    "ADALORA": "adalora",
    "IA3": "ia3",
    "LOHA": "loha",
    "LOKR": "lokr",
    "OFT": "oft",
    "VERA": "vera",
    "BOFT": "boft",
    "HRA": "hra",
    "MISS": "miss",
    "HIRA": "hira",
    "FOURIERFT": "fourierft",
    "VBLORA": "vblora",
    "RANDLORA": "randlora",
    "SHIRA": "shira",
    "ROAD": "road",
    "C3A": "c3a",
    "DELORA": "delora",
    "GRALORA": "gralora",
    "GLORA": "glora",
    "WAVEFT": "waveft",
}
"""Of PEFT's kinds, those that merge into the weights, and the method that is the same here; DoRA is an option there."""
IMPORTED = (
    "LORA", "DORA", "IA3", "LOHA", "OFT", "FOURIERFT", "SHIRA", "ROAD", "C3A", "DELORA", "GRALORA", "VBLORA",
    "RANDLORA", "PVERA", "GLORA", "WAVEFT", "ADALORA", "LOKR", "VERA", "BOFT", "HRA", "MISS", "HIRA", "BEFT",
    "LN_TUNING", "TRAINABLE_TOKENS",
    "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "CPT", "MULTITASK_PROMPT_TUNING",
)  # fmt: skip
"""Those that `pelt import` reads."""
NAMES = re.compile(r"^base_model\.model\.|\.lora_[AB]\.(\w+\.)?weight$")
"""Tensors as PEFT calls them; what it has beside modules of a model, as prompts, goes by its config."""

EXPECTED = {
    "weights": "a safetensors file that `save_adapter` wrote",
    "a spec": "a spec: YAML that says which methods attach where",
    "the model": "a checkpoint's folder or hub id, or a torch model, without another library's modules in it",
}
"""What belongs where it was given."""


@dataclass(frozen=True)
class Foreign:
    """An adapter of another library.

    Attributes:
        library: which.
        kind: what the library calls its method, or "".
        base: the model that it says it is for, or "".
    """

    library: str
    kind: str = ""
    base: str = ""

    @property
    def imported(self) -> bool:
        """Whether `pelt import` reads it; of the `adapters` library's, each says itself what of it is not read."""
        return self.library == ADAPTERS or self.kind in IMPORTED

    def refused(self, role: str, place: Place) -> PeltError:
        """The one finding about it.

        Args:
            role: what it was given as, a key of `EXPECTED`.
        """
        of = f" for '{self.base}'" if self.base else ""
        what = f"an adapter of {self.library}{f', {self.kind},' if self.kind else ''}{of} is given as {role}"
        return fail("E410", what, place, EXPECTED[role], self._hint())

    def _hint(self) -> str:
        cannot = "it cannot be imported; "
        if self.imported:
            return "`pelt import FOLDER MODEL -o spec/` makes a spec of it, and `pelt-compile FOLDER MODEL` an artifact"
        merge = "merge it in PEFT, `model.merge_and_unload().save_pretrained(folder)`, and give that folder as MODEL"
        if self.kind in OURS:
            return f"{cannot}{merge}; or write it as a spec of `{OURS[self.kind]}` and train that"
        return f"{cannot}where PEFT can, {merge}"


def recognised(given: Any) -> Foreign | None:
    """What another library's adapter is, whether a folder, one of its files, tensors by name, a config or a live model;
    None for anything else."""
    if isinstance(given, Path) or (isinstance(given, str) and given and "\n" not in given and "\0" not in given):
        try:
            return _on_disk(Path(given))
        except OSError:
            return None
    if isinstance(given, Mapping):
        return _of_config(given) or _of_names(name for name in given if isinstance(name, str))
    modules = given.modules() if callable(getattr(given, "modules", None)) else [given]
    for module in modules:
        for cls in type(module).__mro__:
            if cls.__module__.startswith("peft."):
                return _live(given)
            if cls.__module__.startswith("adapters.") and hasattr(sys.modules.get("adapters"), "AdapterConfig"):
                return Foreign(ADAPTERS)
    return None


def refuse(given: Any, role: str, place: Place | None = None) -> None:
    """Refuse another library's adapter.

    Args:
        given: whatever stands where weights, a spec or a model should.
        role: which of them, a key of `EXPECTED`.
        place: where it was named; the path itself where absent.

    Raises:
        PeltError: E410.
    """
    found = recognised(given)
    if found is not None:
        own = str(given) if isinstance(given, (str, Path)) else f"<{type(given).__name__}>"
        raise found.refused(role, place or Place(own))


def _on_disk(path: Path) -> Foreign | None:
    """A folder with an adapter and no model, or one of an adapter's files."""
    if path.is_dir():
        if (path / SETUP).is_file() and not (path / "config.json").is_file():  # its adapters lie below
            return _of_file(path / CONFIG) or _of_file(path / SETUP)
        held = holders(path)
        return _of_file(held[0] / CONFIG) if held else None
    if not path.is_file():
        return None
    if path.name == CONFIG or path.suffix == ".json":
        return _of_file(path)
    names = _of_names(_tensor_names(path))
    beside = _of_file(path.parent / CONFIG) if names or path.name in FILES else None
    return beside or names


def holders(folder: Path) -> list[Path]:
    """The folder with an adapter in it that is given, or else those right below it. PEFT leaves adapters that are not
    called `default` there, a Trainer its checkpoints, and sentence-transformers its modules; the trainer of the
    `adapters` library leaves its own below those checkpoints.

    A model's folder, which has its weights beside its config, has none.
    """
    model = (folder / "config.json").is_file()
    if model and any((folder / name).is_file() for name in WEIGHTS):
        return []
    if (folder / CONFIG).is_file():
        return [folder]
    below = [] if model else _within(folder)
    found = [path for path in below if (path / CONFIG).is_file()]
    if found:
        return found
    later = chain.from_iterable(_within(path) for path in below if path.name.startswith(CHECKPOINT))
    return [path for path in islice(later, MAX_BELOW) if (path / CONFIG).is_file()]


def _within(folder: Path) -> list[Path]:
    """The folders right below one, links elsewhere aside."""
    found = sorted(islice((path for path in folder.iterdir() if path.is_dir()), MAX_BELOW))
    return [path for path in found if path.resolve().parent == folder.resolve()]


def _of_file(file: Path) -> Foreign | None:
    """What a config file says; None where it is another's, or none."""
    try:
        if not file.is_file() or file.stat().st_size > MAX_CONFIG:
            return None
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return _of_config(said) if isinstance(said, dict) else None


def _of_config(said: Mapping[Any, Any]) -> Foreign | None:
    kind, base = said.get("peft_type"), said.get("base_model_name_or_path")
    if kind is not None:
        kind = "DORA" if said.get("use_dora") is True else getattr(kind, "value", kind)
        return Foreign(PEFT, _word(kind), _word(base))
    if isinstance(said.get("config"), Mapping) and {"model_name", "model_type", "hidden_size"} & set(said):
        return Foreign(ADAPTERS, _word(said["config"].get("architecture")), _word(said.get("model_name")))
    if isinstance(said.get("adapter_setup"), Mapping) and "version" in said:
        return Foreign(ADAPTERS, _word(said["adapter_setup"].get("type")))
    return None


def _word(value: Any) -> str:
    return value[:120] if isinstance(value, str) else ""


def _of_names(names: Iterable[str]) -> Foreign | None:
    found = [name for name in names if NAMES.search(name)]
    if not found:
        return None
    return Foreign(PEFT, "LORA" if any(".lora_A." in name for name in found) else "")


def _tensor_names(file: Path) -> list[str]:
    """The names in a safetensors file's header; none where it is no such file, or its header is very long."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, file.stat().st_size - 8):
            return []
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError):
            return []
    return [name for name in header if isinstance(name, str)] if isinstance(header, dict) else []


def _live(model: Any) -> Foreign:
    """A model with PEFT's modules in it, a config of theirs, or another of their objects."""
    configs = getattr(model, "peft_config", model)
    config = next(iter(configs.values()), None) if isinstance(configs, Mapping) else configs
    kind = getattr(config, "peft_type", None)
    return Foreign(PEFT, _word(getattr(kind, "value", kind)), _word(getattr(config, "base_model_name_or_path", None)))
