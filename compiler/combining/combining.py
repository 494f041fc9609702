"""Several adapters on one base as one spec and its tensors, site by site, so that what comes of it is planned, counted,
folded and verified like anything else."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peltc.compiler.adapter.identity import stored_record
from peltc.compiler.adapter.mathematics import mathematics
from peltc.compiler.adapter.provenance import provenance
from peltc.compiler.base.base import Base
from peltc.compiler.base.source import read_config, vocabulary_of
from peltc.compiler.combining.changes import Changes
from peltc.compiler.combining.factors import factors
from peltc.compiler.combining.rules import RULES, SUMS, THINNED, combined
from peltc.compiler.files.talk import Talk, logged
from peltc.compiler.importers.selectors import selections
from peltc.compiler.plan.planner import make_plan
from peltc.compiler.survey.anatomy import Site
from peltc.spec.diagnostics import Diagnostic, PeltError, fail, one_of
from peltc.spec.document import dump
from peltc.spec.method import shipped
from peltc.spec.specification import Spec, load_spec

Array = np.ndarray[Any, Any]
ORIGIN = "Combined from"
"""What the first line of a combined spec begins with."""
FACTORS, MATRIX, SHIFT = "change", "whole_change", "shift"
METHODS: dict[str, dict[str, Any]] = {
    FACTORS: {
        "title": "A change of a weight, as two factors",
        "site": "linear",
        "options": {"r": {"type": "integer", "minimum": 1, "default": 8, "doc": "rank"}},
        "parameters": {"A": {"shape": ["r", "in"], "init": "zeros"}, "B": {"shape": ["out", "r"], "init": "zeros"}},
        "delta": "linear(linear(x, A), B)",
    },
    MATRIX: {
        "title": "A change of a weight, as it is",
        "site": "linear",
        "parameters": {"D": {"shape": ["out", "in"], "init": "zeros"}},
        "delta": "linear(x, D)",
    },
    SHIFT: {
        "title": "A change of a bias",
        "site": "linear",
        "parameters": {"c": {"shape": ["out"], "init": "zeros"}},
        "bias": "b + c",
    },
}
"""What a combined spec is made of; it brings those that it uses."""


@dataclass(frozen=True)
class Combination:
    """How adapters are combined.

    Attributes:
        weights: a factor for each adapter.
        how: `cat`, `svd`, `ties` or `dare`.
        rank: the rank to which the result is cut.
        density: the share of values that `ties` and `dare` keep.
        seed: decides which ones `dare` keeps.
    """

    weights: tuple[float, ...]
    how: str = "cat"
    rank: int | None = None
    density: float | None = None
    seed: int = 0

    def check(self, count: int) -> None:
        """Whether it says what so many adapters need.

        Raises:
            PeltError: E435, all findings.
        """
        wrong: list[tuple[str, str]] = []
        if self.how not in RULES:
            raise fail("E435", f"there is no rule '{self.how:.40}'", expected=one_of(list(RULES)))
        if len(self.weights) != count or not np.isfinite(self.weights).all():
            wrong.append((f"{len(self.weights)} weights are given for {count} adapters", "a number for each"))
        if self.rank is not None and self.rank < 1:
            wrong.append((f"the rank is {self.rank}", "1 or more"))
        if (self.how == "svd") != (self.rank is not None) and self.how in SUMS:
            wrong.append(("`svd` cuts to a rank, and `cat` keeps the rank of the sum",
                          "a rank for `svd`, and none for `cat`"))  # fmt: skip
        if (self.how in THINNED) != (self.density is not None):
            wrong.append(("`ties` and `dare` keep a share of the values, and sums keep all",
                          "a density for `ties` and `dare`, and for no other"))  # fmt: skip
        if self.density is not None and not 0 < self.density <= 1:
            wrong.append((f"the density is {self.density}", "a share above 0 and at most 1"))
        if wrong:
            raise PeltError([Diagnostic("E435", what, expected=expected) for what, expected in wrong])


@dataclass(frozen=True)
class Combined:
    """One adapter of several.

    Attributes:
        content: the spec as plain data.
        tensors: by the spec's names, float32.
        metadata: what their file says.
        ranks: of each site whose change is kept as factors.
        errors: what cutting to a rank left out, as a share of the norm of each site's change.
        error: the same of all sites together.
        origin: one line about where it is from.
    """

    spec: Spec
    content: Mapping[str, Any]
    tensors: Mapping[str, Array]
    metadata: Mapping[str, str]
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    error: float
    origin: str

    def text(self, weights: str) -> str:
        """The spec's YAML, with where it came from."""
        return f"# {self.origin}\n{dump({**self.content, 'weights': weights})}"


