"""Profiles: what one user of a bank of modules has of their own, hard masks packed to bits.

A profile is a safetensors file. For each attachment that mixes a bank it holds `<attachment>.masks`, bytes
[sites, masks, ⌈N/8⌉]: bit i of a row, counted from the lowest bit of the first byte, is 1 where module i takes part.
Rows follow the model's layers, masks the method's order (A, then B). Whatever else is trained (norms, gates, a head)
follows under its own name. The metadata say N, k, the normaliser, which bank the masks are over, and in a few digits
what all of it computes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peltc.compiler.adapter.mathematics import whole_digest
from peltc.compiler.adapter.mismatch import mismatches
from peltc.compiler.files.checkpoint import read_header, read_metadata
from peltc.compiler.plan.claims import Plan
from peltc.spec.diagnostics import Diagnostic, PeltError, Place, fail
from peltc.spec.specification import Attachment

Array = np.ndarray[Any, Any]
KEY, VERSION = "pelt.profile", 1
DIGITS = 16
"""Of the digest of the mathematics: a profile is small."""


@dataclass(frozen=True)
class Masks:
    """The masks of one attachment.

    Attributes:
        names: their tensors' names, one row per site: [sites][masks].
        size, k, normalise: of the bank's options.
        bank: the bank's tensors by name.
    """

    names: tuple[tuple[str, ...], ...]
    size: int
    k: int
    normalise: str
    bank: tuple[str, ...]

    def describe(self, tensors: Mapping[str, Array]) -> dict[str, Any]:
        """What a profile must agree about with the spec that reads it."""
        return {"n": self.size, "k": self.k, "normalise": self.normalise, "bank": fingerprint(self.bank, tensors)}


def fingerprint(names: tuple[str, ...], tensors: Mapping[str, Array]) -> str:
    """The SHA-256 of a bank: names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name in sorted(names):
        array: Any = np.ascontiguousarray(tensors[name], np.float32)
        digest.update(f"{name} {array.shape}".encode())
        digest.update(memoryview(array).cast("B"))
    return digest.hexdigest()


def packed(plan: Plan) -> Iterator[tuple[str, Masks]]:
    """The attachments whose masks a profile packs: those with a hard mask over a bank."""
    entries: dict[str, Attachment] = {entry.name: entry for entry in plan.spec.attach}
    for name, entry in entries.items():
        options = entry.combined.get("bank")
        if not options or options["mask"] != "hard":
            continue
        claims = [claim for claim in plan.claims if claim.attachment == name]
        rows = tuple(tuple(t.name for t in c.tensors.values() if t.part == "mask") for c in claims)
        bank = {t.name for c in claims for t in c.tensors.values() if t.part == "bank"}
        yield name, Masks(rows, options["size"], options["k"], options["normalise"], tuple(sorted(bank)))


def pack(plan: Plan, tensors: Mapping[str, Array]) -> bytes:
    """A profile's file.

    Args:
        tensors: all tensors of the plan; of masks the logits.

    Raises:
        PeltError: E211 the spec has no hard mask over a bank.
    """
    from safetensors.numpy import save

    from peltc.compiler.interpreters.numeric import top_k_mask

    found = dict(packed(plan))
    if not found:
        raise fail("E211", "the spec has no hard masks, so there is nothing to pack", Place(plan.spec.path),
                   "an attachment with `bank: {mask: hard}`", "save the adapter instead")  # fmt: skip
    content: dict[str, Array] = {}
    for name, masks in found.items():
        logits = np.stack([[tensors[mask] for mask in row] for row in masks.names])
        bits = top_k_mask(logits, masks.k).astype(np.uint8)
        content[f"{name}.masks"] = np.packbits(bits, axis=-1, bitorder="little")
    taken = {mask for masks in found.values() for row in masks.names for mask in row}
    for name, tensor in plan.tensors.items():
        if name not in taken and not tensor.source:
            content[name] = np.ascontiguousarray(tensors[name], np.float32)
    notes = {name: masks.describe(tensors) for name, masks in found.items()}
    said = {"version": VERSION, "mathematics": whole_digest(plan)[:DIGITS], "attachments": notes}
    return bytes(save(content, {KEY: json.dumps(said, separators=(",", ":"))}))


