"""The artifact: a folder that ONNX Runtime and `transformers` open. Written beside its place and moved there whole."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.base.base import Base
from peltc.compiler.files.checkpoint import StoredTensor
from peltc.compiler.files.integrity import check_unchanged, digest_file, stamp
from peltc.compiler.files.manifest import MANIFEST, write_manifest
from peltc.compiler.files.staging import OLD, staging, sweep
from peltc.compiler.passes.absorb import MAX_LOSS, Folded
from peltc.compiler.plan.claims import Plan
from peltc.spec.diagnostics import Place, fail

MODEL = ".model-"
"""What the names of the folders start with in which live torch modules lie for as long as a compilation takes."""
ALIGNMENT = 64
PART = 1 << 24
"""Values of a weight that are converted at a time."""
INLINE = 256
COMPANIONS = (
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
TOOLS = ("peltc", "onnx-ir", "onnxscript", "transformers", "torch", "onnxruntime", "onnxruntime-gpu")


@contextmanager
def staged(out: Path, mark: str = MANIFEST, what: str = "artifact") -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well; otherwise nothing is left behind.

    Args:
        mark: the file by which a folder that may be replaced is known.
        what: such a folder is called in messages.

    Raises:
        PeltError: E601 `out` is something else than an artifact, E602 the disk is full or not writable.
    """
    out = free(out, mark, what)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with staging(out.parent, f".{out.name}-") as folder:
            yield folder
            _exchange(folder, out)
    except OSError as error:
        raise fail("E602", f"cannot write the {what}: {error.strerror or error}", Place(str(out)),
                   "a folder that can be written, on a disk with room") from error  # fmt: skip


def tidy(out: Path) -> None:
    """Remove what killed compilations left beside an output path."""
    for prefix in (f".{out.name}-", MODEL):
        sweep(out.parent, prefix, out)


def free(out: Path, mark: str = MANIFEST, what: str = "artifact") -> Path:
    """Where an output path leads, links followed, if an artifact, or what else `mark` tells, may be written there.

    Raises:
        PeltError: E601 something is there that is no artifact, E602 the path leads nowhere.
    """
    try:
        place = out.resolve()
        taken = place.exists() and not (place.is_dir() and ((place / mark).is_file() or not any(place.iterdir())))
    except (OSError, RuntimeError) as error:
        raise fail("E602", f"cannot write the {what}: {error}", Place(str(out)), "a path to follow") from None
    if taken:
        raise fail("E601", f"the output path is taken by something that is no {what}", Place(str(out)),
                   f"a new folder, an empty one, or an {what} to replace")  # fmt: skip
    return place


def _exchange(new: Path, out: Path) -> None:
    """Put `new` at `out` in one step; what was there is at `new` then."""
    if not out.exists():
        new.rename(out)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if hasattr(libc, "renameat2") and libc.renameat2(here, os.fsencode(new), here, os.fsencode(out), swap) == 0:
        return
    aside = new.with_name(OLD)  # file systems without the exchange: two renames
    out.rename(aside)
    try:
        new.rename(out)
    except OSError:
        aside.rename(out)
        raise


def link_files(base: Base, folder: Path, copy: bool) -> list[dict[str, Any]]:
    """Bring the checkpoint's files into the folder, by hard link where possible.

    All of them, so that the folder is a model folder too and can be verified by itself.

    Raises:
        PeltError: E622 a file that changed since it was read first.
    """
    files = []
    for file in base.checkpoint.files:
        entry = link(file, folder / file.name, copy)
        found, sha256 = digest_file(file.resolve())
        check_unchanged({file: base.checkpoint.stamps.get(file, found)})
        files.append({**entry, **stamp(folder / file.name).to_json(), "sha256": sha256})
    return files


def link(file: Path, target: Path, copy: bool) -> dict[str, Any]:
    """Bring a file to a place, by hard link where possible; says how."""
    real, how = file.resolve(), "copy"
    if not copy:
        try:
            os.link(real, target)
            how = "hard link"
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
                raise
    if how == "copy":
        shutil.copyfile(real, target)
    return {"file": target.name, "bytes": real.stat().st_size, "how": how}


