"""Export a few of a model's equal layers, and repeat them in the graph.

    model.layers  0 1 2 3 … 21  ──shorten──►  0 1 2  ──export, clean──►  [0] [1] [2]  ──grow──►  [0] [1] [1]' … [2]'

Most of an export's time is tracing and optimising layers that are equal. A stack, that is a list of layers whose tail
repeats (each layer, or each group of `period` layers), is cut to three units. In the cleaned graph the *segment* of a
unit is what depends on its parameters and on those of no later unit. The first two segments are bounded on both
sides; they are compared node by node, which shows what one segment hands to the next and what all of them share.
Then the second is copied as often as units are missing, and the third, with all that follows the stack, reads the last
copy. Where a graph reads and returns a cache, a list with an entry for each layer (`past_key_values.layers.3.keys`), an
entry belongs to its layer as a parameter does: it is an input and an output of that layer's segment.

Nothing is repeated on trust. Layers are candidates where modules, shapes and attributes agree (`find_stacks`); the
whole and the short model are run on tensors without memory, and every missing layer must do exactly what the last
layer but one of the short model does (`rehearse`, `compare`); the graph's segments must be isomorphic (`grow`). Where
anything is not as expected, `Irregular` says what, and the caller exports the whole model.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

UNITS = 3
"""Units that a short stack keeps: two whose segments are compared, and the last, which nothing bounds from behind."""
WORTH = 2
"""Layers that must be saved at least; for fewer the checks cost more than the export."""
SHARED, FIRST, SECOND, LAST = -1, 0, 1, 2
"""What a value of the short graph belongs to: no unit, or the unit whose parameters it depends on at last."""

Shapes = Mapping[str, tuple[int, ...]]


class Irregular(Exception):
    """Why layers cannot be repeated. No error: the whole model is exported then."""


@dataclass(frozen=True)
class Stack:
    """A list of layers that repeats from some layer on, to its end.

    Attributes:
        path: the list's name in the model, `model.layers`.
        length: number of layers.
        lead: number of layers before the repetition.
        period: number of layers in a unit, which repeats as a whole.
        caches: names of the lists among the model's inputs that have an entry for each layer,
            `past_key_values.layers`.
    """

    path: str
    length: int
    lead: int
    period: int
    caches: tuple[str, ...] = ()

    @property
    def kept(self) -> int:
        """Number of layers of the short stack."""
        return self.lead + UNITS * self.period

    @property
    def copies(self) -> int:
        """Number of units that the short stack lacks."""
        return (self.length - self.kept) // self.period

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        # a cache that a graph both reads and returns is called `input.` and `output.` there
        lists = "|".join(map(re.escape, (self.path, *self.caches)))
        return re.compile(rf"(?<![\w.])((?:(?:in|out)put\.)?({lists}))\.(\d+)(?!\w)")

    def layer(self, name: str) -> int | None:
        """The layer that a parameter or an entry of a cache belongs to."""
        found = self._pattern.match(name)
        return int(found[3]) if found else None

    def unit(self, name: str) -> int:
        """The unit that a parameter or an entry of a cache belongs to; `SHARED` for those of the lead and of other
        modules."""
        layer = self.layer(name)
        return SHARED if layer is None or layer < self.lead else (layer - self.lead) // self.period

    def cached(self, name: str) -> str | None:
        """The list that an entry of a cache is in, as the name has it; none for any other name."""
        found = self._pattern.match(name)
        return found[1] if found and found[2] in self.caches else None

    def part(self, name: str) -> str:
        """A name without its layer's number."""
        return self._pattern.sub(r"\1", name, count=1)

    def shift(self, text: str, units: int) -> str:
        """A text with the names of the repeated layers moved on by some units."""

        def moved(found: re.Match[str]) -> str:
            layer = int(found[3])
            return f"{found[1]}.{layer + units * self.period if layer >= self.lead else layer}"

        return self._pattern.sub(moved, text)

    def __str__(self) -> str:
        how = "are equal" if self.period == 1 else f"repeat by {self.period}"
        layers = f"layers {self.lead} to {self.length - 1} of {self.path}"
        return f"{layers} {how}: {self.kept} of {self.length} are exported, the others repeat them"


def find_stacks(model: Any) -> list[Stack]:
    """The lists of layers that are worth shortening; of nested lists the outermost."""
    import torch

    names: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        names[id(module)] = names.get(id(module), 0) + 1
    found: list[Stack] = []
    for path, stack in model.named_modules():
        inside = any(path.startswith(outer.path + ".") for outer in found)
        if path and not inside and isinstance(stack, torch.nn.ModuleList):
            layers = list(stack)
            owner = model.get_submodule(path.rpartition(".")[0])
            repetition = _repetition(_kinds(layers, _schedules((owner, model), len(layers))))
            if repetition and all(names[id(layer)] == 1 for layer in layers):
                found.append(Stack(path, len(layers), *repetition))
    return found


