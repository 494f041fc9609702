"""The residual stream, and the sub-layers that write to it.

    r ─┬─► norm ─► x ─► maps ─► y ─► (norm, scale) ─┬─► s = r + y
       └────────────────────────────────────────────┘

A sum is residual where one of its terms depends on another through a map with parameters. Each such term is a block,
so that attention and feed-forward that are added at once are two blocks of one sum. A block with an attention core is
attention; one that mixes positions in another way (a state space, a convolution, linear attention) is a mixer; any
other is a feed-forward block, of experts where it has stacked parameters.
"""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from peltc.compiler.graphs.flow import Flow, Linear, Norm, last_size, rank
from peltc.compiler.survey.anatomy import Rows
from peltc.compiler.survey.block import Block
from peltc.compiler.survey.cores import Core
from peltc.compiler.survey.experts import find_stack, gate_and_up
from peltc.compiler.survey.owned import gated, holder, nearest_linear, owned_features
from peltc.compiler.survey.probe import ranges
from peltc.compiler.survey.stream import Stream, Term

MIXING = {"Conv", "Scan", "Loop", "CumSum", "GRU", "LSTM", "DFT"}
"""Operators that let one position see another. So does a product of two things that flow through the model, which
experts need too, to pick tokens."""


def find_blocks(flow: Flow, cores: list[Core]) -> list[Block]:
    """Every sub-layer of a graph, in the order of their sums.

    Args:
        cores: the attention cores of the graph.
    """
    return _Finder(flow, cores).blocks()


