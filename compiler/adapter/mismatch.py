"""Tensors that do not fit a plan: one finding per kind, with the count, the first names, and what sets the file apart.

E402 24 of the 24 tensors that the spec asks for are missing: 'lora.encoder.layers.0.attention.query.A', ...
hint: the file holds 24 tensors of 'mine' at attention.query, layers 0 to 11; the spec asks for 24 tensors of 'lora'
      at attention.query, layers 0 to 11: call the attachment so, `name: mine`
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from peltc.compiler.files.checkpoint import is_float
from peltc.spec.diagnostics import Diagnostic, Place, nearest
from peltc.spec.formula.dims import shape_text
from peltc.spec.stacks import STACKS

Stored = tuple[tuple[int, ...], np.dtype[Any]]
SHOWN, LONGEST, NEAR = 3, 160, 100
"""How many names are shown, how much of each, and among how many a similar one is sought."""
_PLACE = re.compile(rf"^(?:(?P<stack>{'|'.join(STACKS)})\.)?(?:layers\.(?P<layer>\d+)(?:\.|$))?(?P<role>.*)$")


def mismatches(
    wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, Stored], left: Collection[str], place: Place
) -> list[Diagnostic]:
    """What is wrong with tensors, by name, shape and type.

    Args:
        wanted: shapes by name.
        given: shapes and types by name.
        left: names among those given that nothing takes.
        place: the file.

    Returns:
        At most one each of E402 missing, E403 left over, E404 misshapen or of another type.
    """
    missing = [name for name in wanted if name not in given]
    wrong = [(name, *_difference(given[name], shape)) for name, shape in wanted.items()
             if name in given and _difference(given[name], shape)]  # fmt: skip
    look = _look(wanted, given) if len(missing) + len(left) > 1 else ""
    findings = []
    if missing:
        message = f"the tensor '{_cut(missing[0])}' is missing"
        if len(missing) > 1:
            message = (
                f"{len(missing)} of the {len(wanted)} tensors that the spec asks for are missing: {names(missing)}"
            )
        hint = look if len(missing) > 1 else _meant(missing[0], left) or look
        expected = "; ".join(shape_text(wanted[name]) for name in missing[:SHOWN]) + _more(missing)
        findings.append(Diagnostic("E402", message, place, expected, hint))
    if left:
        first = next(iter(left))
        message = f"no module of the spec takes the tensor '{_cut(first)}'"
        if len(left) > 1:
            message = f"no module of the spec takes {len(left)} of the {len(given)} tensors: {names(left)}"
        hint = _meant(first, missing) if len(left) == 1 else ""
        findings.append(
            Diagnostic("E403", message, place, hint=hint or ("" if look in [f.hint for f in findings] else look))
        )
    if wrong:
        said = [f"'{_cut(name)}' {found}" for name, found, _ in wrong]
        message = f"the tensor {said[0]}" if len(wrong) == 1 else f"{len(wrong)} tensors are not as the spec has them: "
        message += "" if len(wrong) == 1 else ", ".join(said[:SHOWN]) + _more(wrong)
        expected = "; ".join(wish for _, _, wish in wrong[:SHOWN]) + _more(wrong)
        findings.append(Diagnostic("E404", message, place, expected))
    return findings


def _meant(name: str, others: Collection[str]) -> str:
    """The hint at the nearest of the names that are without a counterpart too, where there are few of them."""
    return nearest(name, others) if len(others) <= NEAR else ""


def _difference(stored: Stored, shape: tuple[int, ...]) -> tuple[str, str] | tuple[()]:
    """What a tensor is and should be, where these differ."""
    if stored[0] != shape:
        return f"is {shape_text(stored[0])}", shape_text(shape)
    return () if is_float(stored[1]) else (f"holds {stored[1]}", "a float type")


def names(listed: Iterable[str]) -> str:
    """The first of some names."""
    every = list(listed)
    return ", ".join(f"'{_cut(name)}'" for name in every[:SHOWN]) + _more(every)


def _more(listed: Sequence[object]) -> str:
    return ", ..." if len(listed) > SHOWN else ""


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST else name[:LONGEST] + "..."


def _look(wanted: Collection[str], given: Collection[str]) -> str:
    """What the file holds beside what is asked for, and what would make them one, where a name would."""
    if not given:
        return "the file holds no tensors"
    if not any(name.count(".") for name in given):
        return f"the file holds {len(given)} tensors, whose names are not `<attachment>.<site>.<parameter>`"
    text = f"the file holds {_held(given)}; the spec asks for {_held(wanted) if wanted else 'none'}"
    mine, own = ({name.partition(".")[0] for name in group} for group in (given, wanted))
    if len(mine) == len(own) == 1 and mine != own:
        (old,), (new,) = own, mine
        if {name.replace(old, new, 1) for name in wanted} == set(given):
            return f"{text}: call the attachment so, `name: {_cut(new)}`"
    return text


def _held(group: Collection[str]) -> str:
    """Names in words: `24 tensors of 'lora' at attention.query, layers 0 to 11`."""
    attachments, roles, layers = dict[str, None](), dict[str, None](), set[tuple[str, int]]()
    for name in group:
        attachment, _, rest = name.partition(".")
        found = _PLACE.match(rest.rpartition(".")[0])
        attachments[attachment] = None
        if found is not None and found["role"]:
            roles[found["role"]] = None
        if found is not None and found["layer"] is not None and len(found["layer"]) < 6:
            layers.add((found["stack"] or "", int(found["layer"])))
    at = f" at {_few(roles)}" if roles else ""
    where = "; ".join(_layers(stack, {n for s, n in layers if s == stack}) for stack in sorted({s for s, _ in layers}))
    of = _few(repr(name) for name in attachments)
    return f"{len(group)} tensors of {of}{at}{f', {where}' if where else ''}"


def _few(words: Iterable[str]) -> str:
    every = [_cut(word) for word in words]
    return ", ".join(every[:SHOWN]) + (f" and {len(every) - SHOWN} more" if len(every) > SHOWN else "")


def _layers(stack: str, numbers: set[int]) -> str:
    return f"{stack} layers {', '.join(_ranges(sorted(numbers)))}".strip()


def _ranges(numbers: list[int]) -> Iterator[str]:
    """`0 to 3`, `7`: numbers in order as ranges, the first few."""
    starts = [i for i in range(len(numbers)) if i == 0 or numbers[i] != numbers[i - 1] + 1]
    for begin, end in zip(starts[: 2 * SHOWN], [*starts[1:], len(numbers)], strict=False):
        low, high = numbers[begin], numbers[end - 1]
        yield str(low) if low == high else f"{low} to {high}"
    if len(starts) > 2 * SHOWN:
        yield "..."
