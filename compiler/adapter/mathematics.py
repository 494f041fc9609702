"""What a plan computes, as a value: formulas with their options put in, sites, and what no weights file holds.

It is what an adapter was trained with, and what a spec must say again for the adapter to mean the same. What changes
no output is not in it: modes, precision, dropout, names of files and methods, how sites are selected.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from peltc.compiler.adapter.canonical import PLACES, Settler, text
from peltc.compiler.plan.claims import Claim, Plan, Tensor
from peltc.spec.combinators import COMBINATORS
from peltc.spec.formula.syntax import Text, names
from peltc.spec.method import START
from peltc.spec.specification import Attachment

Array = np.ndarray[Any, Any]
ReadTensor = Callable[[Tensor], Array | None]
SAMPLED = 64
"""Values of a tensor in another file by which it is known."""
_NUMBERED = re.compile(r"((?:[^.]+\.)*?)(\d+)(\..+)?$")


@dataclass(frozen=True)
class Variant:
    """Sites of an attachment where it computes one thing; `formulas` and `parameters` are texts by name."""

    sites: tuple[str, ...]
    formulas: Mapping[str, str]
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class Trained:
    """One attachment.

    Attributes:
        method: the method's name, and `options` those that its formulas read, combinators' as `bank.k`; both only
            explain, for what they decide is in the formulas.
        sites: where it acts, in order, `encoder.layers.0-11.{attention.query, attention.value}`.
    """

    method: str
    options: Mapping[str, Any]
    sites: tuple[str, ...]
    variants: tuple[Variant, ...]


@dataclass(frozen=True)
class Mathematics:
    """All attachments by name.

    Attributes:
        order: for attachments that meet and do not commute, joined by ` → `, the sites where they do.
        seed: decides start values that no file holds; None where there are none.
        files: by attachment, a digest of the values that the spec's own files hold for it.
    """

    attachments: Mapping[str, Trained]
    order: Mapping[str, tuple[str, ...]]
    seed: int | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        entries = {
            name: {
                "method": entry.method,
                "options": dict(entry.options),
                "sites": list(entry.sites),
                "variants": [{"sites": list(v.sites), "formulas": dict(v.formulas), "parameters": dict(v.parameters)}
                             for v in entry.variants],
            }
            for name, entry in self.attachments.items()
        }  # fmt: skip
        order = {who: list(where) for who, where in self.order.items()}
        return {"attachments": entries, "order": order, "seed": self.seed, "files": dict(self.files)}

    @staticmethod
    def from_json(data: Any) -> Mathematics:
        """What `to_json` gave.

        Raises:
            TypeError, KeyError, ValueError: it is something else.
        """
        attachments = {}
        for name, entry in _mapping(data["attachments"]).items():
            variants = tuple(
                Variant(_texts(v["sites"]), _table(v["formulas"]), _table(v["parameters"]))
                for v in map(_mapping, _list(entry["variants"]))
            )
            options = {key: _plain(value) for key, value in _mapping(entry["options"]).items()}
            attachments[name] = Trained(_text(entry["method"]), options, _texts(entry["sites"]), variants)
        order = {who: _texts(where) for who, where in _mapping(data["order"]).items()}
        seed = data["seed"]
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError("the seed is no number")
        return Mathematics(attachments, order, seed, _table(data["files"]))

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of all that decides the function."""
        data = self.to_json()
        for entry in data["attachments"].values():
            del entry["method"], entry["options"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def mathematics(plan: Plan, held: Collection[str] = (), read: ReadTensor = lambda tensor: None) -> Mathematics:
    """What a plan computes.

    Args:
        held: of the tensors that have a source of their own, those that the weights file holds in its place.
        read: the values of a tensor that lies in a file of the spec's own; None where it is missing there.
    """
    apart = {name: t for name, t in plan.tensors.items() if t.source and name not in held}
    found = {
        entry.name: _trained(entry, [c for c in plan.claims if c.attachment == entry.name], apart)
        for entry in plan.spec.attach
    }
    seed = plan.spec.seed if any(t.source == START for t in apart.values()) else None
    return Mathematics(found, _order(plan.claims), seed, _files(plan, apart, read))


def _trained(entry: Attachment, claims: Sequence[Claim], apart: Collection[str]) -> Trained:
    read: set[str] = set()
    settled: dict[Any, tuple[dict[str, str], dict[str, str]]] = {}
    groups: dict[str, Variant] = {}
    sites: dict[str, list[str]] = {}
    for claim in claims:
        key = tuple((n, str(v)) for n, v in claim.constants.items() if n not in PLACES), tuple(claim.effects.items())
        if key not in settled:  # most sites of an attachment differ in their place alone
            settled[key] = _formulas(claim, read), _parameters(claim, apart, read)
        formulas, parameters = settled[key]
        same = json.dumps([formulas, parameters])
        groups.setdefault(same, Variant((), formulas, parameters))
        sites.setdefault(same, []).append(claim.site.name)
    options = {name: value for name, value in entry.options.items() if name in read}
    options |= {f"{n}.{key}": value for n, settings in entry.combined.items() for key, value in settings.items()
                if key not in COMBINATORS[n].training}  # fmt: skip
    variants = tuple(replace(variant, sites=spans(sites[same])) for same, variant in groups.items())
    return Trained(entry.method.name, options, spans(claim.site.name for claim in claims), variants)


def _formulas(claim: Claim, read: set[str]) -> dict[str, str]:
    """The definitions of a claim and the bindings behind them, settled; `read` gains the options that they read."""
    settler = Settler(claim.constants)
    found = {name: settler.settle(expr) for name, expr in claim.effects.items()}
    if "prepend" in claim.effects:
        found["cut"] = Text(claim.cut)
        read |= names(claim.method.cut) if claim.method.cut is not None else set()
    if claim.takes:
        found["takes"] = Text(str(claim.takes))
        read |= names(claim.method.takes) if claim.method.takes is not None else set()
    bindings = dict(claim.method.let)
    pending = list(found.values())
    while pending:
        for name in names(pending.pop()) & set(bindings):
            if f"let {name}" not in found:
                found[f"let {name}"] = settler.settle(bindings[name])
                pending.append(found[f"let {name}"])
    read |= settler.read
    return {name: text(found[name]) for name in sorted(found)}


def _parameters(claim: Claim, apart: Collection[str], read: set[str]) -> dict[str, str]:
    """The shapes of a claim's tensors; of those that no weights file holds, what decides their values."""
    settler = Settler(claim.constants)
    found = {}
    for declared in claim.method.parameters:
        if (tensor := claim.tensors.get(declared.name)) is None:
            continue
        for axis in declared.shape:
            settler.settle(axis)
        parts = [str(list(tensor.shape)), tensor.scope if tensor.scope != "site" else ""]
        if tensor.name in apart:
            drawn = tensor.source == START
            parts.append(f"starts at {text(settler.settle(tensor.init))}" if drawn else "from a file of the spec's")
        found[declared.name] = ", ".join(filter(None, parts))
    read |= settler.read
    return dict(sorted(found.items()))


def _order(claims: Iterable[Claim]) -> dict[str, tuple[str, ...]]:
    """Which attachments meet at which sites, where their order matters. Neighbours that commute stand by name."""
    at: dict[tuple[str, str], list[Claim]] = {}
    for claim in claims:
        at.setdefault((claim.site.kind, claim.site.name), []).append(claim)
    found: dict[str, list[str]] = {}
    for (_, site), group in at.items():
        chain = list(group)
        for _ in group:
            for i in range(len(chain) - 1):
                if _commute(chain[i], chain[i + 1]) and chain[i + 1].attachment < chain[i].attachment:
                    chain[i : i + 2] = chain[i + 1], chain[i]
        if not all(_commute(one, other) for i, one in enumerate(chain) for other in chain[:i]):
            found.setdefault(" → ".join(claim.attachment for claim in chain), []).append(site)
    return {who: spans(sites) for who, sites in sorted(found.items())}


def _commute(one: Claim, other: Claim) -> bool:
    return all(set(c.effects) <= {"delta"} and "y" not in c.reads for c in (one, other))


def _files(plan: Plan, apart: Mapping[str, Tensor], read: ReadTensor) -> dict[str, str]:
    """By attachment, a digest of samples of the tensors that lie in files of the spec's own."""
    found: dict[str, str] = {}
    for entry in plan.spec.attach:
        own = {t.name: t for c in plan.claims if c.attachment == entry.name for t in c.tensors.values()}
        outside = [t for name, t in sorted(own.items()) if name in apart and t.source != START]
        digest = hashlib.sha256()
        for tensor in outside:
            if (array := read(tensor)) is not None:
                flat = array.reshape(-1)
                digest.update(tensor.name.encode() + np.asarray(flat[spread(flat.size, SAMPLED)], "<f4").tobytes())
        if outside:
            found[entry.name] = digest.hexdigest()[:16]
    return found


def whole_digest(plan: Plan) -> str:
    """The digest of what a plan computes where all its tensors are at hand, banks and start values among them."""
    return mathematics(plan, frozenset(plan.tensors)).digest


def spread(size: int, count: int) -> list[int]:
    """At most `count` places among `size`, evenly spread, the first and the last among them."""
    if size <= count:
        return list(range(size))
    return [i * (size - 1) // max(count - 1, 1) for i in range(count)]


def spans(sites: Iterable[str]) -> tuple[str, ...]:
    """Sites in order, layers that have the same ones in a row told once: `layers.0-11.{attention.query, pooler}`."""
    layers: list[tuple[str, int, list[str]]] = []
    for site in sites:
        numbered = _NUMBERED.match(site)
        prefix, number, rest = (numbered[1], int(numbered[2][:9]), numbered[3] or "") if numbered else (site, -1, "")
        if number >= 0 and layers and layers[-1][:2] == (prefix, number):
            layers[-1][2].append(rest)
        else:
            layers.append((prefix, number, [rest]))
    runs: list[tuple[str, int, int, list[str]]] = []
    for prefix, number, rests in layers:
        if runs and number >= 0 and runs[-1][0] == prefix and runs[-1][2:] == (number - 1, rests):
            runs[-1] = (prefix, runs[-1][1], number, rests)
        else:
            runs.append((prefix, number, number, rests))
    return tuple(_span(*run) for run in runs)


def _span(prefix: str, first: int, last: int, rests: Sequence[str]) -> str:
    if first < 0:
        return prefix
    numbers = f"{first}" if first == last else f"{first}-{last}"
    tails = [rest.removeprefix(".") for rest in rests]
    if len(tails) == 1:
        return f"{prefix}{numbers}{rests[0]}"
    return f"{prefix}{numbers}.{{{', '.join(tails)}}}"


def _mapping(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise TypeError("no mapping")
    return data


def _list(data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise TypeError("no list")
    return data


def _text(data: Any) -> str:
    if not isinstance(data, str):
        raise TypeError("no text")
    return data


def _texts(data: Any) -> tuple[str, ...]:
    return tuple(map(_text, _list(data)))


def _table(data: Any) -> dict[str, str]:
    return {key: _text(value) for key, value in _mapping(data).items()}


def _plain(data: Any) -> Any:
    """An option's value: a number, a word, or a list of such."""
    if isinstance(data, list):
        return [_plain(part) for part in data if not isinstance(part, list)]
    if data is not None and not isinstance(data, bool | int | float | str):
        raise TypeError("no option's value")
    return data
