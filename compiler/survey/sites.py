"""Discovery: from a graph's dataflow to the sites of the reference architecture. No name in the model decides.

`cores` finds attention, `blocks` the residual stream and its sub-layers; here they become layers, stacks and sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import onnx_ir as ir

from peltc.compiler.graphs.flow import Flow, Linear, Norm, last_size
from peltc.compiler.graphs.lookups import Table, find_tables, numbered
from peltc.compiler.survey.anatomy import Anatomy, Rows, Site
from peltc.compiler.survey.block import Block, Experts
from peltc.compiler.survey.blocks import find_blocks
from peltc.compiler.survey.cores import OPERANDS, find_cores
from peltc.compiler.survey.towers import Towers

ROLES = ("query", "key", "value", "output", "gate", "up", "down")
"""The order in which the maps of a block are listed; others follow."""


def survey_graph(
    model: ir.Model,
    parameters: Mapping[str, tuple[int, ...]],
    ties: Mapping[str, tuple[str, ...]] | None = None,
    senses: Mapping[str, str] | None = None,
) -> Anatomy:
    """Find the sites of a graph.

    Args:
        model: the graph; its parameters are inputs.
        parameters: their shapes by name.
        ties: other names of the same tensor, by parameter.
        senses: what each input is: image, audio, time or text; where absent, all is text.
    """
    return _Survey(Flow(model.graph, parameters), ties or {}, senses or {}).anatomy()


class _Survey:
    def __init__(self, flow: Flow, ties: Mapping[str, tuple[str, ...]], senses: Mapping[str, str]):
        self.flow, self.ties = flow, ties
        self.towers = Towers(flow, senses)
        self.claimed: set[Linear] = set()
        self.claimed_norms: set[Norm] = set()

    def anatomy(self) -> Anatomy:
        blocks = find_blocks(self.flow, find_cores(self.flow))
        blocks.sort(key=lambda b: self.flow.index(b.s))
        for block in blocks:
            self.claimed.update(block.linears.values())
        sites = list(self.sites(blocks))
        width = (last_size(blocks[0].r) or 0) if blocks else 0
        return Anatomy(tuple(_tied(_shared(sites), self.ties)), width)

    # sites

    def sites(self, blocks: list[Block]) -> Iterator[Site]:
        """All sites, in the order of the dataflow."""
        stacks = self.stacks(blocks)
        yield from self.embeddings(stacks)
        for stack, layers in stacks.items():
            several = len(stacks) > 1
            for number, layer in enumerate(layers):
                yield from self.layer(f"{stack}.layers.{number}", layer, layers, number)
            yield from self.final_norm(stack if several else "", layers)
        if self.towers.several:
            yield from self.beside(stacks)
        yield from self.tail(blocks)

    def stacks(self, blocks: list[Block]) -> dict[str, list[list[Block]]]:
        """Blocks by stack and layer. Whatever lets positions see each other within a sequence opens a layer."""
        sources = [m.x for b in blocks if b.core and b.core.cross for r, m in b.core.linears.items() if r != "query"]
        encoder = [b for b in blocks if sources and any(self.flow.depends(s, b.s) for s in sources)]
        causal = any(b.core.causal for b in blocks if b.core and not b.core.cross)
        if encoder:
            groups = {"encoder": encoder, "decoder": [b for b in blocks if b not in encoder]}
        else:
            groups = {"decoder" if causal else "encoder": blocks}
        groups = self.towers.divide(groups)
        stacks: dict[str, list[list[Block]]] = {}
        for name, members in groups.items():
            layers: list[list[Block]] = []
            opening = any(b.kind in ("attention", "mixer") for b in members)
            for block in members:
                parallel = layers and any(b.r is block.r for b in layers[-1])
                if not layers or (not parallel and (block.kind in ("attention", "mixer") or not opening)):
                    layers.append([])
                layers[-1].append(block)
            if layers:
                stacks[name] = layers
        return stacks

    def layer(self, path: str, layer: list[Block], layers: list[list[Block]], number: int) -> Iterator[Site]:
        h, end = layer[0].r, layer[-1].out
        h_anchor = self.anchor_r(layer[0])
        kinds: dict[str, int] = {}
        for block in layer:
            kinds[block.kind] = kinds.get(block.kind, 0) + 1
            kind = block.kind if kinds[block.kind] == 1 else f"{block.kind}{kinds[block.kind]}"
            common = {"h": h.name or ""}
            for role in sorted(block.linears, key=lambda r: ROLES.index(r) if r in ROLES else len(ROLES)):
                yield self.linear_site(f"{path}.{kind}.{role}", block.linears[role], block.rows[role],
                                       block.slices[role], common, h_anchor)  # fmt: skip
            for role, experts in block.experts.items():
                yield self.experts_site(f"{path}.{kind}.{role}", experts)
            if block.core is not None and block.core.linears:
                yield self.attention_site(f"{path}.{kind}", block, common, h_anchor)
            norms = {"norm": block.before or block.after or block.inside, "post_norm": block.inside, **block.norms}
            for role, norm in norms.items():
                if norm is not None and norm not in self.claimed_norms:
                    self.claimed_norms.add(norm)
                    yield self.norm_site(f"{path}.{kind}.{role}", norm)
            yield self.block_site(f"{path}.{kind}.block", block, common, h_anchor)
        width = last_size(layer[-1].s) or last_size(h) or 0
        anchors = {"h": h_anchor, "x": h_anchor}
        if layer[-1].after:
            anchors["y"] = layer[-1].after.weight
        yield Site(
            path,
            "block",
            sizes={"in": width, "out": width, "d": width},
            values={"x": h.name or "", "h": h.name or "", "y": end.name or ""},
            anchors=anchors,
        )

    @staticmethod
    def anchor_r(block: Block) -> str:
        """A parameter whose module reads the block's residual stream."""
        if block.before is not None:
            return block.before.weight
        return block.first.weight if block.first is not None and block.x is block.r else ""

    def linear_site(
        self, path: str, linear: Linear, rows: Rows | None, y: ir.Value, common: dict[str, str], h_anchor: str
    ) -> Site:
        parameters = {"weight": linear.weight} | ({"bias": linear.bias} if linear.bias else {})
        outputs = sum(b - a for a, b in rows) if rows else linear.outputs
        return Site(
            path,
            "linear",
            parameters,
            rows,
            {"in": linear.inputs, "out": outputs},
            {"x": linear.x.name or "", "y": y.name or "", "full": linear.y.name or "",
             "product": linear.node.outputs[0].name or "", **common},
            {"x": linear.weight, "y": linear.weight, "h": h_anchor},
            linear.transposed,
        )  # fmt: skip

    def experts_site(self, path: str, experts: Experts) -> Site:
        count, *rest = self.flow.parameters[experts.weight]
        stack = experts.stack
        if stack is None:
            sizes = {"experts": count, "in": rest[1], "out": rest[0]}
            return Site(path, "experts", {"weight": experts.weight}, None, sizes)
        parameters = {"weight": stack.weight} | ({"bias": stack.bias} if stack.bias else {})
        outputs = sum(b - a for a, b in experts.rows) if experts.rows else stack.outputs
        y = stack.y.name or ""
        return Site(path, "experts", parameters, experts.rows, {"experts": count, "in": stack.inputs, "out": outputs},
                    {"x": stack.x.name or "", "y": y, "full": y, "product": stack.node.outputs[0].name or ""},
                    {"x": stack.weight, "y": stack.weight}, stack.transposed)  # fmt: skip

    def attention_site(self, path: str, block: Block, common: dict[str, str], h_anchor: str) -> Site:
        core = block.core
        assert core is not None
        heads, kv_heads, head_dim = core.heads
        values = {
            "x": block.x.name, "q": core.asked.name, "k": core.read[0].name if core.read[0] else "",
            "v": core.read[1].name if core.read[1] else "", "keys": core.written[0].name if core.written[0] else "",
            "values": core.written[1].name if core.written[1] else "", "scores": core.scores.outputs[0].name,
            "context": core.context.outputs[0].name, "mask": core.mask.name if core.mask is not None else "",
            "masked": core.sum.name if core.sum is not None else "", **common,
        }  # fmt: skip
        parameters = {role: core.linears[role].weight for role in OPERANDS if role in core.linears}
        inner = parameters.get("query") or next(iter(parameters.values()))
        return Site(
            path,
            "attention",
            parameters,
            sizes={"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "d": heads * head_dim},
            values={k: v or "" for k, v in values.items()},
            anchors={"core": inner, "h": h_anchor, "x": block.first.weight if block.first else ""},
        )

    @staticmethod
    def norm_site(path: str, norm: Norm) -> Site:
        parameters = {"weight": norm.weight} | ({"bias": norm.bias} if norm.bias else {})
        return Site(path, "norm", parameters, None, {"d": norm.size},
                    {"x": norm.x.name or "", "y": norm.y.name or ""}, {"x": norm.weight, "y": norm.weight})  # fmt: skip

    def block_site(self, path: str, block: Block, common: dict[str, str], h_anchor: str) -> Site:
        first, last = block.first, block.last
        norm = block.after or block.before
        whole = self.flow.module_of(block.parameters) if block.parameters else ""
        ends = block.inside is None and last is not None and block.y is last.y
        anchors = {"x": first.weight if first else whole, "r": self.anchor_r(block), "h": h_anchor,
                   "y": block.inside.weight if block.inside else last.weight if ends and last else whole}  # fmt: skip
        values = {"x": block.x.name or "", "y": block.y.name or "", "r": block.r.name or "", **common}
        if norm is not None:
            anchors["norm"] = norm.weight
            values |= {"norm_x": norm.x.name or "", "norm_y": norm.y.name or ""}
        if ends and last is not None:
            values["linear"] = last.weight
        width = last_size(block.s) or last_size(block.r) or 0
        out = last.outputs if ends and last else width
        inputs = first.inputs if first is not None else last_size(block.x) or width
        return Site(path, "block", {}, None, {"in": inputs, "out": out, "d": out}, values, anchors)

    def embeddings(self, stacks: dict[str, list[list[Block]]]) -> Iterator[Site]:
        """The tables of token embeddings, and the whole module's output: where the stream begins."""
        for stack, layers in stacks.items():
            head = f"{stack}." if len(stacks) > 1 else ""
            start = layers[0][0].r
            behind = self.flow.ancestors(start)
            for other in stacks.values():  # what leads to another tower's layers is that tower's
                if other is not layers and self.flow.depends(start, other[-1][-1].out):
                    behind -= self.flow.ancestors(other[-1][-1].out)
            found = list(find_tables(self.flow, behind))
            tables = [(table.name, table.node) for table in found if table.role == "word"]
            last = layers[-1][-1].after  # a norm after the last layer is followed by reshapes to the input's length
            end, ender = ({"end": last.y.name or ""}, {"end": last.weight}) if last else ({}, {})
            for name, node in tables[:1]:
                vocab, width = self.flow.parameters[name]
                yield Site(f"{head}embedding.word", "embedding", {"weight": name}, None,
                           {"vocab": vocab, "d": width, "in": vocab, "out": width},
                           {"x": node.inputs[1].name or "", "y": node.outputs[0].name or "", **end},  # type: ignore[union-attr]
                           {"y": name, **ender})  # fmt: skip
            for number, table in numbered(found):
                yield self.table_site(f"{head}embedding.{table.role}{number}", table)
            for norm in self.flow.norms:
                if norm.y in behind and norm not in self.claimed_norms:
                    self.claimed_norms.add(norm)
                    yield self.norm_site(f"{head}embedding.norm", norm)
            width = last_size(start) or 0
            words = {"vocab": self.flow.parameters[tables[0][0]][0]} if tables else {}
            yield Site(f"{head}embedding", "embedding", {"weight": tables[0][0]} if tables else {}, None,
                       {"d": width, "in": width, "out": width, **words},
                       {"y": start.name or "", **end}, {"y": self.embedding_module(start), **ender})  # fmt: skip

    def table_site(self, path: str, table: Table) -> Site:
        rows, width = self.flow.parameters[table.name]
        y = table.node.outputs[0].name or ""
        return Site(path, "table", {"weight": table.name}, None, {"in": rows, "out": width, "d": width},
                    {"x": table.node.inputs[1].name or "", "y": y, "full": y, "product": y},  # type: ignore[union-attr]
                    {"y": table.name}, transposed=True)  # fmt: skip

    def embedding_module(self, start: ir.Value) -> str:
        """The module whose output begins the stream: that which owns what leads there, and nothing else; or ''."""
        behind, pending = {start}, [start]
        while pending:
            node = pending.pop().producer()
            for source in node.inputs if node is not None else ():
                if source is not None and source not in behind:
                    behind.add(source)
                    pending.append(source)
        module = self.flow.module_of(v.name for v in behind if v.name and v.name in self.flow.parameters)
        return module.removesuffix(".*")

    def final_norm(self, stack: str, layers: list[list[Block]]) -> Iterator[Site]:
        end = layers[-1][-1].out
        for norm in self.flow.norms:
            if norm not in self.claimed_norms and self.flow.unwrapped(norm.x, end):
                self.claimed_norms.add(norm)
                yield self.norm_site(f"{stack}.final_norm".lstrip("."), norm)

    def beside(self, stacks: dict[str, list[list[Block]]]) -> Iterator[Site]:
        """The maps before and after each tower: into its stream, from it to another tower, and out of it."""
        starts = {stack: layers[0][0].r for stack, layers in stacks.items()}
        ends = {stack: layers[-1][-1].out for stack, layers in stacks.items()}
        for stack in stacks:
            later = [start for other, start in starts.items() if other != stack]
            after = [
                m
                for m in self.flow.linears
                if m not in self.claimed
                and self.flow.depends(m.x, ends[stack])
                and not any(self.flow.depends(m.x, end) for other, end in ends.items() if other != stack)
            ]
            before = [
                m
                for m in self.flow.linears
                if m not in self.claimed
                and self.flow.depends(starts[stack], m.y)
                and m not in after
                and not any(self.flow.depends(m.x, end) for end in ends.values())
            ]
            into = [m for m in after if any(self.flow.depends(start, m.y) for start in later)]
            last = stack == next(reversed(stacks)) and bool(into or not self.towers.parallel)
            out = [] if last else [m for m in after if m not in into]
            for role, maps in (("embedding.projection", before), ("projector", into), ("projection", out)):
                for position, linear in enumerate(maps):
                    self.claimed.add(linear)
                    path = f"{stack}.{role}" if len(maps) == 1 else f"{stack}.{role}.{position}"
                    yield self.linear_site(path, linear, None, linear.y, {}, "")

    def tail(self, blocks: list[Block]) -> Iterator[Site]:
        """The maps before the first layer and after the last; the last of these is the head, unless its result is only
        a pooled token."""
        start, end = (blocks[0].r, blocks[-1].out) if blocks else (None, None)
        unclaimed = [m for m in self.flow.linears if m not in self.claimed]
        before = [m for m in unclaimed if start is not None and self.flow.depends(start, m.y)]
        for position, linear in enumerate(before):
            self.claimed.add(linear)
            yield self.linear_site(f"embedding.projection{f'.{position}' if position else ''}", linear, None, linear.y,
                                   {}, "")  # fmt: skip
        last = [m for m in unclaimed if end is not None and self.flow.depends(m.x, end)]
        for position, linear in enumerate(last):
            pooled = any(r.op_type == "Tanh" for r in self.flow.readers(linear.y)) and linear.outputs == linear.inputs
            final = position == len(last) - 1
            path = "pooler" if pooled else "head" if final else f"head.dense{position or ''}"
            self.claimed.add(linear)
            yield self.linear_site(path, linear, None, linear.y, {}, "")
        for norm in self.flow.norms:
            if norm not in self.claimed_norms and end is not None and self.flow.depends(norm.x, end):
                self.claimed_norms.add(norm)
                yield self.norm_site("head.norm", norm)
        for linear in self.flow.linears:
            if linear not in self.claimed:
                yield self.linear_site("", linear, None, linear.y, {}, "")


def _shared(sites: Iterable[Site]) -> list[Site]:
    """Tell each site which others use the same parameters, or lie in the same modules where it has none."""
    listed = list(sites)
    users: dict[object, list[str]] = {}
    for site in listed:
        users.setdefault(site.identity, []).append(site.path)
    result = []
    for site in listed:
        others = tuple(path for path in users[site.identity] if path != site.path)
        result.append(replace(site, shared=others) if others and site.kind != "embedding" else site)
    return result


def _tied(sites: list[Site], ties: Mapping[str, tuple[str, ...]]) -> Iterator[Site]:
    """Tell each table and each linear map which others are the same tensor in the model."""
    owners = {site.parameters["weight"]: site.path for site in sites if site.kind in ("table", "linear")}
    for site in sites:
        others = ties.get(site.parameters.get("weight", ""), ()) if site.kind in ("table", "linear") else ()
        paths = tuple(owners[name] for name in others if name in owners)
        yield replace(site, ties=paths) if paths else site