@dataclass
class _Made:
    """What comes together, site by site: by form and rank the sites, and their tensors by site and parameter."""

    sites: dict[tuple[str, int], list[Site]] = field(default_factory=dict)
    tensors: dict[tuple[str, str], Array] = field(default_factory=dict)

    def add(self, form: str, site: Site, tensors: Mapping[str, Array], rank: int = 0) -> None:
        self.sites.setdefault((form, rank), []).append(site)
        self.tensors |= {(site.key, name): array for name, array in tensors.items()}


def combine(adapters: Sequence[Changes], asked: Combination, talk: Talk = logged) -> Combined:
    """Combine adapters.

    Raises:
        PeltError: E435 modules that are no changes of linear maps, two heads, or sites that one of the models lacks.
    """
    asked.check(len(adapters))
    for adapter in adapters:
        adapter.check()
    carried = heads(adapters)
    base = next((adapter for adapter in adapters if adapter.whole), adapters[0]).base
    made, ranks, errors = _Made(), dict[str, int](), dict[str, float]()
    lost = norm = 0.0
    keys = dict.fromkeys(key for adapter in adapters for key in adapter.claims)
    for number, key in enumerate(keys):
        talk(f"combining {number + 1} of {len(keys)}: {key}")
        site = site_of(adapters, base, key)
        weight, bias = _at(adapters, asked, key, site)
        size = float(np.linalg.norm(weight))
        if bias is not None and bias.any():
            made.add(SHIFT, site, {"c": bias})
        if not size:
            continue
        error = 0.0
        if (found := factors(weight, asked.rank)) is None:
            made.add(MATRIX, site, {"D": weight})
        else:
            B, A, error = found
            made.add(FACTORS, site, {"A": A, "B": B}, len(A))
            ranks[key] = len(A)
        errors[key] = error
        norm, lost = norm + size**2, lost + (error * size) ** 2
    if not made.sites and not carried:
        raise fail("E435", "nothing is left of the adapters' changes", expected="changes that do not cancel")
    content = _content(adapters, base, made, carried)
    spec = load_spec(content)
    plan = make_plan(spec, base.anatomy, base.fingerprint)
    tensors = {t.name: made.tensors[c.site.key, name] if (c.site.key, name) in made.tensors else carried[t.name]
               for c in plan.claims if not c.follows for name, t in c.tensors.items()}  # fmt: skip
    said = provenance(mathematics(plan), stored_record(base))
    parts = " + ".join(f"{w:g} {a.label}" for a, w in zip(adapters, asked.weights, strict=True))
    settings = {"rank": asked.rank, "density": asked.density, "seed": asked.seed if asked.how == "dare" else None}
    told = "".join(f", {key} {value:g}" for key, value in settings.items() if value is not None)
    origin = f"{ORIGIN} {parts}, by {asked.how}{told}"
    error = float(np.sqrt(lost / norm)) if norm else 0.0
    return Combined(spec, content, tensors, said.metadata(), ranks, errors, error, origin)


def site_of(adapters: Sequence[Changes], base: Base, key: str) -> Site:
    """The site of a model that all adapters mean, each on a class of its own of one checkpoint.

    Raises:
        PeltError: E435 the model has no such site, or another adapter's is of another tensor.
    """
    site: Site | None = next((site for site in base.anatomy if site.key == key), None)
    for adapter in adapters:
        theirs = adapter.claims[key][0].site if key in adapter.claims else None
        if theirs is not None and (site is None or not _same(base, site, adapter.base, theirs)):
            raise fail("E435", f"the {base.architecture} has not what {adapter.label} changes at {key} of a"
                               f" {adapter.base.architecture}", expected="adapters of one model")  # fmt: skip
    assert site is not None, "an adapter has it"
    return site


