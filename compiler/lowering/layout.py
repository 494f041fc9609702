"""Values behind layout: what an operand is but for the order and the repetition of its axes.

It is told by carrying indices from a value to the operand; where lengths are unknown, as they are behind modules that
put tokens before the text, by the steps themselves.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from peltc.compiler.survey.probe import SIZES, Probe, Unprobed

LAYOUT = {"Transpose", "Reshape", "Expand", "Unsqueeze", "Identity", "Squeeze", "Tile"}
MADE_UP = 11
"""The probe's size of an axis that has no name."""


def rank(value: ir.Value | None) -> int | None:
    """How many axes a value has, where that is known."""
    return None if value is None or value.shape is None else len(value.shape)


def transposed(key: ir.Value) -> ir.Value | None:
    """What a key is the transposition of."""
    node = key.producer()
    if node is None or node.op_type != "Transpose":
        return None
    perm = list(node.attributes.get_ints("perm", ()))
    swaps = [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2]
    return node.inputs[0] if perm == swaps else None


def laid_out(operand: ir.Value, turned: bool, heads: bool) -> ir.Value | None:
    """The earliest value [B, K, T, D] that an operand is by layout alone; None where there is none.

    Args:
        turned: whether the operand is keys as a product reads them, [B, H, D, T].
        heads: whether the operand may have more heads, each of which is repeated for a group of them.
    """
    current: ir.Value | None = operand
    found = None if turned or rank(operand) != 4 else operand
    while current is not None:
        if rank(current) == 4 and current is not operand and _becomes(current, operand, turned, heads):
            found = current
        node = current.producer()
        if node is None or node.op_type not in LAYOUT:
            break
        current = node.inputs[0]
    if found is None and turned:
        found = transposed(operand) or _flatly_transposed(operand)
    while heads and found is not None and (source := _repeated(found)) is not None:
        found = source
    return found


def _becomes(source: ir.Value, operand: ir.Value, turned: bool, heads: bool) -> bool:
    """Whether layout makes an operand of a value [B, K, T, D], told by indices that are carried there."""
    indices = np.arange(np.prod(sizes := _sizes(source))).reshape(sizes)
    try:
        arrived = Probe({source: indices}).track(operand)
    except (Unprobed, ValueError, IndexError):
        return False
    if arrived is not None and arrived.ndim == 3 and len(arrived) % sizes[0] == 0:
        arrived = arrived.reshape(sizes[0], -1, *arrived.shape[-2:])
    if arrived is None or arrived.ndim != 4:
        return False
    arrived = arrived.swapaxes(-1, -2) if turned else arrived
    repeats = max(arrived.shape[1] // sizes[1], 1)
    expected = np.repeat(indices, repeats, axis=1)
    return (repeats == 1 or heads) and arrived.shape == expected.shape and bool((arrived == expected).all())


def made_of(value: ir.Value | None, kind: str) -> ir.Value | None:
    """The first input of the node that makes a value, where it is of a kind."""
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and node.op_type == kind else None


def _flatly_transposed(key: ir.Value) -> ir.Value | None:
    """What keys are the transposition of, where texts and heads are one axis meanwhile: its lengths may be unknown."""
    swapped = made_of(key, "Reshape")
    flat = made_of(swapped, "Transpose")
    swap = None if swapped is None else swapped.producer()
    if flat is None or swap is None or list(swap.attributes.get_ints("perm", ())) != [0, 2, 1]:
        return None
    source = made_of(flat, "Reshape")
    return source if rank(source) == 4 and rank(flat) == 3 and rank(key) == 4 else None


def _repeated(value: ir.Value) -> ir.Value | None:
    """[B, K, T, D], of which a value [B, H, T, D] repeats each head for a group: its lengths may be unknown."""
    narrow = made_of(made_of(value, "Reshape"), "Expand")
    apart = None if narrow is None else narrow.producer()
    if apart is None or apart.op_type not in ("Unsqueeze", "Reshape") or rank(apart.inputs[0]) != 4:
        return None
    source, five = apart.inputs[0], apart.outputs[0].shape
    assert source is not None
    if source.shape is None or value.shape is None or rank(value) != 4 or five is None or len(five) != 5:
        return None
    groups, every, width = source.shape[1], value.shape[1], source.shape[3]
    if not (isinstance(groups, int) and isinstance(every, int) and isinstance(width, int)) or value.shape[3] != width:
        return None
    known = (five[1], five[2], five[4]) if apart.op_type == "Unsqueeze" else _sizes_of(apart.inputs[1])
    return source if known == (groups, 1, width) and every % groups == 0 else None


def _sizes_of(shape: ir.Value | None) -> tuple[int, int, int] | None:
    """Heads, repetitions and features that a constant shape [B, K, R, T, D] gives."""
    if shape is None or shape.const_value is None or shape.const_value.size != 5:
        return None
    sizes = shape.const_value.numpy().tolist()
    return sizes[1], sizes[2], sizes[4]


def _sizes(value: ir.Value) -> tuple[int, ...]:
    """Sizes for a probe of a value, one for each axis that has none of its own."""
    assert value.shape is not None
    named = [size if isinstance(size, int) else SIZES.get(str(size.value)) for size in value.shape]
    return tuple(MADE_UP if size is None else size for size in named)
