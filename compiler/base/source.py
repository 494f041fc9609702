"""What a user names as the model: its folder, and what its config says, with what was chosen in place of that."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peltc.spec.diagnostics import Place, fail
from peltc.spec.document import SUFFIXES
from peltc.spec.foreign import refuse
from peltc.spec.specification import ModelChoice


def check_order(spec: Any, model: Any) -> None:
    """Refuse a spec and a model that stand in each other's place.

    Raises:
        PeltError: E100.
    """
    if not isinstance(spec, (str, Path)) or os.path.isfile(spec) or not isinstance(model, (str, Path, type(None))):
        return
    folder = os.path.isfile(os.path.join(spec, "config.json"))
    file = model is not None and Path(model).suffix in SUFFIXES
    if folder or file:
        what = f"'{spec}' is a model's folder" if folder else f"'{model}' is a YAML file, and '{spec}' is none"
        raise fail("E100", f"the spec and the model seem to be swapped: {what}", Place(str(spec)),
                   "first the spec, a YAML file, then the model")  # fmt: skip


def find_model(model: str | Path) -> Path:
    """The folder of a model: a local one, or a snapshot of a hub repository.

    Raises:
        PeltError: E501 neither a folder nor to be had from the hub; E410 another library's adapter.
    """
    refuse(model, "the model")
    folder = Path(model)
    if folder.is_dir():
        return folder.resolve()
    if os.path.isfile(folder):
        what = "a spec is YAML, and stands before the model" if folder.suffix in SUFFIXES else ""
        raise fail("E501", "a file is given where a model's folder is wanted", Place(str(model)),
                   "a folder with a config.json", what)  # fmt: skip
    if folder.exists() or str(model).startswith((".", "/", "~")):
        raise fail("E501", "there is no such model folder", Place(str(model)), "a folder with a config.json")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "pytorch_model*.bin"]
        folder = Path(snapshot_download(str(model), allow_patterns=patterns))
    except Exception as error:
        detail = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise fail(
            "E501",
            f"'{model}' is neither a folder nor to be had from the hub: {detail}",
            expected="a model folder, or a hub id such as 'organisation/model'",
        ) from None
    refuse(folder, "the model", Place(str(model)))
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.

    Raises:
        PeltError: E502 missing or malformed.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise fail(
            "E502", f"cannot read the model's config: {error.strerror}", Place(str(file)), "a model folder"
        ) from None
    except (ValueError, RecursionError) as error:
        raise fail("E502", f"the model's config is not JSON: {error}", Place(str(file)), "JSON") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise fail("E502", "the model's config names no model type", Place(str(file)), "a key 'model_type'")
    return config


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """How many rows the table of words has, by a model's config."""
    inner = config.get("text_config")
    found = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, Mapping) else None)
    return found if isinstance(found, int) else None


def chosen_config(config: Mapping[str, Any], architecture: str, choice: ModelChoice) -> dict[str, Any]:
    """A model's config with what was chosen in place of what it says."""
    found = {**config, "architectures": [architecture]}
    if choice.label_names is not None:
        found["id2label"] = {str(i): name for i, name in enumerate(choice.label_names)}
        found["label2id"] = {name: i for i, name in enumerate(choice.label_names)}
        found.pop("num_labels", None)
    if choice.vocabulary is not None:
        inner = found.get("text_config")
        if "vocab_size" not in found and isinstance(inner, Mapping):
            found["text_config"] = {**inner, "vocab_size": choice.vocabulary}
        else:
            found["vocab_size"] = choice.vocabulary
    return found
