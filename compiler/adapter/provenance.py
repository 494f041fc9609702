"""What an adapter's file says of how it was trained: the mathematics, and the base. Written into the metadata of the
safetensors file by who saves it, held against the spec and the base by who reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peltc.compiler.adapter.identity import BaseRecord, Read
from peltc.compiler.adapter.mathematics import Array, Mathematics, ReadTensor, Trained, mathematics
from peltc.compiler.adapter.profile import is_profile, read_notes
from peltc.compiler.adapter.weights import inside
from peltc.compiler.files.checkpoint import StoredTensor, read_header, read_metadata
from peltc.compiler.plan.claims import Plan, Tensor
from peltc.spec.diagnostics import Diagnostic, PeltError, Place, fail
from peltc.spec.formula.syntax import shown
from peltc.spec.specification import Attachment

KEY, VERSION = "pelt.provenance", 1
DIGEST = "mathematics_sha256"
"""What the digest is called in the state of a torch model with modules attached."""
MAX_CHARACTERS = 1 << 20
MAX_SHOWN = 3
EXPECTED = "the mathematics that the weights were trained with"


@dataclass(frozen=True)
class Provenance:
    """How an adapter was trained. `digest` is the mathematics', which alone is kept where the whole is too long."""

    mathematics: Mathematics | None
    digest: str
    base: BaseRecord

    def metadata(self) -> dict[str, str]:
        """The metadata of a safetensors file, of bounded size."""
        data = {"version": VERSION, "digest": self.digest, "base": self.base.to_json()}
        if self.mathematics is not None:
            data["mathematics"] = self.mathematics.to_json()
        text = _dump(data)
        for long in ("mathematics", "labels"):
            if len(text) > MAX_CHARACTERS:
                data.pop(long, None)
                data["base"] = replace(self.base, labels=()).to_json() if long == "labels" else data["base"]
                text = _dump(data)
        return {KEY: text}


def _dump(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"))


def provenance(mathematics: Mathematics, base: BaseRecord) -> Provenance:
    """The provenance of an adapter trained with these mathematics on this base."""
    return Provenance(mathematics, mathematics.digest, base)


def read_provenance(file: Path) -> Provenance | None:
    """What a file says of how it was trained; None where it says nothing.

    Raises:
        PeltError: E401 no safetensors file; E409 what it says is malformed, or of another version.
    """
    text = read_metadata(file).get(KEY)
    if text is None:
        return None
    expected = f"what `save_adapter` wrote, version {VERSION}"
    hint = "save the adapter again"
    try:
        if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
            raise ValueError("too long")
        data = json.loads(text)
        version = data["version"]
        if version != VERSION or isinstance(version, bool):
            raise fail("E409", f"the file's provenance is of version {shown(str(version))}", Place(str(file)), expected,
                       hint)  # fmt: skip
        found = Mathematics.from_json(data["mathematics"]) if "mathematics" in data else None
        digest = data["digest"]
        if not isinstance(digest, str) or (found is not None and found.digest != digest):
            raise ValueError("the digest is another")
        return Provenance(found, digest, BaseRecord.from_json(data["base"]))
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError, RecursionError):
        raise fail("E409", "the file's provenance, in its metadata, is malformed", Place(str(file)), expected,
                   hint) from None  # fmt: skip


def check_file(plan: Plan, file: Path, here: BaseRecord, read: Read) -> list[str]:
    """Hold what a weights file says of itself against a plan and a base.

    Args:
        here: class and name of the base at hand; `read` its parameters.

    Returns:
        What the user should know, a sentence each.

    Raises:
        PeltError: E401, E409 the file; E408 it was trained with other mathematics.
    """
    if is_profile(file):  # which is held against the plan when it is unpacked
        return [silent_about(file)] if read_notes(file)[1] is None else []
    said = read_provenance(file)
    if said is None:
        return [silent_about(file)]
    own = mathematics(plan, frozenset(read_header(file)), from_files(plan))
    if own.digest != said.digest:
        raise PeltError(other_mathematics(plan, f"'{file.name}'", said.mathematics, own))
    return [f"'{file.name}': {sentence}" for sentence in said.base.differences(here, read)]


def from_files(plan: Plan) -> ReadTensor:
    """Reads tensors of the files that a plan's spec names.

    Raises:
        PeltError: E401, E406 such a file cannot be read.
    """
    headers: dict[str, Mapping[str, StoredTensor]] = {}

    def read(tensor: Tensor) -> Array | None:
        if tensor.source not in headers:
            file = inside(plan.spec.folder, tensor.source, plan.spec.path, "bank.file")
            headers[tensor.source] = read_header(file)
        stored = headers[tensor.source].get(tensor.name)
        return None if stored is None else stored.array()

    return read


def silent_about(file: Path) -> str:
    """The warning about a file without provenance."""
    return (
        f"'{file.name}' says nothing of how it was trained, so that options and base are taken on trust;"
        f" `save_adapter` writes it down"
    )


