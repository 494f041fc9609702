"""The residual stream of a graph: the sums that write to it, and the terms that these add."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from peltc.compiler.graphs.flow import Flow, Linear, Norm, last_size
from peltc.compiler.survey.cores import Core

SCALES = {"Mul", "Div", "Cast", "Identity"}


@dataclass(frozen=True, eq=False)
class Term:
    """A term of a residual sum, and what lies between the stream and it."""

    r: ir.Value
    y: ir.Value
    s: ir.Value
    values: frozenset[ir.Value]


class Stream:
    """The residual stream: the sums that write to it, and what each of them adds."""

    def __init__(self, flow: Flow, cores: list[Core]):
        self.flow, self.cores = flow, cores
        self.claimed: set[Linear | str] = set()
        self.norm_of = {norm.y: norm for norm in flow.norms}

    def terms(self) -> Iterator[Term]:
        """The terms of every residual sum, in order."""
        for node in self.flow.nodes:
            total = node.outputs[0]
            if node.op_type != "Add" or total not in self.flow.hidden or self._within_sum(total):
                continue
            leaves = self._leaves(total)
            if len(leaves) < 2:
                continue
            width = last_size(total)
            best: list[Term] = []
            streams = [(r, leaf) for leaf in leaves for r in dict.fromkeys((leaf, self._unscaled(leaf)))]
            for r, own in streams:
                if width is None or last_size(r) not in (width, None):
                    continue
                others = [leaf for leaf in leaves if leaf is not own]
                found = [t for leaf in others if (t := self._term(r, leaf, total)) is not None]
                if len(found) > len(best):
                    best = found
            yield from sorted(self._joined(best), key=lambda term: self.flow.index(term.y))

    def _joined(self, terms: list[Term]) -> list[Term]:
        """Terms of a sum, of which those that routed and shared experts make are one: their own sum."""
        contexts = [core.context.outputs[0] for core in self.cores]
        apart = [t for t in terms if not any(c in t.values for c in contexts)]
        if len(apart) < 2 or not any(self._stacks(t) for t in apart):
            return terms
        wanted = {t.y for t in apart}
        for node in (n for n in self.flow.nodes if self._sums(n) and n.outputs[0] is not terms[0].s):
            if self._within_sum(node.outputs[0]) and set(self._leaves(node.outputs[0])) == wanted:
                whole = self._term(terms[0].r, node.outputs[0], terms[0].s)
                return [t for t in terms if t not in apart] + ([whole] if whole else apart)
        return terms

    def _within_sum(self, total: ir.Value) -> bool:
        """Whether a sum is a term of one sum more, and nothing else."""
        readers = [r for r in self.flow.readers(total) if r.op_type != "Shape"]
        return len(readers) == 1 and readers[0].op_type == "Add" and self._sums(readers[0])

    def _sums(self, node: ir.Node) -> bool:
        """Whether an addition joins two things that flow through the model."""
        return node.op_type == "Add" and all(v in self.flow.hidden for v in node.inputs)

    def _leaves(self, total: ir.Value) -> list[ir.Value]:
        """What a tree of additions adds up."""
        node = total.producer()
        assert node is not None
        if not self._sums(node):
            return [total]
        found: list[ir.Value] = []
        for value in node.inputs:
            assert value is not None
            producer = value.producer()
            inner = producer is not None and self._sums(producer) and self._within_sum(value)
            found += self._leaves(value) if inner else [value]
        return found

    def _unscaled(self, value: ir.Value) -> ir.Value:
        """A value without the constant factors and casts at its end."""
        while (node := value.producer()) is not None and node.op_type in SCALES:
            if value in self.norm_of or value in self.flow.linear_of:
                return value
            hidden = [v for v in node.inputs if v is not None and v in self.flow.hidden]
            if len(hidden) != 1:
                return value
            value = hidden[0]
        return value

    def _term(self, r: ir.Value, leaf: ir.Value, total: ir.Value) -> Term | None:
        """The region between the stream and a term, if parameters work in it."""
        start = self.flow.index(r)
        behind, pending = {leaf}, [leaf]
        while pending:
            node = pending.pop().producer()
            for value in node.inputs if node is not None else ():
                if value is None or value is r or value in behind or value not in self.flow.hidden:
                    continue
                if self.flow.index(value) > start:  # nothing that comes earlier can depend on the stream
                    behind.add(value)
                    pending.append(value)
        between: set[ir.Value] = set()
        work = False
        for value in sorted(behind, key=self.flow.index):
            node = value.producer()
            if node is not None and any(v is r or v in between for v in node.inputs):
                between.add(value)
                work |= value in self.flow.linear_of or node in self.flow.stacked
        if leaf not in between or not work:
            return None
        return Term(r, leaf, total, frozenset(between))

    def _written(self, leaf: ir.Value) -> tuple[ir.Value, Norm | None]:
        """What a block writes, constant factors left out, and the norm that it ends in."""
        y = self._unscaled(leaf)
        if (norm := self.norm_of.get(y)) is not None:
            return y, norm
        table = self.flow.linear_of
        current = y
        while current not in table and (node := current.producer()) is not None:
            if node.op_type not in ("Reshape", *SCALES):
                break
            hidden = [v for v in node.inputs if v is not None and v in self.flow.hidden]
            if len(hidden) != 1:
                break
            current = hidden[0]
        return (table[current].y if current in table else y), None

    def _map_of(self, y: ir.Value, inside: Norm | None) -> Linear | None:
        """The map that ends a block."""
        if inside is None:
            return self.flow.linear_of.get(y)
        return self.flow.linear_of.get(self._written(inside.x)[0])

    def _stacks(self, term: Term) -> list[str]:
        found = [name for node, name in self.flow.stacked.items() if node.outputs[0] in term.values]
        return list(dict.fromkeys(found))

    def _parameters(self, term: Term) -> frozenset[str]:
        """The parameters that work between the stream and a term, those of the norm that reads the stream left out."""
        first = {n.weight for n in self.flow.norms if n.x is term.r} | {
            n.bias for n in self.flow.norms if n.x is term.r
        }
        found = {
            name for v in term.values if (node := v.producer()) is not None
            for source in node.inputs if source is not None and source not in self.flow.hidden
            for name in self.flow.sources(source)
        }  # fmt: skip
        return frozenset(found - first)
