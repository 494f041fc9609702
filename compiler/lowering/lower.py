"""All that lowers a graph, in order: attention cores, normalisations, rotations, positions, what is computed twice, and
what lacks a kernel in half precision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from peltc.compiler.graphs.wide import hold
from peltc.compiler.lowering.activations import put_activations
from peltc.compiler.lowering.attention import OPERATION, AttentionLowering
from peltc.compiler.lowering.conditions import put_conditions
from peltc.compiler.lowering.grids import put_masks
from peltc.compiler.lowering.heads import SideBySide
from peltc.compiler.lowering.idle import leave_out
from peltc.compiler.lowering.maps import DOMAIN, put_maps
from peltc.compiler.lowering.measures import read_once
from peltc.compiler.lowering.norms import put_norms
from peltc.compiler.lowering.positions import put_positions
from peltc.compiler.lowering.products import put_products
from peltc.compiler.lowering.reading import Unread, is_core, read_core
from peltc.compiler.lowering.regrouping import regroup
from peltc.compiler.lowering.rotations import RotationLowering
from peltc.compiler.lowering.scales import put_scales
from peltc.compiler.lowering.wider import put_wider
from peltc.compiler.survey.anatomy import Site
from peltc.compiler.survey.grouping import columns, grouped

OPSET = 23
"""That of the operations that graphs are lowered to; what exporters write means the same in it."""
PIECES = "pieces"


@dataclass(frozen=True)
class Core:
    """What became of an attention core.

    Attributes:
        site: its name in the reference architecture; that of its softmax where it has none.
        operation: what computes it now, `pieces` where it stays as it was.
        reason: why it stays.
    """

    site: str
    operation: str
    reason: str = ""


@dataclass(frozen=True)
class Lowering:
    """What became of a graph.

    Attributes:
        cores: its attention cores, in order.
        before, after: how many nodes it has.
    """

    cores: tuple[Core, ...]
    before: int
    after: int

    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        cores = [{key: value for key, value in asdict(core).items() if value} for core in self.cores]
        return {"nodes_before": self.before, "nodes": self.after, "cores": cores}

    def told(self, every: bool = False) -> list[str]:
        """The same as the lines of a table.

        Args:
            every: each layer by itself, not equal ones once.
        """
        rows = []
        for core in self.cores:
            layer = None if every else Site(core.site, "attention").layer
            rows.append((layer, (core.site, core.operation, core.reason)))
        lines = columns([("SITE", "COMPUTED BY", "WHY"), *grouped(rows)])
        return [*lines, f"{self.before} nodes before, {self.after} after"]


def lower(model: ir.Model, sites: Iterable[Site] = ()) -> Lowering:
    """Put operations in the place of what a graph computes in pieces, in place; the function stays the same.

    Args:
        sites: the graph's own, for their names.
    """
    graph = model.graph
    before = len(graph)
    names = {site.values["q"]: site.path for site in sites if site.kind == "attention"}
    put_products(graph)
    put_masks(graph)
    graph.sort()
    RemoveUnusedNodesPass()(model)  # what was read before is read by nobody else
    attention, cores = AttentionLowering(graph), list[Core]()
    for node in [node for node in graph if is_core(node)]:
        name = _site_of(node, names)
        try:
            attention.put(read_core(node))
        except Unread as reason:
            cores.append(Core(name, PIECES, str(reason)))
        else:
            cores.append(Core(name, OPERATION))
    RotationLowering(graph).run()
    leave_out(graph)
    put_positions(graph)
    put_conditions(graph)
    graph.sort()
    regroup(graph)
    graph.sort()
    RemoveUnusedNodesPass()(model)  # a cache is its own only where nothing else reads it
    SideBySide(graph).run()
    put_maps(graph)
    graph.sort()
    RemoveUnusedNodesPass()(model)
    put_scales(graph)
    put_activations(graph)
    put_norms(model)
    regroup(graph)
    read_once(graph)
    graph.sort()
    RemoveUnusedNodesPass()(model)
    CommonSubexpressionEliminationPass()(model)
    hold(graph)
    graph.opset_imports[""] = OPSET
    graph.opset_imports[DOMAIN] = 1
    put_wider(model)
    return Lowering(tuple(cores), before, len(graph))


def _site_of(softmax: ir.Node, names: dict[str, str], limit: int = 60) -> str:
    """The site whose queries a softmax is of: the nearest behind it."""
    pending, seen = list(softmax.inputs), set(softmax.inputs)
    for _ in range(limit):
        if not pending:
            break
        current = pending.pop(0)
        if current is not None and current.name in names:
            return names[current.name]
        node = None if current is None else current.producer()
        for value in node.inputs if node is not None else ():
            if value not in seen:
                seen.add(value)
                pending.append(value)
    return softmax.outputs[0].name or ""
