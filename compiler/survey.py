"""Discovery: from a graph's dataflow to the sites of the reference architecture. No name in the model decides.

Attention is where a softmax of a product of two things multiplies a third. Queries, keys and values are the linear
maps nearest behind the three; the output projection is the linear map nearest after. The residual stream is what a
block's result is added to while the block itself depends on it. What else is added to the stream is a feed-forward
block; inside, the map whose result is added is `down`, the others are `up` and, behind a non-linearity and before a
product, `gate`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from peltc.compiler.anatomy import Anatomy, Rows, Site
from peltc.compiler.flow import NONLINEAR, Flow, Linear, Norm, last_size
from peltc.compiler.probe import SIZES, Probe, Unprobed, ranges

THROUGH_SCORES = {
    "Add",
    "Mul",
    "Div",
    "Cast",
    "Where",
    "Reshape",
    "Sub",
    "Identity",
    "Tanh",
    "Transpose",
    "Clip",
    "Max",
}
LAYOUT_STEPS = {"Mul", "Div", "Transpose", "Reshape", "Expand", "Unsqueeze", "Identity", "Concat", "Squeeze", "Cast"}
THROUGH_WEIGHTS = {"Cast", "Identity", "Where", "Mul", "Reshape", "Transpose", "Slice", "Expand"}
COMPARISONS = {"Less", "LessOrEqual", "Greater", "GreaterOrEqual"}


@dataclass(eq=False)
class Core:
    """An attention core found in the graph: the two products, and the operands by role."""

    scores: ir.Node  # queries times keys
    context: ir.Node  # softmax times values
    query: ir.Value
    key: ir.Value  # as the product reads it: [..., Dh, T]
    value: ir.Value
    mask: ir.Value | None  # what is added to the scores
    sum: ir.Value | None  # scores with the mask added
    linears: dict[str, Linear] = field(default_factory=dict)
    rows: dict[str, Rows | None] = field(default_factory=dict)
    slices: dict[str, ir.Value] = field(default_factory=dict)
    output: Linear | None = None
    heads: tuple[int, int, int] = (0, 0, 0)
    written: tuple[ir.Value | None, ir.Value | None] = (None, None)
    read: tuple[ir.Value | None, ir.Value | None] = (None, None)
    cross: bool = False
    causal: bool = False


@dataclass(eq=False)
class Block:
    """A sub-layer: from the residual stream `r` to the sum `s` = r + y."""

    kind: str
    x: ir.Value
    y: ir.Value
    r: ir.Value
    s: ir.Value
    linears: dict[str, Linear]
    core: Core | None = None
    before: Norm | None = None
    inside: Norm | None = None
    after: Norm | None = None
    rows: dict[str, Rows | None] = field(default_factory=dict)
    slices: dict[str, ir.Value] = field(default_factory=dict)

    @property
    def out(self) -> ir.Value:
        """The stream after the block."""
        return self.after.y if self.after else self.s


def survey_graph(model: ir.Model, parameters: Mapping[str, tuple[int, ...]]) -> Anatomy:
    """Find the sites of a graph.

    Args:
        model: the graph; its parameters are inputs.
        parameters: their shapes by name.
    """
    return _Survey(Flow(model.graph, parameters)).anatomy()


class _Survey:
    def __init__(self, flow: Flow):
        self.flow = flow
        self.claimed: set[Linear] = set()
        self.claimed_norms: set[Norm] = set()

    def anatomy(self) -> Anatomy:
        cores = [core for core in map(self.core, self.flow.nodes) if core is not None]
        blocks = [block for core in cores if (block := self.attention_block(core)) is not None]
        for block in blocks:
            self.claimed.update(block.linears.values())
        blocks += self.feed_forward_blocks(blocks)
        blocks.sort(key=lambda b: self.flow.index(b.s))
        for block in blocks:
            self.norms(block)
        sites = list(self.sites(blocks))
        width = blocks[0].linears["output" if blocks[0].core else "down"].outputs if blocks else 0
        return Anatomy(tuple(_shared(sites)), width)

    # attention

    def core(self, node: ir.Node) -> Core | None:
        """The core around a softmax node."""
        if node.op_type != "Softmax" or node.inputs[0] is None:
            return None
        context = self._product_after(node.outputs[0])
        found = self._product_before(node.inputs[0])
        if context is None or found is None:
            return None
        scores, mask, total = found
        query, key, value = scores.inputs[0], scores.inputs[1], context.inputs[1]
        if query is None or key is None or value is None:
            return None
        core = Core(scores, context, query, key, value, mask, total)
        for role, operand in (("query", query), ("key", key), ("value", value)):
            linear = self._behind(operand)
            if linear is None:
                return None
            core.linears[role] = linear
            self._own(core.linears[role], role, operand, core.rows, core.slices)
        core.output = self._after(context.outputs[0])
        self._heads(core)
        core.causal = mask is not None and self._orders(mask)
        return core

    def _product_after(self, value: ir.Value) -> ir.Node | None:
        pending, seen = [value], set()
        while pending:
            current = pending.pop(0)
            for reader in self.flow.readers(current):
                if reader in seen:
                    continue
                seen.add(reader)
                if reader.op_type == "MatMul" and reader.inputs[0] is current and reader.inputs[1] in self.flow.hidden:
                    return reader
                if reader.op_type in THROUGH_WEIGHTS:
                    pending.extend(reader.outputs)
        return None

    def _product_before(self, value: ir.Value) -> tuple[ir.Node, ir.Value | None, ir.Value | None] | None:
        """The product behind a softmax, and the last thing added on the way."""
        mask: ir.Value | None = None
        total: ir.Value | None = None
        current: ir.Value | None = value
        while current is not None:
            node = current.producer()
            if node is None:
                return None
            if node.op_type == "MatMul":
                inner = [v for v in node.inputs if v is not None and v in self.flow.hidden]
                return (node, mask, total) if len(inner) == 2 else None
            if node.op_type not in THROUGH_SCORES:
                return None
            candidates = [v for v in node.inputs if v is not None and self._reaches_product(v)]
            if len(candidates) != 1:
                return None
            if node.op_type == "Add" and mask is None:
                mask, total = next(v for v in node.inputs if v is not candidates[0]), node.outputs[0]
                if mask is not None and self.flow.scalar(mask) is not None:
                    mask = total = None
            current = candidates[0]
        return None

    def _reaches_product(self, value: ir.Value, limit: int = 24) -> bool:
        pending = [value]
        for _ in range(limit):
            if not pending:
                return False
            node = pending.pop().producer()
            if node is None:
                continue
            if node.op_type == "MatMul":
                inner = [v for v in node.inputs if v is not None and v in self.flow.hidden]
                if len(inner) == 2 and all(self.flow.parameter(v) is None for v in inner):
                    return True
            elif node.op_type in THROUGH_SCORES:
                pending.extend(v for v in node.inputs if v is not None and v in self.flow.hidden)
        return False

    def _behind(self, value: ir.Value) -> Linear | None:
        """The nearest linear map behind a value whose features reach it."""
        table = self.flow.linear_of
        for found in self.flow.behind(value, lambda v: v in table):
            if found in table:
                return table[found]
        return None

    def _after(self, value: ir.Value) -> Linear | None:
        """The nearest linear map that reads a value, through anything that is not one."""
        readers = {id(linear.node): linear for linear in self.flow.linears}
        pending, seen = [value], {value}
        while pending:
            current = pending.pop(0)
            for reader in self.flow.readers(current):
                if id(reader) in readers:
                    return readers[id(reader)]
                for output in reader.outputs:
                    if output in self.flow.hidden and output not in seen and reader.op_type != "Softmax":
                        seen.add(output)
                        pending.append(output)
        return None

    def _seed(self, linear: Linear) -> Probe:
        rank = len(linear.y.shape) if linear.y.shape is not None else 3
        leading = Probe({}).shape(linear.y)[:-1] if rank else (SIZES["batch"], SIZES["sequence"])
        indices = np.broadcast_to(np.arange(linear.outputs), (*leading, linear.outputs))
        return Probe({linear.y: np.array(indices)})

    def _own(
        self, linear: Linear, role: str, operand: ir.Value, rows: dict[str, Rows | None], slices: dict[str, ir.Value]
    ) -> None:
        """Which features of a map reach an operand, and the value that holds just these, in order."""
        rows[role], slices[role] = None, linear.y
        try:
            probe = self._seed(linear)
            arrived = probe.track(operand)
        except Unprobed:
            return
        if arrived is None:
            return
        owned = np.unique(arrived[arrived >= 0])
        if len(owned) == linear.outputs:
            return
        rows[role] = ranges(owned.tolist())
        lead = len(Probe({}).shape(linear.y)) - 1
        for value, array in sorted(
            ((v, a) for v, a in probe.known.items() if a is not None), key=lambda entry: self.flow.index(entry[0])
        ):
            token = array[(0,) * lead].reshape(-1) if array.ndim > lead else np.array([])
            if len(token) == len(owned) and (token == owned).all() and array.shape[:lead] == arrived_lead(linear):
                slices[role] = value
                return

    def _heads(self, core: Core) -> None:
        """Numbers of heads, and the keys and values before and after they are repeated for groups of heads."""
        try:
            shape = {role: self._layout(core, role) for role in ("key", "value")}
        except Unprobed:
            return
        if shape["key"] is None or shape["value"] is None:
            return
        (heads, kv_heads, head_dim, k_read, k_written) = shape["key"]
        (_, _, _, v_read, v_written) = shape["value"]
        core.heads = (heads, kv_heads, head_dim)
        core.read, core.written = (k_read, v_read), (k_written, v_written)

    def _layout(self, core: Core, role: str) -> tuple[int, int, int, ir.Value, ir.Value] | None:
        """Walk from a product's operand back to the value laid out [B, H, T, Dh] that layout alone turns into it: once
        with all heads (`written`), once with the key/value heads (`read`)."""
        operand = core.key if role == "key" else core.value
        read = written = None
        heads = kv_heads = head_dim = 0
        current: ir.Value | None = operand
        while current is not None:
            try:
                shape = Probe({}).shape(current)
            except Unprobed:
                shape = ()
            if len(shape) == 4:
                indices = np.arange(int(np.prod(shape))).reshape(shape)
                arrived = Probe({current: indices}).track(operand)
                if arrived is not None and arrived.ndim == 4:
                    if role == "key":
                        arrived = arrived.swapaxes(-1, -2)
                    repeats = arrived.shape[1] // shape[1] if shape[1] else 0
                    expected = np.repeat(indices, max(repeats, 1), axis=1)
                    if arrived.shape == expected.shape and (arrived == expected).all():
                        if written is None and repeats == 1:
                            written, heads, head_dim = current, shape[1], shape[3]
                        if written is not None:
                            read, kv_heads = current, shape[1]
            node = current.producer()
            if node is None or node.op_type not in LAYOUT_STEPS:
                break
            hidden = [v for v in dict.fromkeys(node.inputs) if v is not None and v in self.flow.hidden]
            if len(hidden) != 1:
                break
            current = hidden[0]
        if read is None or written is None:
            return None
        return heads, kv_heads, head_dim, read, written

    def _orders(self, mask: ir.Value) -> bool:
        """Whether a mask compares positions with positions: what a causal mask does."""
        seen, pending = {mask}, [mask]
        while pending:
            node = pending.pop().producer()
            if node is None:
                continue
            if node.op_type == "Trilu":
                return True
            inputs = [v for v in node.inputs if v is not None]
            if node.op_type in COMPARISONS and all(self._position(v) for v in inputs):
                return True
            for source in inputs:
                if source not in seen and source not in self.flow.hidden:
                    seen.add(source)
                    pending.append(source)
        return False

    def _position(self, value: ir.Value) -> bool:
        """Whether a value is a range of positions, reshaped."""
        current: ir.Value | None = value
        while current is not None:
            node = current.producer()
            if node is None:
                return False
            if node.op_type == "Range":
                return True
            if node.op_type not in ("Unsqueeze", "Reshape", "Cast", "Expand", "Identity", "Transpose", "Slice", "Add"):
                return False
            current = node.inputs[0]
        return False

    # blocks

    def attention_block(self, core: Core) -> Block | None:
        """The sub-layer around a core."""
        if core.output is None:
            return None
        found = self.residual(core.output.y)
        if found is None:
            return None
        r, y, s = found
        core.cross = not self.flow.depends(core.linears["key"].x, r)
        block = Block("cross_attention" if core.cross else "attention", core.linears["query"].x, y, r, s,
                      {**core.linears, "output": core.output}, core)  # fmt: skip
        block.rows, block.slices = {**core.rows, "output": None}, {**core.slices, "output": core.output.y}
        return block

    def residual(self, value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value] | None:
        """From a map's result forward to its residual addition: the stream, what is added to it, the sum."""
        current, written = value, value
        for _ in range(64):
            readers = self.flow.readers(current)
            norms = [n for n in self.flow.norms if n.x is current]
            for reader in readers:
                if reader.op_type == "Add":
                    other = next((v for v in reader.inputs if v is not current), None)
                    if other is not None and other in self.flow.hidden and self.flow.depends(current, other):
                        return other, written, reader.outputs[0]
            if norms:  # a norm between the map and the sum
                current = written = norms[0].y
                continue
            forward = [r for r in readers if r.op_type in ("Add", "Mul", "Div", "Cast", "Identity", "Reshape", "Where")]
            if len(forward) != 1:
                return None
            current = forward[0].outputs[0]
        return None

    def feed_forward_blocks(self, attention: list[Block]) -> list[Block]:
        """The sub-layers without attention."""
        streams = {id(block.s) for block in attention}
        blocks = []
        for linear in self.flow.linears:
            if linear in self.claimed or (found := self.residual(linear.y)) is None:
                continue
            r, y, s = found
            inner = [m for m in self.between(linear.x, r) if m not in self.claimed]
            if id(s) in streams or not inner:
                continue
            block = Block("feed_forward", inner[0].x, y, r, s, {"down": linear})
            block.rows["down"], block.slices["down"] = None, linear.y
            self.up_and_gate(block, inner, linear)
            self.claimed.update(block.linears.values())
            blocks.append(block)
        return blocks

    def between(self, value: ir.Value, stream: ir.Value) -> list[Linear]:
        """The linear maps behind a value that read the stream, not passing it."""
        table, found = self.flow.linear_of, []
        for v in self.flow.behind(value, lambda v: v in table or v is stream):
            if v in table and table[v] not in found and self.flow.depends(table[v].x, stream):
                found.append(table[v])
        return sorted(found, key=lambda m: self.flow.order[m.node])

    def up_and_gate(self, block: Block, inner: list[Linear], down: Linear) -> None:
        """Tell the map behind the non-linearity from the map beside it, in a gated network."""
        sides = self.gated(down.x)
        if sides is not None:
            (gate, gate_value), (up, up_value) = sides
            for role, linear, value in (("gate", gate, gate_value), ("up", up, up_value)):
                block.linears[role] = linear
                if gate is up:
                    self._own(linear, role, value, block.rows, block.slices)
                else:
                    block.rows[role], block.slices[role] = None, linear.y
            return
        block.linears["up"] = inner[0]
        block.rows["up"], block.slices["up"] = None, inner[0].y

    def gated(self, value: ir.Value) -> tuple[tuple[Linear, ir.Value], tuple[Linear, ir.Value]] | None:
        """The gate and the up side of the product behind a value."""
        table = self.flow.linear_of
        for v in self.flow.behind(value, lambda v: v in table):
            node = v.producer()
            if node is None or node.op_type != "Mul" or v in table:
                continue
            sides = [side for side in node.inputs if side is not None and side in self.flow.hidden]
            if len(sides) != 2:
                continue
            found = [(self._behind(side), self.bends(side)) for side in sides]
            (first, bent), (second, straight) = found
            if first is None or second is None or bent == straight:
                continue
            if first is second and not self._disjoint(first, sides):
                continue  # x * sigmoid(x), and the like: one side's activation
            pairs = list(zip((first, second), sides, strict=True))
            return (pairs[0], pairs[1]) if bent else (pairs[1], pairs[0])
        return None

    def _disjoint(self, linear: Linear, sides: list[ir.Value]) -> bool:
        try:
            owned = []
            for side in sides:
                arrived = self._seed(linear).track(side)
                owned.append(set() if arrived is None else set(np.unique(arrived[arrived >= 0]).tolist()))
        except Unprobed:
            return False
        return bool(owned[0]) and bool(owned[1]) and not owned[0] & owned[1]

    def bends(self, value: ir.Value) -> bool:
        """Whether a non-linearity stands between a value and the linear map behind it."""
        table = self.flow.linear_of
        for v in self.flow.behind(value, lambda v: v in table) if value not in table else ():
            node = v.producer()
            if v not in table and node is not None and node.op_type in NONLINEAR:
                return True
        return False

    def norms(self, block: Block) -> None:
        """The normalisations before, at the end of, and after a block."""
        x = block.x
        for norm in self.flow.norms:
            if norm.y is x and (norm.x is block.r or self._casts(norm.x, block.r)):
                block.before = norm
            if norm.y is block.y:
                block.inside = norm
        after = [n for n in self.flow.norms if n.x is block.s or self._casts(n.x, block.s)]
        hidden_readers = [r for r in self.flow.readers(block.s) if r.op_type not in ("Shape",)]
        if block.before is None and len(after) == 1 and all(self._within(r, after[0]) for r in hidden_readers):
            block.after = after[0]

    def _casts(self, value: ir.Value, source: ir.Value) -> bool:
        node = value.producer()
        return value is source or (node is not None and node.op_type == "Cast" and node.inputs[0] is source)

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
        yield from self.tail(blocks)

    def stacks(self, blocks: list[Block]) -> dict[str, list[list[Block]]]:
        """Blocks by stack and layer. A self-attention block opens a layer."""
        sources = [b.core.linears["key"].x for b in blocks if b.core and b.core.cross]
        encoder = [b for b in blocks if sources and any(self.flow.depends(s, b.s) for s in sources)]
        causal = any(b.core.causal for b in blocks if b.core and not b.core.cross)
        if encoder:
            groups = {"encoder": encoder, "decoder": [b for b in blocks if b not in encoder]}
        else:
            groups = {"decoder" if causal else "encoder": blocks}
        stacks: dict[str, list[list[Block]]] = {}
        for name, members in groups.items():
            layers: list[list[Block]] = []
            opening = any(b.kind == "attention" for b in members)
            for block in members:
                parallel = layers and any(b.r is block.r for b in layers[-1])
                if not layers or (not parallel and (block.kind == "attention" or not opening)):
                    layers.append([])
                layers[-1].append(block)
            if layers:
                stacks[name] = layers
        return stacks

    def layer(self, path: str, layer: list[Block], layers: list[list[Block]], number: int) -> Iterator[Site]:
        h, end = layer[0].r, layer[-1].out
        h_anchor = self.anchor_r(layer[0])
        for block in layer:
            common = {"h": h.name or ""}
            for role in ("query", "key", "value", "output", "gate", "up", "down"):
                if role in block.linears:
                    yield self.linear_site(f"{path}.{block.kind}.{role}", block.linears[role], block.rows[role],
                                           block.slices[role], common, h_anchor)  # fmt: skip
            if block.core is not None:
                yield self.attention_site(f"{path}.{block.kind}", block, common, h_anchor)
            for role, norm in (("norm", block.before or block.after or block.inside), ("post_norm", block.inside)):
                if norm is not None and norm not in self.claimed_norms:
                    self.claimed_norms.add(norm)
                    yield self.norm_site(f"{path}.{block.kind}.{role}", norm)
            yield self.block_site(f"{path}.{block.kind}.block", block, common, h_anchor)
        width = layer[-1].linears.get("down", layer[-1].linears.get("output"))
        assert width is not None
        anchors = {"h": h_anchor, "x": h_anchor}
        if layer[-1].after:
            anchors["y"] = layer[-1].after.weight
        yield Site(
            path,
            "block",
            sizes={"in": width.outputs, "out": width.outputs, "d": width.outputs},
            values={"x": h.name or "", "h": h.name or "", "y": end.name or ""},
            anchors=anchors,
        )

    @staticmethod
    def anchor_r(block: Block) -> str:
        """A parameter whose module reads the block's residual stream."""
        if block.before is not None:
            return block.before.weight
        first = block.linears.get("query") or block.linears.get("gate") or block.linears["up"]
        return first.weight if first.x is block.r else ""

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

    def attention_site(self, path: str, block: Block, common: dict[str, str], h_anchor: str) -> Site:
        core = block.core
        assert core is not None
        heads, kv_heads, head_dim = core.heads
        values = {
            "x": core.linears["query"].x.name, "q": core.query.name, "k": core.read[0].name if core.read[0] else "",
            "v": core.read[1].name if core.read[1] else "", "keys": core.written[0].name if core.written[0] else "",
            "values": core.written[1].name if core.written[1] else "", "scores": core.scores.outputs[0].name,
            "context": core.context.outputs[0].name, "mask": core.mask.name if core.mask is not None else "",
            "masked": core.sum.name if core.sum is not None else "", **common,
        }  # fmt: skip
        return Site(
            path,
            "attention",
            {role: linear.weight for role, linear in core.linears.items()},
            sizes={"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "d": heads * head_dim},
            values={k: v or "" for k, v in values.items()},
            anchors={"core": core.linears["query"].weight, "h": h_anchor, "x": core.linears["query"].weight},
        )

    @staticmethod
    def norm_site(path: str, norm: Norm) -> Site:
        parameters = {"weight": norm.weight} | ({"bias": norm.bias} if norm.bias else {})
        return Site(path, "norm", parameters, None, {"d": norm.size},
                    {"x": norm.x.name or "", "y": norm.y.name or ""}, {"x": norm.weight, "y": norm.weight})  # fmt: skip

    def block_site(self, path: str, block: Block, common: dict[str, str], h_anchor: str) -> Site:
        last = block.linears.get("output") or block.linears["down"]
        first = block.linears.get("query") or block.linears.get("gate") or block.linears["up"]
        norm = block.after or block.before
        anchors = {"x": first.weight, "r": self.anchor_r(block), "h": h_anchor,
                   "y": block.inside.weight if block.inside else last.weight}  # fmt: skip
        values = {"x": first.x.name or "", "y": block.y.name or "", "r": block.r.name or "", **common}
        if norm is not None:
            anchors["norm"] = norm.weight
            values |= {"norm_x": norm.x.name or "", "norm_y": norm.y.name or ""}
        if block.inside is None and block.y is last.y:
            values["linear"] = last.weight
        return Site(
            path, "block", {}, None, {"in": first.inputs, "out": last.outputs, "d": last.outputs}, values, anchors
        )

    def embeddings(self, stacks: dict[str, list[list[Block]]]) -> Iterator[Site]:
        """The tables of token embeddings, and the whole module's output: where the stream begins."""
        for stack, layers in stacks.items():
            head = f"{stack}." if len(stacks) > 1 else ""
            start = layers[0][0].r
            behind = self.flow.ancestors(start)
            tables = []
            for node in self.flow.nodes:
                if node.op_type == "Gather" and node.outputs[0] in behind:
                    name, source = self.flow.parameter(node.inputs[0]), self.flow.origin(node.inputs[1])
                    if name and source.is_graph_input() and (source.name or "").endswith("input_ids"):
                        tables.append((name, node))
            last = layers[-1][-1].after  # a norm after the last layer is followed by reshapes to the input's length
            end, ender = ({"end": last.y.name or ""}, {"end": last.weight}) if last else ({}, {})
            for name, node in tables[:1]:
                vocab, width = self.flow.parameters[name]
                yield Site(f"{head}embedding.word", "embedding", {"weight": name}, None,
                           {"vocab": vocab, "d": width, "in": vocab, "out": width},
                           {"x": node.inputs[1].name or "", "y": node.outputs[0].name or "", **end},  # type: ignore[union-attr]
                           {"y": name, **ender})  # fmt: skip
            for norm in self.flow.norms:
                if norm.y in behind and norm not in self.claimed_norms:
                    self.claimed_norms.add(norm)
                    yield self.norm_site(f"{head}embedding.norm", norm)
            width = last_size(start) or 0
            words = {"vocab": self.flow.parameters[tables[0][0]][0]} if tables else {}
            yield Site(f"{head}embedding", "embedding", {"weight": tables[0][0]} if tables else {}, None,
                       {"d": width, "in": width, "out": width, **words},
                       {"y": start.name or "", **end}, {"y": self.embedding_module(start), **ender})  # fmt: skip

    def embedding_module(self, start: ir.Value) -> str:
        """The module whose output begins the stream: that which owns what leads there, and nothing else; or ''."""
        behind, pending = {start}, [start]
        while pending:
            node = pending.pop().producer()
            for source in node.inputs if node is not None else ():
                if source is not None and source not in behind:
                    behind.add(source)
                    pending.append(source)
        owned = {v.name for v in behind if v.name in self.flow.parameters}
        paths = [(name or "").replace(".", "/") for name in owned]
        common = os.path.commonpath([os.path.dirname(path) for path in paths]).replace("/", ".") if paths else ""
        inside = {name for name in self.flow.parameters if name.startswith(f"{common}.")}
        return common if common and inside <= owned else ""

    def final_norm(self, stack: str, layers: list[list[Block]]) -> Iterator[Site]:
        end = layers[-1][-1].out
        for norm in self.flow.norms:
            if norm not in self.claimed_norms and self._casts(norm.x, end):
                self.claimed_norms.add(norm)
                yield self.norm_site(f"{stack}.final_norm".lstrip("."), norm)

    def tail(self, blocks: list[Block]) -> Iterator[Site]:
        """The maps after the last layer; the last of them is the head, unless its result is only a pooled token."""
        end = blocks[-1].out if blocks else None
        unclaimed = [m for m in self.flow.linears if m not in self.claimed]
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


def arrived_lead(linear: Linear) -> tuple[int, ...]:
    """The leading sizes of a map's output at the probe's sizes."""
    return Probe({}).shape(linear.y)[:-1]


def _shared(sites: Iterable[Site]) -> list[Site]:
    """Tell each site which others use the same parameters."""
    listed = list(sites)
    users: dict[tuple[str, Rows | None, str], list[str]] = {}
    for site in listed:
        for name in site.parameters.values():
            users.setdefault((name, site.rows, site.kind), []).append(site.path)
    result = []
    for site in listed:
        others = {p for name in site.parameters.values() for p in users[(name, site.rows, site.kind)]} - {site.path}
        result.append(replace(site, shared=tuple(sorted(others))) if others and site.kind != "embedding" else site)
    return result
