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
import logging
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

UNITS = 3
"""Units that a short stack keeps: two whose segments are compared, and the last, which nothing bounds from behind."""
WORTH = 2
"""Layers that must be saved at least; for fewer the checks cost more than the export."""

SHARED, FIRST, SECOND, LAST = -1, 0, 1, 2
"""What a value of the short graph belongs to: no unit, or the unit whose parameters it depends on at last."""

Shapes = Mapping[str, tuple[int, ...]]
Label = tuple[str, int]
Tape = list[tuple[Label, list[Hashable]]]


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
        return f"layers {self.lead} to {self.length - 1} of {self.path} {how}: {self.kept} of {self.length} exported"


# the torch model


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
    """Put back every attribute, parameter and module of a model in the end: what `forward` keeps of a run on tensors
    without memory, a table of positions say, would spoil the next."""
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


# the rehearsal


def plan(model: Any, inputs: Mapping[str, Any], short_inputs: Mapping[str, Any] | None = None) -> list[Stack]:
    """The stacks to shorten, shown to be repetitive by a rehearsal of the whole model and of the short one.

    Args:
        model: a torch model.
        inputs: what its `forward` is called with.
        short_inputs: the same for the model shortened by all of `find_stacks`, where its caches are shorter.

    Raises:
        Irregular: no stack is worth it, or the layers that would be left out do something of their own.
    """
    stacks = _with_caches(find_stacks(model), inputs)
    if not stacks:
        raise Irregular("no list of layers is long and equal enough")
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch logs an operation that has no memory-less form, besides raising it
    try:
        whole = rehearse(model, inputs, stacks)
        with shortened(model, stacks):
            short = rehearse(model, inputs if short_inputs is None else short_inputs, stacks)
    except Exception as error:
        raise Irregular(f"the rehearsal failed: {type(error).__name__}: {_first_line(error)}") from error
    finally:
        logging.disable(level)
    compare(whole, short, stacks)
    ran = {path for (path, _), _ in whole}
    stacks = [stack for stack in stacks if stack.path in ran]  # a decoder's graph has no part of the encoder
    if not stacks:
        raise Irregular("no list of layers that are equal runs")
    owners = [stack.path for stack in stacks for _ in stack.caches]
    if len({cache for stack in stacks for cache in stack.caches}) < len(owners):
        raise Irregular(f"a cache may be that of {' or '.join(dict.fromkeys(owners))}")
    return stacks


def _with_caches(stacks: Sequence[Stack], inputs: Mapping[str, Any]) -> list[Stack]:
    """The stacks with the caches that they may have: lists of tensors among the inputs that are as long."""
    lists: dict[str, set[int]] = {}
    for name in _leaves(inputs):
        for found in re.finditer(r"\.(\d+)(?!\w)", name):
            lists.setdefault(name[: found.start()], set()).add(int(found[1]))
    return [
        replace(stack, caches=tuple(name for name, layers in lists.items() if layers == {*range(stack.length)}))
        for stack in stacks
    ]


def _leaves(values: Any) -> dict[str, Any]:
    """The tensors within some values, by the names that the exporter gives them."""
    from transformers.exporters.utils import get_leaf_tensors

    return dict(get_leaf_tensors(values))


