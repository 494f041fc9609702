"""A spec: which methods attach where. Frozen, printable, comparable; read with `load_spec`."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peltc.spec.combinators import COMBINATORS
from peltc.spec.diagnostics import NOWHERE, Diagnostic, PeltError, Place, fail, nearest, one_of, wrong_type
from peltc.spec.document import Document, dump, parse, read
from peltc.spec.foreign import refuse
from peltc.spec.method import Method, shipped
from peltc.spec.modes import ANY, PACKED, PROVIDERS
from peltc.spec.own import held, own_methods, own_recipes
from peltc.spec.quantising import Quantise, quantise_of
from peltc.spec.recipe import Recipe, recipes
from peltc.spec.schema import RESERVED, spec_schema
from peltc.spec.validation import validate

MAX_LISTED = 1 << 20
"""How many whole numbers an option may list."""


@dataclass(frozen=True)
class Attachment:
    """One entry under `attach:`.

    Attributes:
        name: the first part of its tensors' names.
        method: the technique.
        at: selectors of sites, or of parameters where `by_parameter`.
        layers: `"all"`, `"last 4"`, a number, or a list of numbers and ranges.
        options: every option of the method, defaults filled in; a list gives one value per selected layer.
        expect: how many sites must match, or None.
        mode: emission mode, or None for the spec's.
        tied: whether a head that is the same tensor as a table changes `together` with it, or stays as it is: `apart`.
        after: the attachments that take effect before this one at sites that they share.
        combined: the combinators that wrap the method, with their options; `method` is what came of it.
        recipe: the recipe that it is from, or "".
        place: where it stands; `places` where the value of each of its keys does.
    """

    name: str
    method: Method
    at: tuple[str, ...]
    by_parameter: bool = False
    layers: str | int | tuple[str | int, ...] = "all"
    options: Mapping[str, Any] = field(default_factory=dict)
    expect: int | None = None
    mode: str | None = None
    tied: str = "apart"
    after: tuple[str, ...] = ()
    combined: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipe: str = ""
    place: Place = NOWHERE
    places: Mapping[str, Place] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """What a spec would say about it, recipes expanded."""
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        tied = None if self.tied == "apart" else self.tied
        after = self.after[0] if len(self.after) == 1 else list(self.after)
        said = {"expect": self.expect, "mode": self.mode, "tied": tied, "after": after or None}
        defaults, mentioned = self.method.defaults, self.method.mentions()
        options = {key: v for key, v in self.options.items() if v != defaults[key] and key in mentioned}
        return {
            "method": self.method.name,
            "name": self.name,
            "parameter" if self.by_parameter else "at": list(self.at),
            "layers": layers,
            **{key: value for key, value in said.items() if value is not None},
            **{key: list(v) if isinstance(v, tuple) else v for key, v in options.items()},
            **{name: dict(settings) for name, settings in self.combined.items()},
        }

    @property
    def formulas(self) -> Place:
        """Where the user's own files say what its method computes: at the method, if the spec brings it, and at the
        attachment where it is a shipped one."""
        return self.place if self.method.name in shipped() else self.method.place

    def at_key(self, key: str) -> Place:
        """Where the value of one of its keys stands."""
        where = Place(self.place.path, self.place.line, self.place.column, f"{self.place.key}.{key}")
        return self.places.get(key, where)


@dataclass(frozen=True)
class ModelChoice:
    """What a model is, where the config of its checkpoint does not say it.

    Attributes:
        architecture: a class of `transformers`; empty for the config's own.
        labels: the names of a classifier's classes, or their number; None for what the config says.
        vocabulary: the number of rows of the table of words; None for what the config says.
    """

    architecture: str = ""
    labels: tuple[str, ...] | int | None = None
    vocabulary: int | None = None

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The names of the classes; numbered ones where only their number is known."""
        return tuple(f"LABEL_{i}" for i in range(self.labels)) if isinstance(self.labels, int) else self.labels


AS_IT_SAYS = ModelChoice()
"""A model that is what its config says."""


@dataclass(frozen=True)
class Spec:
    """The validated description of an adaptation.

    Attributes:
        gates: when what is computed of a whole text, as gates are, is computed where the text grows: at `prefill`, from
            the prompt alone; "" for no such time.
        places: where the value of each of its keys stands.
    """

    name: str
    attach: tuple[Attachment, ...]
    model: ModelChoice = AS_IT_SAYS
    weights: str | None = None
    mode: str = "fold"
    precision: str = "checkpoint"
    provider: str = ANY
    quantise: Quantise | None = None
    freeze_gates: str = ""
    gates: str = ""
    generation: bool = False
    masks: str = PACKED
    blend: bool = False
    fewer_labels: bool = False
    seed: int = 0
    path: str = ""
    text: str = ""
    places: Mapping[str, Place] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Spec '{self.name}': {', '.join(entry.name for entry in self.attach)}>"

    def in_modes(self, modes: Mapping[str, str]) -> Spec:
        """The spec with the modes that attachments came to be in, by name, whoever said them."""
        return replace(self, attach=tuple(replace(entry, mode=modes.get(entry.name)) for entry in self.attach))

    def on(self, provider: str) -> Spec:
        """The spec of an artifact that is to run on a provider, whichever it names itself.

        Raises:
            PeltError: E113 there is no such provider.
        """
        if provider not in PROVIDERS:
            raise fail("E113", f"there is no provider '{provider}' to compile for", expected=one_of(PROVIDERS))
        return replace(self, provider=provider)

    @property
    def folder(self) -> Path:
        """Where relative paths of the spec start."""
        return Path(self.path).parent if self.path else Path()