def other_mathematics(plan: Plan, whose: str, trained: Mathematics | None, own: Mathematics | None) -> list[Diagnostic]:
    """The findings about weights that were trained with other mathematics than a plan's.

    Args:
        whose: what holds the weights, for messages.
        trained: theirs; None where the digest alone is known.
        own: the plan's; None likewise.
    """
    entries = {entry.name: entry for entry in plan.spec.attach}
    found = []
    for difference in differences(trained, own) if trained is not None and own is not None else ():
        entry = entries.get(difference.attachment)
        place = _place(plan, entry, difference.key)
        message = f"{whose} was trained with {difference.trained}; the spec says {difference.here}"
        mend = difference.mend
        if entry is not None and entry.recipe and mend.startswith("say `"):
            mend = f"choose the options of the recipe '{entry.recipe}' that {mend}"
        found.append(Diagnostic("E408", message, place, EXPECTED, f"{mend}, or train again"))
    return found or [
        Diagnostic("E408", f"{whose} was trained with other formulas, options or sites than the spec's",
                   Place(plan.spec.path), EXPECTED,
                   "take the spec that it was trained with, or train again")
    ]  # fmt: skip


def _place(plan: Plan, entry: Attachment | None, key: str) -> Place:
    if key == "seed" or entry is None:
        return plan.spec.places.get(key or "attach", Place(plan.spec.path))
    return entry.places.get(key, entry.place)


@dataclass(frozen=True)
class Difference:
    """One kind of difference: what the weights were trained with, what is said here, what to write instead."""

    attachment: str
    trained: str
    here: str
    mend: str
    key: str = ""


def differences(trained: Mathematics, own: Mathematics) -> Iterator[Difference]:
    """What distinguishes two mathematics, one difference per kind and attachment."""
    ours, theirs = own.attachments, trained.attachments
    if set(ours) != set(theirs):
        yield Difference("", f"the attachments {_quoted(theirs)}", _quoted(ours), "attach the same, by the same names")
    for name in ours:
        if name in theirs:
            yield from _apart(name, theirs[name], ours[name])
    if trained.seed != own.seed:
        a, b = ("no start values that a seed decides" if m.seed is None else f"seed {m.seed}" for m in (trained, own))
        yield Difference("", a, b, f"say `seed: {trained.seed}`", "seed")
    for name in ours:
        if name in theirs and trained.files.get(name) != own.files.get(name):
            kinds = ["values of another file" if name in m.files else "no file" for m in (trained, own)]
            here = f"'{name}' reads values that it did not then" if name in own.files else kinds[1]
            yield Difference(name, f"{kinds[0]} for '{name}'", here, "name the file that it was trained with", "bank")
    if trained.order != own.order and set(ours) == set(theirs):
        a, b = (shown(" and ".join(m.order) or "none in which they depend on it") for m in (trained, own))
        yield Difference("", f"attachments in the order {a}", b, "give them that order", "attach")


def _apart(name: str, theirs: Trained, ours: Trained) -> Iterator[Difference]:
    """The differences between two attachments of one name: their sites; options, or else formulas."""
    if (theirs.sites, theirs.variants) == (ours.sites, ours.variants):
        return
    if theirs.sites != ours.sites:
        yield Difference(name, f"'{name}' at {_listed(theirs.sites)}", f"at {_listed(ours.sites)}", "attach it there",
                         "at")  # fmt: skip
        if _computed(theirs) == _computed(ours):
            return
    known = [key for key in {**theirs.options, **ours.options} if theirs.options.get(key) != ours.options.get(key)]
    if known:
        a, b = (", ".join(f"{key} {_value(entry.options.get(key))}" for key in known) for entry in (theirs, ours))
        mend = "say `" + ", ".join(_key(key, theirs.options.get(key)) for key in known) + "`"
        yield Difference(name, f"{a} in '{name}'", b, mend, known[0].partition(".")[0])
    elif theirs.sites == ours.sites:
        yield _formulas(name, theirs, ours)


def _computed(entry: Trained) -> list[tuple[Mapping[str, str], Mapping[str, str]]]:
    return [(variant.formulas, variant.parameters) for variant in entry.variants]


def _formulas(name: str, theirs: Trained, ours: Trained) -> Difference:
    """The first formula or tensor that differs."""
    for a, b in zip(theirs.variants, ours.variants, strict=False):
        for one, other in ((a.formulas, b.formulas), (a.parameters, b.parameters)):
            for key in {**one, **other}:
                if (then := one.get(key)) != (now := other.get(key)):
                    texts = (f"{key} = {shown(text)}" if text is not None else f"no {key}" for text in (then, now))
                    return Difference(
                        name, f"{next(texts)} in '{name}'", next(texts), f"take {theirs.method} as it was"
                    )
    return Difference(name, f"other options of '{name}' at some of its sites", "others", "give them as they were")


def _key(key: str, value: Any) -> str:
    combinator, _, option = key.rpartition(".")
    said = f"{option}: {_value(value)}"
    return f"{combinator}: {{{said}}}" if combinator else said


def _value(value: Any) -> str:
    if value is None:
        return "none"
    word = str(value).lower() if isinstance(value, bool) else str(value) or "''"
    return str(shown(word))


def _quoted(names: Mapping[str, Any]) -> str:
    return _listed([f"'{name}'" for name in names]) or "none"


def _listed(parts: Any) -> str:
    found = [shown(part) for part in parts]
    more = f" and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
    return ", ".join(found[:MAX_SHOWN]) + more