def rehearse(model: Any, inputs: Mapping[str, Any], stacks: Sequence[Stack]) -> Tape:
    """Run a model on tensors without memory and write down what it does, unit by unit.

    A unit is labelled with its stack and number, the last with -1, so that a whole and a short model agree; what comes
    before the first unit is labelled `("", 0)`. Each operation is written down with its arguments: numbers as they
    are; parameters of the unit, and its entries of a cache, relative to it; tensors by the operation they come from,
    counted within the same unit or the one before, or else by that unit's label. What the model returns is written
    down in the end, and with the unit where it is the unit's entry of a cache. Equal tapes are thus equal computations.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

    tape: Tape = [(("", 0), [])]
    by_path = {stack.path: stack for stack in stacks}
    begins = [0]  # the first layer of each unit on the tape
    names = {id(t): name for pairs in (model.named_parameters, model.named_buffers) for name, t in pairs()}
    origins: dict[int, tuple[int, int, int]] = {}
    alive: list[Any] = []  # an id is an identity only as long as its tensor lives

    def describe(leaf: Any, reader: int = -1) -> Hashable:
        if not isinstance(leaf, torch.Tensor):
            return repr(leaf)
        reader %= len(tape)
        (path, _), _ = tape[reader]
        if id(leaf) in origins:
            segment, operation, position = origins[id(leaf)]
            back = reader - segment
            return ("made", back if back < 2 else tape[segment][0], operation, position)
        if id(leaf) in names:
            name = names[id(leaf)]
            layer = by_path[path].layer(name) if path else None
            if layer is None or not 0 <= layer - begins[reader] < by_path[path].period:
                return ("named", name)
            return ("own", layer - begins[reader], by_path[path].part(name))
        constant = getattr(leaf, "constant", leaf)
        if constant is None or constant.is_meta or type(constant) is not torch.Tensor:
            raise Irregular(f"a tensor of shape {list(leaf.shape)} comes from nowhere")
        with unset_fake_temporarily():
            return ("constant", str(leaf.dtype), tuple(leaf.shape), repr(constant.tolist()))

    class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            told = repr(tree_map(describe, (args, kwargs or {})))
            result = func(*args, **(kwargs or {}))
            operations = tape[-1][1]
            operations.append((str(func), told))
            for position, leaf in enumerate(tree_leaves(result)):
                if isinstance(leaf, torch.Tensor):
                    origins[id(leaf)] = len(tape) - 1, len(operations) - 1, position
                    alive.append(leaf)
            return result

    def enter(label: Label, start: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            begins.append(start)
            tape.append((label, []))

        return hook

    with unchanged(model):
        for stack in stacks:
            layers = list(model.get_submodule(stack.path))
            for start in range(stack.lead, len(layers), stack.period):
                last = start + stack.period == len(layers)
                label = stack.path, -1 if last else (start - stack.lead) // stack.period
                layers[start].register_forward_pre_hook(enter(label, start))
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
            given = tree_map_only(torch.Tensor, fake.from_tensor, dict(inputs))
            read = _leaves(given)
            alive += read.values()  # a cache forgets what it is given
            names |= {id(tensor): name for name, tensor in read.items()}
            with Recorder():  # type: ignore[no-untyped-call]
                result = model(**given)
            returned: list[Hashable] = []
            for name, leaf in _leaves(result).items():
                if (segment := _home(name, tape, begins, stacks)) is None:
                    returned.append((name, describe(leaf)))
                else:
                    path = tape[segment][0][0]
                    layer = by_path[path].layer(name) or 0
                    told = describe(leaf, segment)
                    tape[segment][1].append(("return", layer - begins[segment], by_path[path].part(name), told))
            tape[-1][1].append(("return", *returned))
    return tape


def _home(name: str, tape: Tape, begins: Sequence[int], stacks: Sequence[Stack]) -> int | None:
    """Where on a tape the unit is that a returned tensor is a cache's entry of, if it is one's."""
    for stack in stacks:
        layer = stack.layer(name)
        if layer is not None and stack.cached(name):
            for segment, ((path, _), _) in enumerate(tape):
                if path == stack.path and 0 <= layer - begins[segment] < stack.period:
                    return segment
    return None


def compare(whole: Tape, short: Tape, stacks: Sequence[Stack]) -> None:
    """Check that a whole model does what its short form does, with the second unit of each stack repeated.

    Raises:
        Irregular: it does something else.
    """
    reference = dict(short)
    by_path = {stack.path: stack for stack in stacks}
    expected: list[tuple[Label, Label]] = []  # of the whole model, and what it must equal in the short one
    for label, _ in short:
        expected.append((label, label))
        if label[0] and label[1] == SECOND:
            expected += [((label[0], SECOND + copy), label) for copy in range(1, by_path[label[0]].copies + 1)]
    if len(reference) != len(short) or [label for label, _ in whole] != [label for label, _ in expected]:
        raise Irregular("the layers do not run each once, in their order")
    for (label, operations), (_, model) in zip(whole, expected, strict=True):
        if operations == reference[model]:
            continue
        if label == model:
            raise Irregular(f"what {label[0] or 'the model'} does depends on the number of layers")
        stack = by_path[label[0]]
        start = stack.lead + label[1] * stack.period
        where = f"layer {start}" if stack.period == 1 else f"layers {start} to {start + stack.period - 1}"
        raise Irregular(f"{where} of {stack.path} and the layers before compute different things")


# the graph


def grow(model: ir.Model, parameters: Shapes, stacks: Sequence[Stack]) -> dict[str, tuple[int, ...]]:
    """Give the graph of a short model all layers, in place. Returns the shapes of its parameters, in layer order.

    Args:
        model: a cleaned graph; its parameters are graph inputs.
        parameters: their shapes by name.
        stacks: the stacks that were shortened.

    Raises:
        Irregular: the segments of two units are not isomorphic, or are not joined like a chain. The graph is of no use
            then.
    """
    shapes = dict(parameters)
    for stack in stacks:
        shapes = _Growth(model.graph, shapes, stack).run()
    return shapes


class _Growth:
    """One stack of a graph, on its way from the short to the full length."""

    def __init__(self, graph: ir.Graph, parameters: Shapes, stack: Stack):
        self.graph = graph
        self.parameters = parameters
        self.stack = stack
        self.own: dict[ir.Value, int] = {}
        self.level: dict[ir.Value, int] = {}
        self.segments: dict[int, list[ir.Node]] = {SHARED: [], FIRST: [], SECOND: [], LAST: []}
        self.image: dict[ir.Value, ir.Value] = {}
        self.carried: dict[ir.Value, ir.Value] = {}
        self.taken = {v.name for v in (*graph.inputs, *graph.initializers.values())}
        for node in graph:
            self.taken |= {node.name, *(v.name for v in node.outputs)}

    def run(self) -> dict[str, tuple[int, ...]]:
        self.divide()
        self.match()
        self.check_ends()
        return self.copy()

    def divide(self) -> None:
        """Find each value's level, and thereby the segments."""
        import onnx_ir as ir

        for value in self.graph.inputs:
            name = value.name or ""
            if (name in self.parameters or self.stack.cached(name)) and (unit := self.stack.unit(name)) != SHARED:
                self.own[value] = unit
        self.level |= self.own
        for node in self.graph:
            if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
                raise Irregular(f"the graph has control flow, {node.op_type}")
            level = SHARED
            if not self.measures(node):
                level = max((self.of(value) for value in node.inputs), default=SHARED)
            self.segments[level].append(node)
            if level != SHARED:
                self.level.update(dict.fromkeys(node.outputs, level))
        if not self.segments[FIRST]:
            raise Irregular(f"the graph does not depend on {self.stack.path}")

    def of(self, value: ir.Value | None) -> int:
        """A value's level."""
        return SHARED if value is None else self.level.get(value, SHARED)

    def measures(self, node: ir.Node) -> bool:
        """Whether a node reads, on behalf of all units, the shape of one unit's entry of a cache: the exporter asks
        any layer how many tokens are cached. That all entries have this shape is checked; where each unit asks for the
        shape of its own, the answers stay apart."""
        entry = node.inputs[0] if (node.domain, node.op_type) == ("", "Shape") else None
        if entry is None or entry not in self.own or not self.stack.cached(entry.name or ""):
            return False
        names = {self.stack.shift(entry.name or "", units) for units in range(-LAST, LAST + 1)}
        alike = [value for value in self.own if value.name in names]
        askers = {sum(_same_node(user, node) for user in value.consumers()) for value in alike}
        shape = entry.shape
        known = shape is not None and all(isinstance(size, int) or size.value is not None for size in shape)
        return known and len(alike) == UNITS and len(askers) > 1 and all(value.shape == shape for value in alike)

    def match(self) -> None:
        """Map the first segment onto the second: node by node, in order."""
        first, second = self.segments[FIRST], self.segments[SECOND]
        if len(first) != len(second):
            raise Irregular(f"two units of {self.stack.path} have {len(first)} and {len(second)} nodes")
        for one, other in zip(first, second, strict=True):
            if not _same_node(one, other):
                raise Irregular(f"two units of {self.stack.path} differ at {one.name} and {other.name}")
            for a, b in zip(one.inputs, other.inputs, strict=True):
                if not self.same_input(a, b):
                    raise Irregular(f"two units of {self.stack.path} are wired differently at {one.name}, {other.name}")
            self.image.update(zip(one.outputs, other.outputs, strict=True))

    def same_input(self, a: ir.Value | None, b: ir.Value | None) -> bool:
        """Whether a value is to the first segment what another is to the second: the unit's own, handed over by the
        unit before, or shared by all."""
        if a is None or b is None:
            return a is b
        if b in self.own:
            return a in self.own and self.of(b) == SECOND and b.name == self.stack.shift(a.name or "", 1)
        if self.of(b) == SECOND:
            return self.image.get(a) is b
        if self.of(b) == FIRST:
            return self.of(a) == SHARED and self.carried.setdefault(b, a) is a
        return self.of(a) == SHARED and (a is b or _same_constant(a, b))

    def check_ends(self) -> None:
        """Check that the segments form a chain: each is read by the next alone, the last unit reads what the others
        read, and each returns its entries of the caches and nothing else."""
        returned: dict[int, dict[str, ir.Value]] = {FIRST: {}, SECOND: {}, LAST: {}}
        for value in self.graph.outputs:
            name, level = value.name or "", self.of(value)
            unit = self.stack.unit(name) if self.stack.cached(name) else SHARED
            if unit != level and (unit != SHARED or level != LAST):
                raise Irregular(f"an output of the graph comes from the middle of {self.stack.path}")
            if unit != SHARED:
                returned[unit][self.stack.shift(name, LAST - unit)] = value
        one, other, last = (returned[unit] for unit in (FIRST, SECOND, LAST))
        if not one.keys() == other.keys() == last.keys() or any(self.image.get(one[n]) is not other[n] for n in one):
            raise Irregular(f"the units of {self.stack.path} return different parts of a cache")
        read = {value for node in self.segments[LAST] for value in node.inputs if value is not None}
        if any(self.of(value) == FIRST or (self.of(value) == SECOND and value.producer() is None) for value in read):
            raise Irregular(f"{self.stack.path} is no chain: a unit is read past the next one")
        if not self.carried or not all(self.image[value] in read for value in self.carried):
            raise Irregular(f"{self.stack.path} is no chain: the last unit does not read what the others read")

    def copy(self) -> dict[str, tuple[int, ...]]:
        """Copy the second segment, join the copies, and move the last unit to its place."""
        graph, stack = self.graph, self.stack
        nodes: list[ir.Node] = []
        for value, unit in self.own.items():
            if unit == LAST:
                value.name = stack.shift(value.name or "", stack.copies)
        for value in graph.outputs:
            if stack.cached(value.name or "") and stack.unit(value.name or "") == LAST:
                value.name = stack.shift(value.name or "", stack.copies)
        for node in self.segments[LAST]:
            _move_scope(node, stack, stack.copies)
        own = [value for value, unit in self.own.items() if unit == SECOND]
        copied = [{v: _like(v, stack.shift(v.name or "", copy)) for v in own} for copy in range(1, stack.copies + 1)]
        self.insert(graph.inputs, own, copied)
        before = {value: value for node in self.segments[SECOND] for value in node.outputs}
        for copy, now in enumerate(copied, 1):
            for node in self.segments[SECOND]:
                nodes.append(self.copy_node(node, copy, now, before))
            before = now
        self.insert(graph.outputs, [value for value in graph.outputs if self.of(value) == SECOND], copied)
        graph.insert_before(self.segments[LAST][0], nodes)
        for node in self.segments[LAST]:
            for index, source in enumerate(node.inputs):
                if source is not None and source in before:
                    node.replace_input_with(index, before[source])
        graph.sort()
        shapes = {stack.shift(n, stack.copies) if stack.unit(n) == LAST else n: s for n, s in self.parameters.items()}
        for name in (value.name or "" for value in own if value.name in self.parameters):
            for copy in range(1, stack.copies + 1):
                shapes[stack.shift(name, copy)] = self.parameters[name]
        return {value.name: shapes[value.name] for value in graph.inputs if value.name in shapes}

    def insert(
        self,
        listed: MutableSequence[ir.Value],
        values: Sequence[ir.Value],
        copied: Sequence[Mapping[ir.Value, ir.Value]],
    ) -> None:
        """Put the copies of some inputs or outputs after them, in the order of layers; a cache has a place of its own.

        Args:
            listed: the inputs or outputs of the graph, in place.
            values: those of the second unit.
            copied: the values of each copy, by those of the second unit.
        """
        groups: dict[str | None, list[ir.Value]] = {}
        for value in values:
            groups.setdefault(self.stack.cached(value.name or ""), []).append(value)
        for group in groups.values():
            position = max(listed.index(value) for value in group) + 1
            for now in copied:
                for value in group:
                    listed.insert(position, now[value])
                    position += 1

    def copy_node(
        self, node: ir.Node, copy: int, now: dict[ir.Value, ir.Value], before: Mapping[ir.Value, ir.Value]
    ) -> ir.Node:
        """A copy of a node of the second segment.

        Args:
            node: the node.
            copy: the copy's number, from 1.
            now: the copy's own values, by those of the segment; the node's are added.
            before: the same for the copy before.
        """
        import onnx_ir as ir

        inputs: list[ir.Value | None] = []
        for value in node.inputs:
            if value is not None and value in self.carried:
                inputs.append(before[self.image[value]])
            else:
                inputs.append(None if value is None else now.get(value, value))
        for value in node.outputs:
            entry = value.is_graph_output() and self.stack.shift(value.name or "", copy)
            now[value] = _like(value, entry or self.fresh(value.name, copy))
        clone = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            node.attributes.values(),
            overload=node.overload,
            outputs=[now[value] for value in node.outputs],
            version=node.version,
            name=self.fresh(node.name, copy),
            metadata_props=dict(node.metadata_props),
        )
        _move_scope(clone, self.stack, copy)
        return clone

    def fresh(self, name: str | None, copy: int) -> str | None:
        """A name that the graph does not have."""
        if not name:
            return name
        found = f"{name}.{copy}"
        while found in self.taken:
            found += "_"
        self.taken.add(found)
        return found


