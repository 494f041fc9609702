"""The anatomy of a model: its sites, each anchored on the parameters it touches and the graph values it reads."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from peltc.compiler.survey.grouping import columns, grouped
from peltc.spec.stacks import STACKS

if TYPE_CHECKING:
    import networkx as nx

Rows = tuple[tuple[int, int], ...]


def places_of(rows: Rows) -> np.ndarray[Any, Any]:
    """The numbers of the features in ranges [start, stop), in order."""
    return np.concatenate([np.arange(start, stop) for start, stop in rows])


HEADLESS = (
    "this class has no head; name one that has, `model: {architecture: BertForSequenceClassification}` in the spec say,"
    " or by --architecture"
)
"""What to do where a model has no head."""


@dataclass(frozen=True)
class Site:
    """A place where a module can attach.

    Attributes:
        path: its name in the reference architecture, `encoder.layers.0.attention.query`; empty for a linear map
            that has no role there.
        kind: linear, norm, attention, block, embedding, table: a linear map of ids, each of which picks a row, or
            experts: linear maps whose weights are stacked in one parameter.
        parameters: fully qualified names by role: weight, bias.
        rows: output features owned in a fused map, as ranges [start, stop) in order; None: all of them.
        sizes: `in`, `out`; `d`; `heads`, `kv_heads`, `head_dim`; `vocab`; `experts`, how many maps are stacked.
        values: names of graph values by role: what the site reads (`x`, `r`, `q`, `k`, `v`) and what it writes (`y`,
            `keys`, `values`), `h` the input of its layer, `mask` what is added to attention scores.
        anchors: where a torch module sees the same: role → a parameter whose module's input (`x`, `r`, `h`) or
            output (`y`) it is; `norm` for the block's own normalisation.
        transposed: the weight is stored [in, out]; a stacked one [experts, in, out].
        shared: paths of other sites that use the same parameters.
        ties: paths of other tables and maps whose weight is the same tensor in the model: a head's, of a table.
    """

    path: str
    kind: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    rows: Rows | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)
    anchors: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False
    shared: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()

    @property
    def layer(self) -> int | None:
        """The number of the layer that contains it."""
        found = re.search(r"(?:^|\.)layers\.(\d+)", self.path)
        return int(found.group(1)) if found else None

    @property
    def stack(self) -> str:
        """Which of the stacks it lies in, or empty."""
        head = self.path.split(".", 1)[0]
        return head if head in STACKS else ""

    @property
    def layer_path(self) -> str:
        """`encoder.layers.0`, or the path itself outside layers."""
        found = re.match(r"(?:\w+\.)?layers\.\d+", self.path)
        return found.group(0) if found else self.path

    @property
    def role(self) -> str:
        """The path without stack and layer: `attention.query`."""
        rest = self.path.removeprefix(f"{self.stack}.") if self.stack else self.path
        return re.sub(r"^layers\.\d+\.?", "", rest) or "layer"

    @property
    def name(self) -> str:
        """The path, or the weight's name where the site has no path."""
        return self.path or next(iter(self.parameters.values()), "")

    @property
    def key(self) -> str:
        """What tells it from all other sites: a table is called like the stream that leaves it."""
        return f"{self.name} (table)" if self.kind == "table" else self.name

    @property
    def reads_encoder(self) -> bool:
        """Whether the input is the encoder's states, though the site lies in the decoder."""
        return self.role in ("cross_attention.key", "cross_attention.value")

    def takes(self, kind: str) -> bool:
        """Whether methods for a kind of site can attach: a table is a linear map as well, and experts are several."""
        several = self.kind == "experts" and bool(self.values.get("product"))
        return kind == self.kind or (kind == "linear" and (self.kind == "table" or several))

    @property
    def identity(self) -> object:
        """What it is in the model's modules, whatever it is called: the same in every graph of the model."""
        if self.kind == "attention":
            return self.kind, self.anchors.get("core")
        if self.parameters:
            return self.kind, self.rows, tuple(self.parameters.items())
        where = self.anchors.get("x"), self.anchors.get("y")
        return (self.kind, self.role == "layer", where) if any(where) else self.path

    def matches(self, selector: str) -> bool:
        """Whether a selector means this site: a role (`attention.query`) or a path, both with globs. Tables, which are
        large, are meant by selectors that say `embedding` only, and experts, which are many, by those that say
        `experts`."""
        apart = {"table": "embedding", "experts": "experts"}.get(self.kind, "")
        if not self.path or apart not in selector:
            return False
        return any(fnmatch.fnmatchcase(word, selector) for word in (self.role, self.path))

    def matches_parameter(self, selector: str) -> bool:
        """Whether a parameter selector means this site's weight; `**.` matches any leading path, none included. A table
        is meant by the name of its module only, and so are experts."""
        weight = self.parameters.get("weight", "")
        if self.kind in ("table", "experts") and "*" in ".".join(selector.split(".")[-2:]):
            return False
        pattern = selector.removeprefix("**.")
        return fnmatch.fnmatchcase(weight, selector.replace("**", "*")) or (
            pattern != selector and fnmatch.fnmatchcase(weight, pattern)
        )

    @property
    def size(self) -> str:
        """The site's sizes in words."""
        sizes = self.sizes
        if self.kind == "attention":
            kv = f" / {sizes['kv_heads']}" if sizes["kv_heads"] != sizes["heads"] else ""
            return f"{sizes['heads']}{kv} heads x {sizes['head_dim']}"
        if "in" in sizes and self.kind in ("linear", "table", "embedding", "experts"):
            several = f"{sizes['experts']} x " if "experts" in sizes else ""
            return f"{several}{sizes['in']} -> {sizes['out']}"
        return str(sizes.get("d", ""))

    @property
    def held(self) -> str:
        """The site's parameters by name, and which of their rows are its own."""
        names = ", ".join(dict.fromkeys(self.parameters.values()))
        if self.rows:
            names += " rows " + ", ".join(f"{a}:{b}" for a, b in self.rows[:4]) + ", ..." * (len(self.rows) > 4)
        return names

    def row(self) -> dict[str, Any]:
        """The site as `pelt sites --json` prints it."""
        rows: Any = None
        if self.rows is not None:
            rows = list(self.rows[0]) if len(self.rows) == 1 else [list(r) for r in self.rows]
        d = self.sizes.get("d")
        return {
            "site": self.path,
            "kind": self.kind,
            "parameters": dict(self.parameters),
            "rows": rows,
            "in": self.sizes.get("in", d),
            "out": self.sizes.get("out", d),
            **{k: v for k, v in self.sizes.items() if k not in ("in", "out")},
        }


