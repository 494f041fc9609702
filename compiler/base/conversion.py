"""Checkpoints whose tensors are not the model's own, written once as the model has them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peltc.compiler.files.cache import BUILDING, cache_folder, writable
from peltc.compiler.files.checkpoint import DTYPES, Checkpoint, open_checkpoint
from peltc.compiler.files.staging import staging
from peltc.spec.diagnostics import Place, fail

if TYPE_CHECKING:
    pass
from peltc.compiler.base.key import key_of
from peltc.compiler.files.talk import Talk

ALIASES = "tied.json"


def safe_checkpoint(folder: Path, talk: Talk) -> tuple[Checkpoint, str]:
    """The folder's safetensors, or its pickled checkpoint converted once."""
    pickled = [*folder.glob("pytorch_model*.bin")]
    if any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")) or not pickled:
        return open_checkpoint(folder), ""
    state = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(pickled)]
    key = hashlib.sha256(json.dumps([str(folder), state]).encode()).hexdigest()[:24]
    home = cache_folder() / "weights" / key
    why = "the checkpoint is pickled (.bin)"
    if not home.is_dir():
        import torch

        writable(home.parent)
        talk(f"{why}: converting it to safetensors once")
        tensors: dict[str, Any] = {}
        for file in sorted(pickled):
            try:
                state = torch.load(file, map_location="cpu", weights_only=True)
                if odd := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
                    raise TypeError(f"'{odd[0]}' is no tensor")
                tensors |= state
            except Exception as error:
                reason = (str(error) or type(error).__name__).splitlines()[0][:200]
                raise fail("E503", f"cannot read the pickled checkpoint: {reason}", Place(str(file)),
                           "plain tensors, which `weights_only` loading accepts") from None  # fmt: skip
        _save(tensors, home)
    return open_checkpoint(home), f"{why}: converted once to {home}"


def materialise(
    folder: Path, architecture: str, checkpoint: Checkpoint, reason: str, talk: Talk
) -> tuple[Checkpoint, str]:
    """Write the parameters as the model class has them, once."""
    state = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in map(Path.resolve, checkpoint.files)]
    key = key_of(architecture, checkpoint.fingerprint, state)[:24]
    home = cache_folder() / "weights" / key
    if not home.is_dir():
        import transformers

        from peltc.compiler.export.torch_model import held

        writable(home.parent)
        talk(f"{reason}: writing the model's own tensors once")
        cls = getattr(transformers, architecture)
        model, report = cls.from_pretrained(folder, output_loading_info=True, dtype="auto")
        for name in report["missing_keys"]:  # what the architecture starts them with is nobody's
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = None
        tensors = held(model)
        first = {id(tensor): name for name, tensor in tensors.items()}
        every = {name: first[id(tensor)] for name, tensor in held(model, every=True).items()}
        aliases = {name: kept for name, kept in every.items() if name != kept}
        _save({name: tensor.detach() for name, tensor in tensors.items()}, home, aliases)
    written = open_checkpoint(home)
    aliases = json.loads((home / ALIASES).read_text(encoding="utf-8"))
    tensors = {**written.tensors, **{name: written.tensors[kept] for name, kept in aliases.items()}}
    return replace(written, tensors=tensors), f"{reason}: written once to {home}"


def _save(tensors: Mapping[str, Any], home: Path, aliases: Mapping[str, str] | None = None) -> None:
    """Write tensors into a new folder; `aliases` are other names of tied ones."""
    with staging(writable(home.parent), BUILDING) as folder:
        write_tensors(tensors, folder / "model.safetensors")
        (folder / ALIASES).write_text(json.dumps(dict(aliases or {})), encoding="utf-8")
        folder.rename(home)


def write_tensors(tensors: Mapping[str, Any], file: Path) -> None:
    """Write torch tensors as safetensors, one after the other. The library's own function needs all of them in memory
    at once, and a copy of each that shares its memory with another.

    Raises:
        PeltError: E503 a type that cannot be read back.
    """
    import torch

    names = {str(dtype): name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(
        tensors.items(), key=lambda entry: (-entry[1].element_size(), entry[0])
    )  # aligned, each by its size
    offset = 0
    for name, tensor in ordered:
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in names:
            raise fail("E503", f"the tensor '{name}' is of type {kind}", expected=", ".join(names))
        header[name] = {
            "dtype": names[kind],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
