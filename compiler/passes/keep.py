"""What modules make of a whole text, in a graph that generates: made of the prompt, and kept while the text grows.

    x ─► gate ─► y        becomes        x ─► gate ─► concat(kept, ·) ─► the first ─► y
                                                        └── kept: one more input, and one more output

What is kept [B, 0 or 1, N] stands beside the cache, and like the cache it is empty before there is a text: then the
first is what the prompt gives, and ever after what was kept. What a step makes of its new tokens is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import onnx_ir as ir

from peltc.compiler.files.manifest import GIVEN, GROWN, KEPT
from peltc.compiler.interpreters.emitter import Emitter
from peltc.compiler.interpreters.onnx import OnnxInterpreter
from peltc.compiler.plan.claims import Claim
from peltc.spec.formula.syntax import Expr

FLOAT = ir.DataType.FLOAT


class Keeper:
    """Keeps values of a graph from the prompt on.

    Args:
        graph: one with a cache.
    """

    def __init__(self, graph: ir.Graph):
        self.graph, self.width = graph, 0
        assert graph.inputs[0].shape is not None
        self.batch = graph.inputs[0].shape[0]
        self.given = ir.Value(name=GIVEN + KEPT, type=ir.TensorType(FLOAT))
        self.kept: list[ir.Value] = []

    def of(
        self, claim: Claim, effect: str, interpreter: OnnxInterpreter
    ) -> Mapping[Expr, Callable[[Callable[[], Any]], Any]]:
        """What stands in the place of a claim's summaries of the text; see `Interpreter.held`."""
        summaries = claim.summaries.get(effect, {}) if claim.holds else {}
        return {expr: partial(self.keep, sizes, interpreter) for expr, sizes in summaries.items()}

    def keep(self, sizes: tuple[int, ...], interpreter: OnnxInterpreter, compute: Callable[[], Any]) -> ir.Value:
        """A value [B, *sizes] as the prompt gives it."""
        emitter, own = interpreter.emitter, interpreter.value(compute())
        start, count = self.width, math.prod(sizes)
        self.width += count
        flat = emitter.node("Reshape", [own, emitter.integers([0, 1, count])])
        bounds = [emitter.integers([n]) for n in (start, self.width, 2)]
        before = cast(emitter.node("Slice", [self.given, *bounds]), emitter.dtype, emitter)
        every = emitter.node("Concat", [before, flat], {"axis": 1})
        first = emitter.node("Slice", [every, *(emitter.integers([n]) for n in (0, 1, 1))])
        self.kept.append(cast(first, FLOAT, emitter))
        value = emitter.node("Reshape", [first, emitter.integers([0, *sizes])])
        value.shape = ir.Shape([self.batch, *sizes])
        return value

    def close(self) -> None:
        """Give the graph the input and the output, where something is kept."""
        if not self.kept:
            return
        self.given.shape = ir.Shape([self.batch, KEPT, self.width])
        self.graph.inputs.append(self.given)
        grown = Emitter(self.graph, FLOAT, f"pelt.{KEPT}", {}).node("Concat", self.kept, {"axis": 2})
        grown.name, grown.shape = GROWN + KEPT, ir.Shape([self.batch, 1, self.width])
        self.graph.outputs.insert(0, grown)  # whoever reads the others counts them from the end


def cast(value: ir.Value, dtype: ir.DataType, emitter: Emitter) -> ir.Value:
    """A value in a type; itself where it has it."""
    return value if value.dtype == dtype else emitter.node("Cast", [value], {"to": dtype.value})