@dataclass(frozen=True)
class Packed:
    """Weights that a checkpoint stores in blocks of small whole numbers.

    Attributes:
        method: what configs call it.
        to: the type of the numbers.
        block: how many inputs share a scale; -1 for all of them.
        weights: their names.
    """

    method: str
    to: str
    block: int
    weights: frozenset[str]


@dataclass(frozen=True)
class Anatomy:
    """All sites of a model graph, in the order of its dataflow; and which weights are stored in whole numbers."""

    sites: tuple[Site, ...]
    width: int = 0
    packed: Packed | None = None

    def __iter__(self) -> Any:
        return iter(self.sites)

    def __repr__(self) -> str:
        layers = {(site.stack, site.layer) for site in self.sites if site.layer is not None}
        return f"<Anatomy: {len(self.sites)} sites in {len(layers)} layers, width {self.width}>"

    def __str__(self) -> str:
        return "\n".join(self.told())

    def told(self, every: bool = False) -> list[str]:
        """The sites as the lines of a table.

        Args:
            every: each layer by itself, not equal ones once.
        """
        rows = [(None if every else site.layer, (site.path, site.kind, site.size, site.held)) for site in self.named]
        lines = columns([("SITE", "KIND", "SIZE", "PARAMETERS"), *grouped(rows)])
        if self.unnamed:
            lines += ["", f"{len(self.unnamed)} linear maps have no role; attach to them by `parameter:`"]
            unnamed = [(None if every else s.layer, (f"  {s.parameters['weight']}",)) for s in self.unnamed]
            lines += [row[0] for row in grouped(unnamed)]
        if not self.has_head:
            lines += ["", HEADLESS]
        return lines

    @property
    def has_head(self) -> bool:
        """Whether a map after the last layer makes the answers of a task."""
        return any(site.role == "head" or site.role.startswith("head.") for site in self.named)

    def __getitem__(self, path: str) -> Site:
        return next(site for site in self.sites if site.path == path)

    @property
    def named(self) -> tuple[Site, ...]:
        """The sites that have a role in the reference architecture."""
        return tuple(site for site in self.sites if site.path)

    @property
    def unnamed(self) -> tuple[Site, ...]:
        """Linear maps without a role; addressable by parameter."""
        return tuple(site for site in self.sites if not site.path)

    def select(self, selectors: Iterable[str]) -> tuple[Site, ...]:
        """The sites that any selector means, in the anatomy's order."""
        wanted = list(selectors)
        return tuple(site for site in self.sites if any(site.matches(s) for s in wanted))

    def roles(self) -> list[str]:
        """The distinct roles, in order."""
        return list(dict.fromkeys(site.role for site in self.named))

    def named_as(self, other: Anatomy) -> dict[str, Site]:
        """The sites of this graph by their keys in another graph of the same model. Layers that share their
        parameters are told apart by their order."""
        waiting: dict[object, list[Site]] = {}
        for site in self.sites:
            waiting.setdefault(site.identity, []).append(site)
        found = {}
        for site in other.sites:
            if same := waiting.get(site.identity):
                found[site.key] = replace(same.pop(0), path=site.path, shared=site.shared)
        return found

    def graph(self) -> nx.DiGraph:
        """The sites as a networkx graph: an edge leads from a containing site to each site within it."""
        import networkx as nx

        graph = nx.DiGraph()
        paths = {site.path for site in self.named}
        for site in self.named:
            graph.add_node(site.path, site=site)
            parts = site.path.split(".")
            above = (".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1))
            parent = next((p for p in above if p in paths), None)
            if parent:
                graph.add_edge(parent, site.path)
        return graph

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the cache."""
        return {"width": self.width, "sites": [asdict(site) for site in self.sites]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Anatomy:
        """The anatomy that `to_json` wrote."""
        sites = []
        for entry in data["sites"]:
            rows = entry["rows"]
            fixed = {"rows": tuple((a, b) for a, b in rows) if rows is not None else None}
            sites.append(Site(**{**entry, **fixed, "shared": tuple(entry["shared"]), "ties": tuple(entry["ties"])}))
        return Anatomy(tuple(sites), data["width"])
