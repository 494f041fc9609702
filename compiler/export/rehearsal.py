"""A model and its short form, run on tensors without memory: whether the layers that are left out do what others do."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass
from peltc.compiler.export.stacks import SECOND, Irregular, Stack, find_stacks, shortened, unchanged
from peltc.compiler.senses.trial import silenced
from peltc.spec.diagnostics import first_line

Label = tuple[str, int]
Tape = list[tuple[Label, list[Hashable]]]


def repetitions(model: Any, inputs: Mapping[str, Any], short_inputs: Mapping[str, Any] | None = None) -> list[Stack]:
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
    try:
        with silenced():
            whole = rehearse(model, inputs, stacks)
            with shortened(model, stacks):
                short = rehearse(model, inputs if short_inputs is None else short_inputs, stacks)
    except Exception as error:
        raise Irregular(f"the rehearsal failed: {type(error).__name__}: {first_line(error)}") from error
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
