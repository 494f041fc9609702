"""`pelt describe`: a spec's modules in the terms of PEFT-Ref, what they cost on a model, and specs side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil, prod
from pathlib import Path

from peltc.compiler.adapter.profile import packed
from peltc.compiler.files.talk import Talk, logged
from peltc.compiler.picture.drawing import draw
from peltc.compiler.picture.modules import Attached
from peltc.compiler.plan.claims import Claim, Plan
from peltc.compiler.survey.anatomy import Anatomy
from peltc.runtime.building.compile import plan_for
from peltc.spec.diagnostics import fail, nearest, one_of
from peltc.spec.interpreters.check import check_formulas
from peltc.spec.interpreters.cost import Cost
from peltc.spec.interpreters.typology import PROPERTIES, Row, row_at
from peltc.spec.recipe import recipes
from peltc.spec.specification import Attachment, Spec, load_spec

RECIPE = "recipe:"
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2}
NARROWEST = 20  # characters of a column


@dataclass(frozen=True)
class Numbers:
    """What modules cost on a model.

    Attributes:
        trained: trained values; `share` of the base's.
        unabsorbed: values stored beside the base after constant folding, were nothing absorbed.
        deployed: those that are, since a module that a weight takes in stores none; `bytes` at the base's precision.
        flops: floating-point operations per token.
        nodes: operations in the graph.
        profile: bytes of a profile's packed masks.
    """

    trained: int
    share: float
    unabsorbed: int
    deployed: int
    bytes: int
    flops: int
    nodes: int
    profile: int

    def lines(self) -> dict[str, str]:
        """The numbers in words."""
        masks = {"packed masks": f"{self.profile:,} bytes"} if self.profile else {}
        folded = ", folded into weights" if self.unabsorbed and not self.deployed else ""
        return {
            "trained parameters": f"{self.trained:,}",
            "share of the base": f"{self.share:.3%}",
            "deployed": f"{self.deployed:,}{folded}",
            "if not folded": f"{self.unabsorbed:,}",
            "bytes": f"{self.bytes:,}",
            "FLOPs per token": f"{self.flops:,}",
            "extra graph nodes": f"{self.nodes:,}",
            **masks,
        }


@dataclass(frozen=True)
class Module:
    """An attachment.

    Attributes:
        method: its method; `combinators` what wraps it.
        row: its properties in PEFT-Ref.
        numbers: what it costs, where a model is given.
        sites: where it attaches there; at `folded` of them a weight takes it in.
    """

    name: str
    method: str
    combinators: tuple[str, ...]
    row: Row
    numbers: Numbers | None = None
    sites: tuple[str, ...] = ()
    folded: int = 0

    @property
    def folds(self) -> str:
        """Whether weights take it in."""
        if self.folded in (0, len(self.sites)):
            return "folds" if self.folded else "in the graph"
        return f"folds at {self.folded} of {len(self.sites)} sites"

    @property
    def made_of(self) -> str:
        """`lora + gate`."""
        return " + ".join((self.method, *self.combinators))


@dataclass(frozen=True)
class Report:
    """A spec in the terms of PEFT-Ref; with a model also what it costs there.

    Attributes:
        total: of all modules; what several share is counted once.
        base: values of the model; `architecture` its class, `anatomy` its sites.
    """

    name: str
    modules: tuple[Module, ...]
    total: Numbers | None = None
    base: int = 0
    architecture: str = ""
    anatomy: Anatomy = field(default=Anatomy(()), repr=False)

    def to_json(self) -> dict[str, object]:
        """The report as plain data."""
        numbers = {"total": asdict(self.total), "base": self.base} if self.total else {}
        return {"name": self.name, "modules": [asdict(module) for module in self.modules], **numbers}

    def picture(self) -> str:
        """The reference architecture with the modules at their places, as an SVG document.

        Raises:
            PeltError: E501 no model was given, and it is a model that the picture shows.
        """
        if not self.total:
            raise fail("E501", "a picture shows a model with its modules, and no model is given",
                       expected="a model folder or a hub id after the spec")  # fmt: skip
        attached = [
            Attached(
                m.name,
                f"{m.made_of}, {m.folds}: {m.row['integration_form']}, {m.row['insertions']}",
                frozenset(m.sites),
            )
            for m in self.modules
        ]
        return draw(self.anatomy, f"{self.name} on {self.architecture}", attached)


def read(name: str) -> Spec:
    """A spec by its file, or the one that a shipped recipe's name stands for, with `recipe:` before it or not.

    Raises:
        PeltError: as `load_spec`; E201 there is no such recipe.
    """
    recipe = name.removeprefix(RECIPE)
    if Path(name).is_file() or (recipe == name and recipe not in recipes()):
        return load_spec(name)
    if recipe not in recipes():
        raise fail("E201", f"there is no recipe '{recipe}'", None, one_of([*recipes()]), nearest(recipe, recipes()))
    return load_spec({"pelt": 1, "name": recipe, "attach": [{"recipe": recipe}]})


def describe(
    spec: Spec,
    model: str | Path | None = None,
    *,
    architecture: str | None = None,
    text_only: bool = False,
    talk: Talk = logged,
) -> Report:
    """What a spec's modules are; with a model, how many and at what cost.

    Raises:
        PeltError: formulas that do not fit (E310); what is wrong with the model or keeps the spec from fitting it.
    """
    check_formulas(spec)
    if model is None:
        return Report(spec.name, tuple(_module(entry, _row(entry, spec)) for entry in spec.attach))
    plan, base = plan_for(spec, model, architecture=architecture, text_only=text_only, talk=talk)
    size = base.size
    width = WIDTHS.get(base.precision, 4)
    stacks = {site.stack for site in base.anatomy if site.stack}
    only = f"{stacks.pop()}." if len(stacks) == 1 else ""  # goes without saying
    modules = []
    for entry in spec.attach:
        claims = [claim for claim in plan.claims if claim.attachment == entry.name]
        row = _row(entry, spec, [claim.site.path.removeprefix(only) for claim in claims])
        if any(claim in plan.held for claim in claims):
            row["inter_connectivity"] += ", of the prompt while tokens are generated"
        numbers = _numbers(plan, claims, size, width, entry.name)
        folded = sum(bool(claim.absorbed) for claim in claims)
        modules.append(_module(entry, row, numbers, tuple(claim.site.name for claim in claims), folded))
    total = _numbers(plan, plan.claims, size, width)
    return Report(spec.name, tuple(modules), total, size, base.architecture, base.anatomy)


def _module(
    entry: Attachment, row: Row, numbers: Numbers | None = None, sites: tuple[str, ...] = (), folded: int = 0
) -> Module:
    return Module(entry.name, entry.method.name, tuple(entry.combined), row, numbers, sites, folded)


def _row(entry: Attachment, spec: Spec, sites: Sequence[str] | None = None) -> Row:
    """An attachment's row, with what it shares with others of the spec."""
    row = row_at(entry, sites)
    owned = {(p.owner, p.name) for p in entry.method.parameters if p.owner}
    for other in spec.attach:
        common = [p.name for p in other.method.parameters if (p.owner, p.name) in owned and other is not entry]
        if common:
            row["parameter_sharing"] += f"; {', '.join(common)} shared with {other.name}"
    return row