def _same(base: Base, site: Site, other: Base, theirs: Site) -> bool:
    stored = [b.parameters[s.parameters["weight"]].stored for b, s in ((base, site), (other, theirs))]
    return stored[0] == stored[1] and (site.rows, site.sizes) == (theirs.rows, theirs.sizes)


def _at(adapters: Sequence[Changes], asked: Combination, key: str, site: Site) -> tuple[Array, Array | None]:
    """What becomes of one site's weight and bias; an adapter that does not change it has no change there."""
    found = [adapter.at(key) if key in adapter.claims else (np.zeros((1, 1), np.float32), None) for adapter in adapters]
    shape = (site.sizes["out"], site.sizes["in"])
    weights = [np.broadcast_to(weight, shape) for weight, _ in found]
    biases = [np.zeros(shape[0], np.float32) if bias is None else bias for _, bias in found]
    seed, share = [asked.seed, zlib.crc32(key.encode())], asked.density or 1.0
    weight = combined(asked.how, weights, asked.weights, share, [*seed, 0])
    if all(bias is None for _, bias in found):
        return weight, None
    return weight, combined(asked.how, biases, asked.weights, share, [*seed, 1])


def heads(adapters: Sequence[Changes]) -> dict[str, Array]:
    """The tensors of maps that adapters put in the base's place; they are nobody's changes, and are carried over.

    Raises:
        PeltError: E435 two adapters have one of the same map that are not equal, one replaces what another changes, or
            the method is the spec's own.
    """
    found: dict[str, Array] = {}
    owner: dict[str, Changes] = {}
    for adapter in adapters:
        for key, claim in adapter.whole.items():
            tensors = {t.name: np.asarray(adapter.tensors[t.name]) for t in claim.tensors.values()}
            other = owner.setdefault(key, adapter)
            theirs = {t.name: np.asarray(other.tensors[t.name]) for t in other.whole[key].tensors.values()}
            if [a.tobytes() for a in tensors.values()] != [a.tobytes() for a in theirs.values()]:
                raise fail("E435", f"{other.label} and {adapter.label} both bring a map of their own for {key}",
                           expected="one of them, for heads are not combined")  # fmt: skip
            if clash := next((a for a in adapters if key in a.claims), None):
                raise fail("E435", f"{adapter.label} replaces {key}, which {clash.label} changes",
                           expected="one of both")  # fmt: skip
            if claim.method.name not in shipped():
                raise fail("E435", f"'{claim.method.name}' of {adapter.label} is a method of its spec's own",
                           expected="a shipped method for what is trained whole")  # fmt: skip
            if other is adapter:
                found |= tensors
    return found


def _content(adapters: Sequence[Changes], base: Base, made: _Made, carried: Mapping[str, Array]) -> dict[str, Any]:
    """The spec as plain data."""
    attach: list[dict[str, Any]] = []
    for (form, rank), sites in made.sites.items():
        every = [s for s in base.anatomy if any(s.key == own.key or s.path in own.shared for own in sites)]
        for selection in selections(every, base.anatomy):
            count = sum(other["method"] == form for other in attach)
            called = {"name": f"{form}_{count + 1}"} if count else {}
            attach.append({"method": form, **called, **selection, **({"r": rank} if form == FACTORS else {})})
    taken: set[str] = set()
    for adapter in adapters:
        for entry in adapter.plan.spec.attach:
            names = {t.name for c in adapter.whole.values() if c.attachment == entry.name for t in c.tensors.values()}
            if names and names <= set(carried) and not names & taken:
                attach.append({key: value for key, value in entry.entry().items() if key != "after"})
                taken |= names
    model: dict[str, Any] = {}
    if base.changed:
        model["architecture"] = base.architecture
        if carried and (labels := base.config.get("id2label")):
            model["labels"] = list(labels.values())
        if (rows := vocabulary_of(base.config)) != vocabulary_of(read_config(base.folder)):
            model["vocabulary"] = rows
    chosen = {"model": model} if model else {}
    used = dict.fromkeys(form for form, _ in made.sites)
    methods = {"methods": {form: METHODS[form] for form in used}} if used else {}
    return {"pelt": 1, "name": "combined", **chosen, "attach": attach, **methods}