class DataFile:
    """The artifact's own data, `model.onnx.data`: tensors are written as they come and referenced from then on.

    Attributes:
        size: how many bytes it has.
        converted: how many of them are weights of the checkpoint in another type.
    """

    def __init__(self, file: Path):
        self.file, self.size, self.converted = file, 0, 0
        self.kept: dict[tuple[str, tuple[int, ...], str], int] = {}
        file.touch()

    def add(self, name: str, array: Any) -> ir.ExternalTensor:
        """Append a tensor, once where several graphs have it; returns the reference to it."""
        padding = -self.size % ALIGNMENT
        data: Any = np.ascontiguousarray(array)
        key = str(data.dtype), data.shape, digest(data.view(np.uint8) if data.ndim else data.tobytes())
        if key in self.kept:
            offset = self.kept[key]
        else:
            with self.file.open("ab") as stream:
                stream.write(b"\0" * padding)
                stream.write(data.view(np.uint8).data if data.ndim else data.tobytes())
            offset = self.kept[key] = self.size + padding
            self.size = offset + data.nbytes
        dtype = ir.DataType.from_numpy(data.dtype)
        return ir.ExternalTensor(self.file.name, offset, data.nbytes, dtype, shape=ir.Shape(data.shape), name=name,
                                 base_dir=self.file.parent)  # fmt: skip

    def convert(self, stored: StoredTensor, kind: ir.DataType, name: str) -> ir.ExternalTensor:
        """Append a weight of the checkpoint in another type, rounded to nearest, once for all graphs; returns the
        reference to it. It is read and written in parts, so that none is in memory whole."""
        key = (str(stored.file), (stored.offset, stored.length), kind.name)
        size = math.prod(stored.shape) * kind.numpy().itemsize
        if key not in self.kept:
            padding = -self.size % ALIGNMENT
            flat = stored.array().reshape(-1)
            with self.file.open("ab") as stream, np.errstate(over="ignore"):  # what is not finite, verification finds
                stream.write(b"\0" * padding)
                for start in range(0, flat.size, PART):
                    stream.write(flat[start : start + PART].astype(kind.numpy()).view(np.uint8).data)
            self.kept[key] = self.size + padding
            self.size += padding + size
            self.converted += size
        return ir.ExternalTensor(self.file.name, self.kept[key], size, kind, shape=ir.Shape(stored.shape), name=name,
                                 base_dir=self.file.parent)  # fmt: skip

    def take_from(self, model: ir.Model) -> None:
        """Move the graph's larger tensors here; small ones stay in the graph."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes >= INLINE:
                value.const_value = self.add(value.name or "", tensor.numpy())

    def bring(self, model: ir.Model) -> None:
        """Copy here what a graph reads from other files, one tensor after the other."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) != self.file:
                value.const_value = self.add(value.name or "", content_of(tensor))


def content_of(tensor: ir.TensorProtocol) -> Any:
    """A tensor's values, read from its file in pages; `onnx_ir` refuses files with several hard links."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    return np.memmap(tensor.path, tensor.dtype.numpy(), "r", tensor.offset or 0, tuple(tensor.shape.numpy()))


def write_artifact(
    folder: Path,
    graphs: Mapping[str, ir.Model],
    data: DataFile,
    base: Base,
    plan: Plan,
    folded: list[Folded],
    adapter: Mapping[str, str],
    weights_from: str,
    exports: Mapping[str, Mapping[str, Any]],
    copy: bool,
    limits: Mapping[str, Any],
) -> dict[str, Any]:
    """Write everything but the verification's figures; returns the manifest.

    Args:
        graphs: by name; each becomes `<name>.onnx`, and all of them share their data.
        exports: what `transformers` recorded about the export of each.
        limits: what the graph without a cache can be given.
    """
    for name, model in graphs.items():
        data.take_from(model)
        model.producer_name, model.producer_version = "peltc", metadata.version("peltc")
        model.ir_version = 10
        ir.save(model, folder / f"{name}.onnx")
    linked = [] if plan.quantised else link_files(base, folder, copy)
    for name in COMPANIONS:
        unlike = base.converted or plan.quantised
        if (base.folder / name).is_file() and not (name.endswith(".index.json") and unlike):
            shutil.copyfile(base.folder / name, folder / name)
    if base.changed:
        (folder / "config.json").write_text(json.dumps(base.config, indent=1) + "\n", encoding="utf-8")
    record = {
        "schema_version": 1,
        "export_format": "onnx",
        "components": {name: {"file": f"{name}.onnx", "metadata": exports[name]} for name in graphs},
    }
    (folder / "export.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    manifest = manifest_of(base, plan, folded, adapter, weights_from, linked, data.size)
    manifest["graphs"], manifest["limits"] = list(graphs), limits
    write_manifest(folder, manifest)
    return manifest


def manifest_of(
    base: Base,
    plan: Plan,
    folded: list[Folded],
    adapter: Mapping[str, str],
    weights_from: str,
    linked: list[dict[str, Any]],
    written: int,
) -> dict[str, Any]:
    """What the artifact is made of, as plain data; see schemas/manifest.schema.json."""
    decided = plan.to_json()
    return {
        "pelt": 1,
        "name": plan.spec.name,
        "spec": plan.spec.text,
        "base": {
            "architecture": base.architecture,
            "model_type": base.config.get("model_type"),
            "fingerprint": base.fingerprint,
            "precision": base.precision,
            "stored": str(base.checkpoint.float_dtype),
            "converted": base.converted or None,
            "inputs": base.inputs,
            "reading": base.reading.to_json() if base.reading else None,
            "text_only": base.text_only,
            "files": linked,
        },
        "weights": {"from": weights_from, "trained": decided["trained"], "tensors": {
            name: {**decided["tensors"][name], "sha256": digest} for name, digest in adapter.items()}},
        "modules": decided["claims"],
        "folded": [
            {"parameter": f.name, "claims": list(f.claims), "rounding_loss": round(f.loss, 6),
             "warning": f.loss > MAX_LOSS} for f in folded
        ],
        "bytes_written": written,
        "tools": versions(),
        "verification": None,
    }  # fmt: skip


def versions() -> dict[str, str]:
    """The versions of the tools that are installed."""
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            continue
    return found


def digest(array: Any) -> str:
    """The SHA-256 of a tensor's bytes."""
    return hashlib.sha256(memoryview(array).cast("B")).hexdigest()