def _same_node(one: ir.Node, other: ir.Node) -> bool:
    """Whether two nodes compute the same of their inputs."""
    if one.op_identifier() != other.op_identifier() or one.version != other.version:
        return False
    if (len(one.inputs), len(one.outputs)) != (len(other.inputs), len(other.outputs)):
        return False
    if one.attributes.keys() != other.attributes.keys():
        return False
    if not all(_same_attribute(one.attributes[key], other.attributes[key]) for key in one.attributes):
        return False
    return all(a.type == b.type and a.shape == b.shape for a, b in zip(one.outputs, other.outputs, strict=True))


def _same_attribute(one: ir.Attr, other: ir.Attr) -> bool:
    import onnx_ir as ir

    if one.type != other.type or one.is_ref() or other.is_ref():
        return False
    if one.type == ir.AttributeType.TENSOR:
        return _same_tensor(one.value, other.value)
    return bool(one.value == other.value)


def _same_constant(one: ir.Value, other: ir.Value) -> bool:
    constants = one.const_value, other.const_value
    return one.is_initializer() and other.is_initializer() and None not in constants and _same_tensor(*constants)


def _same_tensor(one: Any, other: Any) -> bool:
    return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())


def _like(value: ir.Value, name: str | None) -> ir.Value:
    """A new value with the type, the shape and the metadata of another."""
    import onnx_ir as ir

    shape = None if value.shape is None else value.shape.copy()
    return ir.Value(name=name, shape=shape, type=value.type, metadata_props=dict(value.metadata_props))


def _move_scope(node: ir.Node, stack: Stack, units: int) -> None:
    """Let a node's metadata name the layer that it now belongs to."""
    for key, text in node.metadata_props.items():
        node.metadata_props[key] = stack.shift(text, units)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