class _Finder(Stream):
    """The blocks of a graph, one for each term of the residual stream."""

    def blocks(self) -> list[Block]:
        found = []
        claimed_by_cores = {m for core in self.cores for m in core.linears.values()}
        for term in self.terms():
            block = self.attention(term) or self.other(term, claimed_by_cores)
            if block is not None:
                self.claimed.update(block.linears.values())
                self.claimed.update(experts.weight for experts in block.experts.values())
                found.append(block)
        for block in found:
            self.surround(block)
        return found

    def attention(self, term: Term) -> Block | None:
        """The block around the cores of a term; the last of several is meant."""
        cores = [c for c in self.cores if c.context.outputs[0] in term.values]
        if not cores:
            return None
        core = cores[-1]
        self.cores = [c for c in self.cores if c not in cores]
        sources = [core.linears[role] for role in ("key", "value") if role in core.linears]
        core.cross = not any(m.y in term.values or m.node.outputs[0] in term.values for m in sources)
        y, inside = self._written(term.y)
        kind = "cross_attention" if core.cross else "attention"
        start = core.linears.get("query") or sources[0]
        block = Block(kind, self._origin(start, term), y, term.r, term.s, core=core, inside=inside)
        for role, linear in core.linears.items():
            block.add(role, linear, core.rows[role], core.slices[role])
        if core.output is not None and core.output.node.outputs[0] in term.values:
            block.add("output", core.output)
        else:
            core.output = None
        self._inner(block, term)
        return block

    def other(self, term: Term, taken: set[Linear]) -> Block | None:
        """The block of a term without a core."""
        inner = [m for m in self._maps(term) if m not in self.claimed and m not in taken]
        stacks = [name for name in self._stacks(term) if name not in self.claimed]
        if not inner and not stacks:
            return None
        y, inside = self._written(term.y)
        down = self._map_of(y, inside)
        if down is not None and down not in inner:
            return None  # the end of a block that lies within this one
        nodes = {n for v in term.values if (n := v.producer()) is not None}
        first = inner[0] if inner else None
        x = self.flow.unflattened(first.x) if first else term.r
        block = Block("feed_forward", x, y, term.r, term.s, inside=inside)
        if stacks:
            self._of_experts(block, inner, stacks)
        elif any(n.op_type in MIXING or self._product(n) for n in nodes):
            block.kind = "mixer"
            self._mixer(block, inner, down)
        else:
            if down is None or len(inner) < 2:
                return None
            block.add("down", down)
            self._up_and_gate(block, [m for m in inner if m is not down], down)
        block.parameters = self._parameters(term)
        if stacks and down is None and inside is None:
            self._network(block, term, inner, stacks)
        return block

    def _network(self, block: Block, term: Term, inner: list[Linear], stacks: list[str]) -> None:
        """Let a block of experts end where a module of the model does: what the experts give may be scaled, mixed and
        convolved before it joins the stream."""
        products = [n.outputs[0] for n, name in self.flow.stacked.items() if name in stacks]
        last = max((v for v in products if v in term.values), key=self.flow.index)
        starts = list(dict.fromkeys(self.flow.unflattened(m.x) for m in inner))
        current = block.y
        while True:
            for x in starts if rank(current) == rank(block.x) else ():
                within = self._term(x, current, current)
                parameters = self._parameters(within) if within is not None else frozenset()
                if self.flow.module_of(parameters):
                    block.x, block.y, block.parameters = x, current, parameters
                    return
            node = current.producer()
            before = [v for v in node.inputs if v in self.flow.hidden and self.flow.depends(v, last)] if node else []
            if not before:
                return
            current = min((v for v in before if v is not None), key=self.flow.index)

    def _maps(self, term: Term) -> list[Linear]:
        """The linear maps of a term that depend on the stream, in order."""
        return [m for m in self.flow.linears if m.node.outputs[0] in term.values]

    def _product(self, node: ir.Node) -> bool:
        """Whether a node multiplies matrices that both flow through the model."""
        return node.op_type in ("MatMul", "Einsum") and all(v in self.flow.hidden for v in node.inputs)

    def _origin(self, linear: Linear, term: Term) -> ir.Value:
        """What the first map on the way to another reads."""
        while (before := nearest_linear(self.flow, linear.x)) is not None and before.node.outputs[0] in term.values:
            linear = before
        return linear.x

    def _inner(self, block: Block, term: Term) -> None:
        """Roles of what else an attention block is made of: the low-rank maps before queries, keys and values, the
        gate of what attention gives, and the norms of queries and keys."""
        core = block.core
        assert core is not None
        own = set(block.linears.values())
        rest = [m for m in self._maps(term) if m not in own and m not in self.claimed]
        behind = {role: self._before(m) for role, m in core.linears.items()}
        for linear in rest:
            roles = [role for role, maps in behind.items() if linear in maps]
            if roles:
                base = "key_value_down" if len(roles) > 1 else f"{roles[0]}_down"
            elif self._gates(linear, core, term):
                base = "gate"
            else:
                base = "inner"
            block.add(_free(base, block.linears), linear)
        operands = {"query": core.query, "key": core.key}
        for role, operand in operands.items():
            path = self._path(operand, core.linears[role]) if role in core.linears else set()
            for norm in (self.norm_of[v] for v in sorted(path & self.norm_of.keys(), key=self.flow.index)):
                block.norms[_free(f"{role}_norm", block.norms)] = norm

    def _gates(self, linear: Linear, core: Core, term: Term) -> bool:
        """Whether a map's result multiplies what attention gives."""
        context = core.context.outputs[0]
        for value in term.values:
            node = value.producer()
            if node is not None and node.op_type == "Mul" and self.flow.depends(value, context):
                sides = [v for v in node.inputs if v is not None and not self.flow.depends(v, context)]
                if any(nearest_linear(self.flow, v) is linear for v in sides if v in self.flow.hidden):
                    return True
        return False

    def _path(self, operand: ir.Value, linear: Linear) -> set[ir.Value]:
        """The values between a map and an operand."""
        table = self.flow.linear_of
        return {v for v in self.flow.behind(operand, lambda v: v in table) if v not in table
                and self.flow.depends(v, linear.y)}  # fmt: skip

    def _before(self, linear: Linear) -> set[Linear]:
        """The maps nearest before a map."""
        table = self.flow.linear_of
        return {table[v] for v in self.flow.behind(linear.x, lambda v: v in table) if v in table}

    def _mixer(self, block: Block, inner: list[Linear], down: Linear | None) -> None:
        """Maps that read what the block reads, those within, and the one that ends it."""
        rest = [m for m in inner if m is not down]
        groups = {"input": [m for m in rest if m.x is block.x], "inner": [m for m in rest if m.x is not block.x]}
        for base, maps in groups.items():
            for number, linear in enumerate(maps):
                block.add(base if len(maps) == 1 else f"{base}.{number}", linear)
        if down is not None:
            block.add("output", down)

    def _of_experts(self, block: Block, inner: list[Linear], stacks: list[str]) -> None:
        """The router, the experts' stacked parameters, and the network that all tokens go through beside them."""
        products = {name: [n for n, other in self.flow.stacked.items() if other == name] for name in stacks}
        first = {v for name in stacks for n in products[name] for v in n.outputs}
        later = [name for name in stacks if any(
            self.flow.depends(v, f) for n in products[name] for v in n.inputs if v is not None and v in self.flow.hidden
            for f in first if f not in n.outputs)]  # fmt: skip
        for name in stacks:
            stack = find_stack(self.flow, name, products[name])
            if name in later:
                block.add_experts(_free("experts.down", block.experts), name, stack)
                continue
            sides: dict[str, Rows | None] = {**gate_and_up(self.flow, stack)} if stack is not None else {}
            for side, rows in (sides or {"up": None}).items():
                block.add_experts(_free(f"experts.{side}", block.experts), name, stack, rows)
        downs = [m for m in inner if any(other is not m and m in self._chain(other) for other in inner)]
        beside = [m for m in inner if m not in downs and any(m in self._before(d) for d in downs)]
        for down in downs[:1]:
            shared = Block("", block.x, down.y, block.r, block.s)
            self._up_and_gate(shared, beside, down)
            shared.add("down", down)
            for role, linear in shared.linears.items():
                block.add(f"shared.{role}", linear, shared.rows[role], shared.slices[role])
        for linear in inner:
            if linear not in block.linears.values():
                block.add(_free("router" if linear.outputs > 1 else "shared.router", block.linears), linear)

    def _chain(self, linear: Linear) -> list[Linear]:
        """The maps that read a map's result through nothing but what is elementwise."""
        table = {m.node: m for m in self.flow.linears}
        pending, seen, found = [linear.y], {linear.y}, []
        while pending:
            for reader in self.flow.readers(pending.pop()):
                if reader in table:
                    found.append(table[reader])
                elif reader.op_type not in ("TopK", "Softmax", "Gather", "GatherND", "Add", "MatMul", "ScatterND"):
                    for value in reader.outputs:
                        if value not in seen and last_size(value) == linear.outputs:
                            seen.add(value)
                            pending.append(value)
        return found

    def _up_and_gate(self, block: Block, inner: list[Linear], down: Linear) -> None:
        """Tell the map behind the non-linearity from the map beside it, in a gated network."""
        sides = gated(self.flow, down.x)
        if sides is not None:
            (gate, gate_value), (up, up_value) = sides
            for role, linear, value in (("gate", gate, gate_value), ("up", up, up_value)):
                if gate is up:
                    owned = owned_features(self.flow, linear, value)
                    assert owned is not None
                    block.add(role, linear, ranges(owned.tolist()), holder(self.flow, linear, value, owned))
                else:
                    block.add(role, linear)
        for linear in inner:
            if linear not in block.linears.values():
                block.add(_free("up", block.linears), linear)

    def surround(self, block: Block) -> None:
        """The normalisations before and after a block."""
        for norm in self.flow.norms:
            if norm.y in (block.x, self._unscaled(block.x)) and self.flow.unwrapped(norm.x, block.r):
                block.before = norm
        after = [n for n in self.flow.norms if self.flow.unwrapped(n.x, block.s)]
        readers = [r for r in self.flow.readers(block.s) if r.op_type != "Shape"]
        if block.before is None and len(after) == 1 and all(self._within(r, after[0]) for r in readers):
            block.after = after[0]

    def _within(self, node: ir.Node, norm: Norm) -> bool:
        """Whether a node is a step of a norm: everything it leads to goes through the norm's result."""
        end = self.flow.index(norm.y)
        pending, seen = [node], {node}
        while pending:
            current = pending.pop()
            if self.flow.order[current] > end:
                return False
            for output in current.outputs:
                if output is norm.y:
                    continue
                if output.is_graph_output():
                    return False
                for reader in self.flow.readers(output):
                    if reader not in seen:
                        seen.add(reader)
                        pending.append(reader)
        return True


def _free(name: str, taken: Container[str]) -> str:
    """A role that is not taken: the name, or the name with a number."""
    if name not in taken:
        return name
    return next(f"{name}.{i}" for i in range(1, 10**6) if f"{name}.{i}" not in taken)
