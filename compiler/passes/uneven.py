"""Rows with fewer tokens before the text than others: as many as a profile has, and none where there is no profile.

    shown [P]      which of P places a profile fills, the last ones; an input of the graph beside the tokens
    whole texts    tokens, text ─► the same, turned so that the places that are not filled stand behind the text
                   outputs ─► the text's, which begins where the row's tokens end
    with a cache   the places that are not filled stand before the tokens, and positions are counted from these
    keys           that take positions stand at the filled places in the sequence, in place of what has them there

A row then is what a shorter text with padding is: what is not filled is masked, and the text has the places that it
has behind so many tokens. Turning changes no number, so that a profile that fills all places is as if it were alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import onnx_ir as ir

from peltc.compiler.interpreters.emitter import Emitter
from peltc.compiler.plan.claims import Claim

SHOWN = "pelt.shown"
"""Metadata of a constant that says which places profiles fill."""
INTEGER = ir.DataType.INT64


def shown(length: int, emitter: Emitter, name: str = "shown") -> ir.Value:
    """The constant that says which of so many places are filled [P]: ones."""
    value = emitter.constant(np.ones(length, np.float32), name, ir.DataType.FLOAT)
    value.metadata_props[SHOWN] = str(length)
    return value


def numbers(claims: Iterable[Claim]) -> dict[str, list[int]]:
    """By attachment, how many keys before the text profiles bring at its sites, each number once."""
    found: dict[str, dict[int, None]] = {}
    for claim in claims:
        if claim.uneven:
            joined = [claim.added(effect)[0] for effect in ("keys", "values") if effect in claim.effects]
            found.setdefault(claim.attachment, {}).update(dict.fromkeys(joined))
    return {name: list(each) for name, each in found.items()}


def shown_in(model: ir.Model) -> set[str]:
    """The names of such constants of a graph."""
    return {name for name, value in model.graph.initializers.items() if SHOWN in value.metadata_props}


class Uneven:
    """Tokens of which rows have different numbers, in a graph.

    Args:
        emitter: adds nodes.
        length: how many tokens there is room for.
        text: a value [B, S, ...] as long as the text, and with a row for each.
        brought: whether profiles bring them; all rows have all of them otherwise.
        known: what says which places are filled, where the graph has it already.
    """

    def __init__(
        self,
        emitter: Emitter,
        length: int,
        text: ir.Value,
        brought: bool = True,
        known: ir.Value | None = None,
    ):
        self.emitter, self.length, self.text = emitter, length, text
        self.shown = shown(length, emitter) if known is None else known
        if not brought:
            del self.shown.metadata_props[SHOWN]
        self.rows = emitter.node("Shape", [text], {"start": 0, "end": 1})
        total = emitter.node("ReduceSum", [self.shown, emitter.integers([0])], {"keepdims": 1})
        count = emitter.node("Cast", [total], {"to": INTEGER.value})
        count.shape = ir.Shape([1])
        sizes = emitter.node("Concat", [self.rows, emitter.integers([1])], {"axis": 0})
        self.count = self.typed(emitter.node("Expand", [count, sizes]), [None, 1])
        """How many tokens each row has [B, 1]."""
        self.order: ir.Value | None = None
        self.own: ir.Value | None = None
        self.begin: tuple[ir.Value, ir.Value] | None = None

    @staticmethod
    def typed(value: ir.Value, sizes: Sequence[int | None] | None = None) -> ir.Value:
        """A whole number's value, with its shape."""
        value.type = ir.TensorType(INTEGER)
        if sizes is not None:
            value.shape = ir.Shape(sizes)
        return value

    @cached_property
    def text_length(self) -> ir.Value:
        """How long the text is [1]."""
        return self.emitter.node("Shape", [self.text], {"start": 1, "end": 2})

    @cached_property
    def lacking(self) -> ir.Value:
        """How many places each row does not fill [B, 1]."""
        return self.typed(self.emitter.node("Sub", [self.emitter.integers([self.length]), self.count]), [None, 1])

    def filled(self, dtype: ir.DataType) -> ir.Value:
        """Which places are filled [P], as a mask."""
        return self.emitter.node("Cast", [self.shown], {"to": dtype.value})

    def turned(self, value: ir.Value) -> ir.Value:
        """Tokens and text [B, P + S, ...], each row's empty places moved behind its text."""
        emitter = self.emitter
        if self.order is None:
            whole = emitter.node("Add", [self.text_length, emitter.integers([self.length])])
            places = self.typed(emitter.node("Add", [self.counted(whole), self.lacking]), [None, None])
            self.order = self.places(emitter.node("Mod", [places, whole]))
        return self.picked(value, self.order)

    def text_of(self, value: ir.Value) -> ir.Value:
        """Of a value [B, P + S, ...] that was turned, the places of the text [B, S, ...]."""
        if self.own is None:
            places = self.emitter.node("Add", [self.counted(self.text_length), self.count])
            self.own = self.places(places)
        return self.picked(value, self.own)

    def over(self, value: ir.Value, part: ir.Value) -> ir.Value:
        """Keys or values of a sequence that was turned [B, H, L, Dh], at the filled places of which others stand, the
        last of [B, H, P, Dh]."""
        emitter = self.emitter
        if self.begin is None:
            places = self.counted(emitter.node("Shape", [value], {"start": 2, "end": 3}))
            own = self.typed(emitter.node("Add", [places, self.lacking]), [None, None])
            own = emitter.node("Min", [own, emitter.integers([self.length - 1])])
            filled = emitter.node(
                "Unsqueeze", [emitter.node("Greater", [self.count, places]), emitter.integers([1, 3])]
            )
            filled.shape = ir.Shape([None, 1, None, 1])
            self.begin = self.places(own), filled
        own, filled = self.begin
        turned = emitter.node("GatherND", [self.swapped(part), own], {"batch_dims": 1})
        turned.shape = ir.Shape([None] * 4)
        found = emitter.node("Where", [filled, self.swapped(turned), value])
        found.type, found.shape = value.type, value.shape
        return found

    def swapped(self, value: ir.Value) -> ir.Value:
        """[B, H, L, Dh] as [B, L, H, Dh], or back."""
        return self.emitter.node("Transpose", [value], {"perm": [0, 2, 1, 3]})

    def counted(self, limit: ir.Value) -> ir.Value:
        """The numbers below one [1] that the graph computes."""
        emitter = self.emitter
        scalars = [emitter.constant(np.int64(n), "number") for n in (0, 1)]
        most = emitter.node("Squeeze", [limit, emitter.integers([0])])
        most.shape = ir.Shape([])
        return self.typed(emitter.node("Range", [scalars[0], most, scalars[1]]), [None])

    def places(self, numbers: ir.Value) -> ir.Value:
        """Numbers of places [B, L] as `GatherND` reads them [B, L, 1]."""
        self.typed(numbers, [None, None])
        return self.typed(self.emitter.node("Unsqueeze", [numbers, self.emitter.integers([2])]), [None, None, 1])

    def picked(self, value: ir.Value, places: ir.Value) -> ir.Value:
        found = self.emitter.node("GatherND", [value, places], {"batch_dims": 1})
        found.type, found.shape = value.type, value.shape
        return found