def _numbers(plan: Plan, claims: Sequence[Claim], base: int, width: int, name: str = "") -> Numbers:
    """What claims cost together: those of the attachment of a name, or all."""
    tensors = {tensor.name: tensor for claim in claims for tensor in claim.tensors.values()}
    trained = sum(prod(tensor.shape) for tensor in tensors.values() if not tensor.frozen)
    cost = sum((claim.cost for claim in claims), Cost())
    unabsorbed = sum(replace(claim, absorbed="").cost.stored for claim in claims)
    masks = [found for attachment, found in packed(plan) if attachment == (name or attachment)]
    profile = sum(len(row) * ceil(found.size / 8) for found in masks for row in found.names)
    return Numbers(trained, trained / max(base, 1), unabsorbed, cost.stored, cost.bytes(width), cost.flops, cost.nodes,
                   profile)  # fmt: skip


# in words

Cells = Mapping[str, Sequence[str]]
"""A column: the paragraphs of each of its cells, by what they tell; its heading by no word."""


def told(reports: Sequence[Report], width: int) -> str:
    """One report with its modules side by side, or several reports side by side.

    Args:
        width: of the terminal, in characters.
    """
    if len(reports) == 1:
        (report,) = reports
        columns = [{"": [module.name], **_of_module(module)} for module in report.modules]
        if report.total and len(columns) > 1:
            columns.append({"": ["all"], **{what: [text] for what, text in report.total.lines().items()}})
    else:
        columns = [{"": [report.name], **_of_report(report)} for report in reports]
    lines = [*_bands(columns, width)]
    if size := reports[0].base:
        names = ", ".join(report.name for report in reports)
        lines = [textwrap.fill(f"{names}, on a base of {size:,} parameters", width), "", *lines]
    return "\n".join(lines)