def load_spec(source: str | Path | Mapping[str, Any]) -> Spec:
    """Read and validate a spec.

    Args:
        source: a YAML file's path, or the spec's content as a mapping.

    Raises:
        PeltError: every finding of the first stage that has any: E1xx the document, E2xx names, E3xx formulas; E216
            what is no spec; E410 another library's adapter.
    """
    refuse(source, "a spec")
    if not isinstance(source, str | Path | Mapping):
        raise wrong_type("a spec", source, "a spec's file, or its content as a mapping")
    return build_spec(parse(dump(dict(source)), "<spec>") if isinstance(source, Mapping) else read(source))


def build_spec(document: Document, text: str = "") -> Spec:
    """A spec from a parsed document.

    Args:
        text: the spec's text, where the document does not have it.

    Raises:
        PeltError: as `load_spec`.
    """
    tree = document.tree
    if not isinstance(tree, dict):
        raise fail("E112", "the spec is not a mapping", document.place(), "a mapping with the keys 'pelt' and 'attach'")
    known: Mapping[str, Method] = ChainMap(own_methods(document), shipped())  # type: ignore[arg-type]
    own = own_recipes(document, known)
    entries = tree.get("attach")
    mappings = [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
    named = [e.get(key) for e in mappings for key in ("method", "recipe")]
    bundles: Mapping[str, Recipe] = ChainMap(own, recipes())  # type: ignore[arg-type]
    try:
        validate(document, spec_schema(known, [name for name in named if isinstance(name, str)], bundles))
    except PeltError as error:
        raise PeltError(_of_other_kind(d, document, known, bundles) for d in error.diagnostics) from None
    attach = tuple(_attachments(document, known, own))
    _check_names(document, attach)
    deploy, model = tree.get("deploy") or {}, tree.get("model") or {}
    labels = model.get("labels")
    return Spec(
        name=str(tree.get("name", Path(document.path).stem or "spec")),
        attach=attach,
        model=ModelChoice(
            model.get("architecture", ""),
            tuple(labels) if isinstance(labels, list) else labels,
            model.get("vocabulary"),
        ),
        weights=tree.get("weights"),
        mode=deploy.get("mode", "fold"),
        precision=deploy.get("precision", "checkpoint"),
        provider=deploy.get("provider", ANY),
        quantise=quantise_of(deploy.get("quantise")),
        freeze_gates=deploy.get("freeze_gates", ""),
        gates=(deploy.get("gates") or {}).get("at", ""),
        generation=deploy.get("generation", False),
        masks=deploy.get("masks", PACKED),
        blend=deploy.get("blend", False),
        fewer_labels=deploy.get("fewer_labels", False),
        seed=tree.get("seed", 0),
        path=document.path if not document.path.startswith("<") else "",
        text=text or document.text,
        places={key: document.place(key) for key in tree},
    )


def _of_other_kind(
    finding: Diagnostic, document: Document, methods: Container[str], bundles: Container[str]
) -> Diagnostic:
    """The finding about an unknown method that is a recipe, or the other way round, says so."""
    found = re.fullmatch(r"attach\[(\d+)\]\.(method|recipe)", finding.place.key)
    if finding.code != "E113" or not found:
        return finding
    name = document.tree["attach"][int(found[1])][found[2]]
    other, there = ("recipe", bundles) if found[2] == "method" else ("method", methods)
    return replace(finding, hint=f"'{name}' is a {other}: `{other}: {name}`") if name in there else finding


def _attachments(
    document: Document, known: Mapping[str, Method], own_bundles: Mapping[str, Recipe]
) -> Iterator[Attachment]:
    """What stands under `attach:`, recipes expanded.

    Args:
        own_bundles: the spec's own recipes, whose attachments are checked as they come, with the options given.

    Raises:
        PeltError: every finding about combinators, and about what an own recipe makes of its options.
    """
    findings: list[Diagnostic] = []
    for i, entry in enumerate(document.tree["attach"]):
        own = {key: document.place("attach", i, key) for key in entry}
        expanded = [(entry, {key: key for key in entry})]
        if "recipe" in entry:
            expanded = (own_bundles.get(entry["recipe"]) or recipes()[entry["recipe"]]).expand(entry)
        for said, origins in expanded:
            places = {key: own[origin] for key, origin in origins.items()}
            if entry.get("recipe") in own_bundles:
                findings.extend(wrong := held(said, known, document.place("attach", i), places))
                if wrong:
                    continue
            try:
                yield _attachment(said, known, document.place("attach", i), places, entry.get("recipe", ""))
            except PeltError as error:
                findings.extend(error.diagnostics)
    if findings:
        raise PeltError(findings)


def _attachment(
    entry: Mapping[str, Any], known: Mapping[str, Method], place: Place, places: Mapping[str, Place], recipe: str
) -> Attachment:
    method = known[entry["method"]]
    selector = entry.get("at", entry.get("parameter"))
    layers = entry.get("layers", "all")
    options = {**method.defaults, **{k: v for k, v in entry.items() if k not in RESERVED}}
    for option in method.options:
        if option.listed:
            options[option.name] = numbers(options[option.name], places.get(option.name, place))
    method, combined = combine(method, options, entry, place, places, recipe)
    return Attachment(
        name=entry.get("name", method.name),
        method=method,
        at=_listed(selector),
        by_parameter="parameter" in entry and "at" not in entry,
        layers=tuple(layers) if isinstance(layers, list) else layers,
        options=options,
        expect=entry.get("expect"),
        mode=entry.get("mode"),
        tied=entry.get("tied", "apart"),
        after=_listed(entry.get("after")),
        combined=combined,
        recipe=recipe,
        place=place,
        places=places,
    )


def numbers(said: Iterable[int | str], place: Place) -> tuple[int, ...]:
    """Whole numbers, of a list of such and of ranges `a-b`, which hold both ends.

    Raises:
        PeltError: E114 a range that runs backwards, or more numbers than a table has rows.
    """
    found: list[int] = []
    for item in said:
        first, _, last = str(item).partition("-")
        start, stop = int(first), int(last or first)
        if stop < start or stop - start + len(found) >= MAX_LISTED:
            raise fail(
                "E114", f"{item} is out of range", place, f"a range 'a-b', a not above b, of at most {MAX_LISTED:,}"
            )
        found.extend(range(start, stop + 1))
    return tuple(dict.fromkeys(found))


def _listed(said: Any) -> tuple[str, ...]:
    """A name, a list of names, or nothing, as names."""
    return (said,) if isinstance(said, str) else tuple(said or ())


def combine(
    method: Method,
    options: Mapping[str, Any],
    entry: Mapping[str, Any],
    place: Place,
    places: Mapping[str, Place],
    recipe: str = "",
) -> tuple[Method, dict[str, dict[str, Any]]]:
    """A method wrapped as an entry says, and each combinator's options.

    Raises:
        PeltError: E211 combinators that do not go with the method, or with each other.
    """
    used = {name: entry[name] for name in COMBINATORS if entry.get(name) not in (None, False)}
    combined: dict[str, dict[str, Any]] = {}
    if used:
        method = method.chosen({key: value for key, value in options.items() if not isinstance(value, list)})
    for name, said in used.items():
        combinator, where = COMBINATORS[name], places.get(name, place)
        for other, reason in (combinator.excludes or {}).items():
            if other in used:
                raise fail("E211", f"`{name}:` and `{other}:` do not go together: {reason}", where, "one of them")
        combined[name] = combinator.defaults | (said if isinstance(said, dict) else {})
        rewritten = combinator.rewrite(method, combined[name], where)
        if not recipe:
            check_options(name, method, rewritten, entry, where)
        method = rewritten
    return method, combined


def check_options(name: str, before: Method, after: Method, entry: Mapping[str, Any], place: Place) -> None:
    """Refuse an option that a spec gives and that a combinator has made meaningless.

    Raises:
        PeltError: E211.
    """
    for option in before.options:
        if option.name in entry and option.name in before.mentions() and option.name not in after.mentions():
            raise fail("E211", f"`{name}:` takes the place of '{option.name}', which is given too", place,
                       "one of them", "`replaces_scale: false` keeps both" if name == "gate" else "")  # fmt: skip


def _check_names(document: Document, attach: tuple[Attachment, ...]) -> None:
    findings, seen = [], dict[str, int]()
    for i, entry in enumerate(attach):
        for name in entry.after:
            if name not in seen:
                place = entry.at_key("after")
                message = f"no attachment '{name}' stands before this one"
                expected = one_of(list(seen)) if seen else "the name of an earlier attachment; this is the first"
                findings.append(Diagnostic("E202", message, place, expected, nearest(name, seen)))
        if entry.name in seen:
            first = attach[seen[entry.name]].place.line
            findings.append(
                Diagnostic(
                    "E201",
                    f"two attachments are called '{entry.name}', this one and that on line {first}",
                    entry.place,
                    "a name for each, since tensors are named after it",
                    f"give this one a `name:`, '{entry.name}_2' say",
                )
            )
        seen.setdefault(entry.name, i)
    if findings:
        raise PeltError(findings)
