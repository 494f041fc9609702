"""Towers: stacks of layers that read different senses, named by what they read."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from peltc.compiler.graphs.flow import Flow
from peltc.compiler.survey.block import Block

TOWERS = {"image": "vision", "audio": "speech", "time": "series", "text": "text"}
"""What a tower is called, by the one sense that it reads."""
Read = frozenset[str]


class Towers:
    """Which senses reach each block of a graph.

    Attributes:
        several: whether the blocks that were divided read different senses.
        parallel: whether no tower reads another's result.
    """

    def __init__(self, flow: Flow, senses: Mapping[str, str]):
        self.flow = flow
        self.reach: dict[ir.Value, Read] = {}
        self.several = self.parallel = False
        if len({*senses.values()}) < 2:
            return
        for value in flow.graph.inputs:
            if sense := senses.get(value.name or ""):
                self.reach[value] = frozenset([sense])
        for node in flow.nodes:
            if node.op_type != "Shape" and (read := self._union(node)):
                self.reach.update(dict.fromkeys(node.outputs, read))

    def _union(self, node: ir.Node) -> Read:
        return frozenset().union(*(self.reach.get(v, frozenset()) for v in node.inputs if v is not None))

    def divide(self, groups: Mapping[str, list[Block]]) -> dict[str, list[Block]]:
        """Groups of blocks, divided into those that read the same senses.

        Where there is one group, every part of it is called by what it reads. Of an encoder that a decoder looks at,
        the part that reads most keeps its name; the decoder, which looks at other senses on its way, is one.

        Args:
            groups: blocks by the name of their stack, in order.
        """
        if not self.reach:
            return dict(groups)
        found: dict[str, list[Block]] = {}
        for name, blocks in groups.items():
            parts: dict[Read, list[Block]] = {}
            for block in blocks:
                parts.setdefault(self.reach.get(block.r, frozenset()), []).append(block)
            if len(parts) < 2 or (len(groups) > 1 and name != next(iter(groups))):
                found[name] = blocks
                continue
            self.several = True
            self.parallel = not any(one < other for one in parts for other in parts)
            most = max(parts, key=len) if len(groups) > 1 else None
            for read, members in parts.items():
                word = name if read == most else self._word(read, parts)
                found.setdefault(word, []).extend(members)
        return found

    @staticmethod
    def _word(read: Read, parts: Mapping[Read, list[Block]]) -> str:
        if len(read) == 1:
            return TOWERS[next(iter(read))]
        alone = frozenset(["text"])
        return "text" if "text" in read and alone not in parts else "joint"