def _repetition(kinds: Sequence[int]) -> tuple[int, int] | None:
    """Prefix and period of the repetition at the end of a list that leaves the fewest items, if it is worth it."""
    best: tuple[int, int, int] | None = None
    for period in range(1, len(kinds) // UNITS + 1):
        lead = len(kinds) - period
        while lead > 0 and kinds[lead - 1] == kinds[lead - 1 + period]:
            lead -= 1
        lead += (len(kinds) - lead) % period
        kept = lead + UNITS * period
        if kept <= len(kinds) - WORTH and (best is None or kept < best[0]):
            best = kept, lead, period
    return best[1:] if best else None


def _kinds(layers: Sequence[Any], schedules: Sequence[Sequence[Any]]) -> list[int]:
    """For each layer, the first layer that equals it."""
    kinds: list[int] = []
    for index, layer in enumerate(layers):
        for first in dict.fromkeys(kinds):
            listed = all(same(schedule[first], schedule[index]) for schedule in schedules)
            if listed and same(layers[first], layer, index - first):
                kinds.append(first)
                break
        else:
            kinds.append(index)
    return kinds


def _schedules(owners: Sequence[Any], length: int) -> list[Sequence[Any]]:
    """What configs and owners list layer by layer: any sequence as long as the stack is taken for such a list."""
    pending: list[Any] = []
    for owner in owners:
        config: Any = getattr(owner, "config", None)
        pending += [vars(owner), config.to_dict() if hasattr(config, "to_dict") else None]
    found: list[Sequence[Any]] = []
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            pending.extend(v for key, v in value.items() if key != "_modules")
        elif isinstance(value, list | tuple) and len(value) == length:
            found.append(value)
    return found


def same(one: Any, other: Any, apart: int = 0, seen: set[tuple[int, int]] | None = None) -> bool:
    """Whether two layers, or what they are made of, are equal in all but the values of their parameters.

    Args:
        one, other: the things to compare.
        apart: how many layers lie between them: integers, and those within texts, may differ by as much, since such
            are a layer's number. If they are more than that, the layers compute something else, which `compare` finds.
        seen: pairs under comparison.
    """
    import torch

    seen = set() if seen is None else seen
    if one is other or (id(one), id(other)) in seen:
        return True
    if type(one) is not type(other):
        return False
    seen.add((id(one), id(other)))
    if isinstance(one, torch.nn.Module):
        return same(vars(one), vars(other), apart, seen)
    if isinstance(one, torch.Tensor):
        facts = [(t.shape, t.dtype, t.device, t.layout, t.requires_grad) for t in (one, other)]
        free = isinstance(one, torch.nn.Parameter) or one.is_meta
        return facts[0] == facts[1] and (free or torch.equal(one, other))
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(one[key], other[key], apart, seen) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b, apart, seen) for a, b in zip(one, other, strict=True))
    if isinstance(one, MethodType):
        return one.__func__ is other.__func__ and same(one.__self__, other.__self__, apart, seen)
    if isinstance(one, functools.partial):
        parts = [(p.func, p.args, p.keywords) for p in (one, other)]
        return same(parts[0], parts[1], apart, seen)
    if isinstance(one, int) and not isinstance(one, bool):
        return bool(other - one in (0, apart))
    if isinstance(one, str):
        return bool(one == other or re.sub(r"\d+", lambda found: str(int(found[0]) + apart), one) == other)
    equal: object = one == other
    return equal is True  # arrays and the like answer with something else, and count as different


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Within this context a model may be run on tensors without memory. Afterwards each of its attributes, parameters
    and modules is what it was: a table of positions, for example, that `forward` computed and kept would hold no
    values."""
    attributes = [vars(module) for module in model.modules()]
    saved = [(table, dict(table)) for table in attributes]
    saved += [(inner, dict(inner)) for table in attributes for inner in table.values() if isinstance(inner, dict)]
    try:
        yield
    finally:
        for table, content in saved:
            table.clear()
            table.update(content)


@contextlib.contextmanager
def shortened(model: Any, stacks: Sequence[Stack]) -> Iterator[None]:
    """The model without the layers that its graph is grown by."""
    with unchanged(model):
        for stack in stacks:
            layers = model.get_submodule(stack.path)._modules
            for key in list(layers)[stack.kept :]:
                del layers[key]
        yield