def _of_module(module: Module) -> Cells:
    """A module's cells."""
    numbers = module.numbers.lines() if module.numbers else {}
    words = {"method": module.made_of, **numbers, **{PROPERTIES[key]: text for key, text in module.row.items()}}
    return {what: [text] for what, text in words.items()}


def _of_report(report: Report) -> Cells:
    """A report's cells: what all modules have in common once, else each group of modules that agree; of numbers first
    the total."""
    columns = {module.name: _of_module(module) for module in report.modules}
    totals = report.total.lines() if report.total else {}
    cells: dict[str, list[str]] = {}
    for what in dict.fromkeys(what for column in columns.values() for what in column):
        groups: dict[str, list[str]] = {}
        for name, column in columns.items():
            if what in column:
                groups.setdefault(column[what][0], []).append(name)
        each = [f"{text} [{', '.join(names)}]" for text, names in groups.items()]
        alike = len(groups) == 1 and (len(columns) == 1 or what not in totals)
        cells[what] = [*groups] if alike else [totals[what], *each] if what in totals else each
    cells["method"] = [m.made_of if m.name == m.method else f"{m.name}: {m.made_of}" for m in report.modules]
    return cells


def _bands(columns: Sequence[Cells], width: int) -> Iterator[str]:
    """The lines of a table, its columns in bands that are as wide as the terminal at most."""
    labels = list(dict.fromkeys(what for cells in columns for what in cells))
    margin = max(map(len, labels)) + 2
    fitting = max(1, (width - margin) // (NARROWEST + 2))
    for start in range(0, len(columns), fitting):
        band = columns[start : start + fitting]
        widths = _widths([_widest(cells) for cells in band], width - margin)
        if start:
            yield ""
        for label in labels:
            wrapped = [_wrapped(cells.get(label, ()), size) for cells, size in zip(band, widths, strict=True)]
            for i in range(max(map(len, wrapped))):
                line = (lines[i] if i < len(lines) else "" for lines in wrapped)
                words = "  ".join(map(str.ljust, line, widths))
                yield f"{'' if i else label:{margin}}{words}".rstrip()


def _wrapped(paragraphs: Sequence[str], width: int) -> list[str]:
    def lines(text: str) -> list[str]:
        return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)

    return [line for text in paragraphs for line in lines(text)]


def _widest(cells: Cells) -> int:
    return max(len(text) for paragraphs in cells.values() for text in paragraphs)


def _widths(wanted: Sequence[int], room: int) -> list[int]:
    """Widths of columns: what each wants, and where that is too much, an equal share of what the others leave."""
    room -= 2 * (len(wanted) - 1)
    limit = max(wanted)
    while sum(min(size, limit) for size in wanted) > room and limit > NARROWEST:
        limit -= 1
    return [min(size, limit) for size in wanted]