def is_profile(file: Path) -> bool:
    """Whether a safetensors file is a profile."""
    return KEY in read_metadata(file)


def read_notes(file: Path) -> tuple[dict[str, Any], Any]:
    """What a profile says of its attachments, and the digest of its mathematics; None where it has none.

    Raises:
        PeltError: E407 it says neither, or is of another version.
    """
    try:
        said = json.loads(read_metadata(file)[KEY])
        notes, version, digest = said["attachments"], said["version"], said.get("mathematics")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        notes, version, digest = None, None, None
    if not isinstance(notes, dict) or version != VERSION:
        raise fail("E407", "the profile's metadata are malformed, or of another version", Place(str(file)),
                   f"what `save_profile` wrote, version {VERSION}")  # fmt: skip
    return notes, digest


def unpack(plan: Plan, file: Path, apart: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors of a profile; a mask's logits are 1 where its bits are and 0 elsewhere, which give the same mask.

    Args:
        apart: the tensors that no weights file holds, banks among them.

    Raises:
        PeltError: E402, E403, E404 missing, left-over or misshapen tensors; E407 masks over another bank, with
            another number of ones, or of a spec that computes something else.
    """
    place, stored = Place(str(file)), read_header(file)
    notes, digest = read_notes(file)
    found: dict[str, Array] = {}
    findings: list[Diagnostic] = []
    expected = dict(packed(plan))
    for name, masks in expected.items():
        wanted = masks.describe(apart)
        if (given := notes.get(name)) != wanted:
            parts = given if isinstance(given, dict) else {}
            different = [key for key in wanted if parts.get(key) != wanted[key]]
            what = ", ".join(f"{key} {str(parts.get(key, 'missing'))[:64]}" for key in different)
            findings.append(Diagnostic("E407", f"the profile's masks for '{name}' are of another bank: {what}", place,
                                       ", ".join(f"{key} {wanted[key]}" for key in different)))  # fmt: skip
            continue
        shape = (len(masks.names), len(masks.names[0]), -(-masks.size // 8))
        tensor = stored.get(f"{name}.masks")
        if tensor is None or tensor.shape != shape or tensor.dtype != np.uint8:
            message = f"the profile's '{name}.masks' is {'missing' if tensor is None else list(tensor.shape)}"
            findings.append(Diagnostic("E404", message, place, f"bytes {list(shape)}"))
            continue
        bits = np.unpackbits(np.asarray(tensor.array()), axis=-1, bitorder="little")
        ones, spare = bits[..., : masks.size], bits[..., masks.size :]
        if spare.any() or (ones.sum(-1) != masks.k).any():
            findings.append(Diagnostic("E407", f"a mask of '{name}' does not have {masks.k} ones", place))
            continue
        for row, values in zip(masks.names, ones, strict=True):
            found |= {mask: value.astype(np.float32) for mask, value in zip(row, values, strict=True)}
    if not findings and digest is not None and digest != whole_digest(plan)[:DIGITS]:
        message = "the profile was made with other formulas, options or sites than the spec's"
        findings.append(Diagnostic("E407", message, place, "the spec that it was trained with"))
    known = {f"{name}.masks" for name in expected}
    rest = {name: t for name, t in plan.tensors.items() if not t.source and name not in found}
    left = sorted(set(stored) - known - set(plan.tensors))
    given = {name: (entry.shape, entry.dtype) for name, entry in stored.items() if name not in known}
    wrong = mismatches({name: t.shape for name, t in rest.items()} if not findings else {}, given, left, place)
    if findings or wrong:
        raise PeltError(findings + wrong)
    return found | {name: np.array(stored[name].array(), np.float32) for name in rest}
