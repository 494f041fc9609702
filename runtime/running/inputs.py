"""What a model is given, held against what its graph takes before it runs: types, shapes, axes that inputs share, and
the bounds that the manifest records. Nothing is cut, wrapped or rounded to whole numbers on the way."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from peltc.compiler.files.checkpoint import is_float
from peltc.spec.diagnostics import Place, fail

Array = np.ndarray[Any, Any]

TYPES = {
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_, "tensor(float)": np.float32,
    "tensor(float16)": np.float16, "tensor(bfloat16)": ml_dtypes.bfloat16, "tensor(double)": np.float64,
}  # fmt: skip
"""What inputs are given to ONNX Runtime as, which converts none itself."""
TOKENIZED = "session(**session.tokenize(text)) makes inputs of a text, or of a list of texts"
NO_LIMITS: Mapping[str, Any] = {"values": {}, "lengths": {}}
"""Of an artifact whose manifest records none."""


def converted(name: str, value: Any, kind: str) -> Array:
    """An input in the type that the graph takes, if it says the same there.

    Floats are no whole numbers, 5.0 neither; nor are truth values, except in a mask. Floats are rounded to a narrower
    float type, but not to infinity.

    Args:
        value: an array, a torch tensor on any device, or nested lists.
        kind: ONNX Runtime's name of the type, `tensor(int64)`.

    Raises:
        PeltError: E614 it does not.
    """
    array = _array(name, value)
    wanted = np.dtype(TYPES[kind]) if kind in TYPES else array.dtype
    if array.dtype == wanted or not array.size:
        return array.astype(wanted, copy=False)
    whole, given = array.dtype.kind in "iu", array.dtype
    if not (whole or given.kind == "b" or is_float(given)):
        raise fail("E614", f"the input '{name}' holds {_called(array)}", expected=f"numbers, {wanted}",
                   hint=TOKENIZED if array.dtype.kind in "US" else "")  # fmt: skip
    if wanted.kind in "iub" and is_float(given):
        odd = np.asarray(array != np.floor(array)) | ~np.isfinite(array)
        said = f"{array[_first(odd)]} {_place(_first(odd))}" if odd.any() else str(given)
        raise fail("E614", f"the input '{name}' takes whole numbers and is given {said}", expected=str(wanted),
                   hint="" if odd.any() else f"{name}.astype('{wanted}'), or .long() in torch")  # fmt: skip
    if wanted.kind in "iu" and given.kind == "b" and not name.endswith("mask"):
        raise fail("E614", f"the input '{name}' takes whole numbers and is given truth values", expected=str(wanted))
    with np.errstate(all="ignore"):
        result = array.astype(wanted)
    lost = _lost(array, result)
    if lost.any():
        at = _first(lost)
        raise fail("E614", f"the input '{name}' holds {array[at]} {_place(at)}, which {wanted} cannot hold",
                   expected=f"values of the type {wanted}")  # fmt: skip
    return result


def _array(name: str, value: Any) -> Array:
    """A value as an array of its own type; torch has one that numpy has not, bfloat16."""
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise fail("E614", f"the input '{name}' is no array: {reason}",
                   expected="one number for each position of each text, texts of equal lengths",
                   hint="pad shorter texts, and mask the padding") from None  # fmt: skip


def _called(array: Array) -> str:
    """What the elements of an array that holds no numbers are."""
    first = array.reshape(-1)[0]
    return (
        f"{type(first).__name__} values, first {str(first)[:60]!r}" if array.dtype.kind in "OUS" else str(array.dtype)
    )


def _lost(before: Array, after: Array) -> Array:
    """Where a conversion changed what is said."""
    if is_float(before.dtype):
        return np.asarray(np.isfinite(before) & ~np.isfinite(after))
    if before.dtype.kind == "b":
        return np.zeros(before.shape, np.bool_)
    if after.dtype.kind == "b":
        return np.asarray((before != 0) & (before != 1))
    if is_float(after.dtype):
        wide = after.astype(np.float64)  # exact for every narrower type
        back = np.where(np.abs(wide) < 2.0**63, wide, 0).astype(np.int64)
        return np.asarray((np.abs(wide) >= 2.0**63) | (back != before))
    info = np.iinfo(after.dtype)
    return np.asarray((before < info.min) | (before > info.max))


def _first(where: Array) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(where)[0])


def _place(at: tuple[int, ...]) -> str:
    """Where in an input, counted from 0."""
    names = ("row", "position")
    return "at " + ", ".join(f"{names[i] if i < 2 else 'feature'} {n}" for i, n in enumerate(at)) if at else "alone"


def check(feeds: Mapping[str, Array], shapes: Mapping[str, list[int | str]], limits: Mapping[str, Any]) -> None:
    """Hold inputs against a graph's inputs, whose axes have sizes or names, and against the limits of its tables.

    Raises:
        PeltError: E606, E613, E615, E616, E617, E642.
    """
    sizes = check_shapes(feeds, shapes)
    check_values(feeds, limits)
    check_tokens(feeds, limits)
    check_lengths(sizes, count_tokens(feeds, shapes), limits)


def shown(feeds: Mapping[str, Array]) -> str:
    """`'input_ids' [1, 3], 'attention_mask' [1, 5]`."""
    return ", ".join(f"'{name}' {list(array.shape)}" for name, array in feeds.items())


def check_shapes(
    feeds: Mapping[str, Array], shapes: Mapping[str, list[int | str]], hint: str = ""
) -> dict[str, tuple[int, str]]:
    """Hold shapes against those of a graph's inputs, whose axes have sizes or names.

    Args:
        hint: what may help where a size differs.

    Returns:
        For each axis that has a name, its size and the first input that has it.

    Raises:
        PeltError: E606 another number of axes, or another size than the graph's; E613 inputs that share an axis and
            differ in it; E617 inputs with nothing in them.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, array in feeds.items():
        if array.ndim != len(shapes[name]):
            one = f"of one text, {name}=[[...]]; " if array.ndim + 1 == len(shapes[name]) else ""
            raise fail("E606", f"the input '{name}' has the shape {list(array.shape)}", expected=_sizes(shapes[name]),
                       hint=one + TOKENIZED if shapes[name][1:2] == ["sequence"] else "")  # fmt: skip
    for name, array in feeds.items():
        if not array.size:
            what = "no text" if not array.shape[0] else "texts without a token"
            raise fail("E617", f"the input '{name}' is empty, {what}: its shape is {list(array.shape)}",
                       expected="at least one text of at least one token")  # fmt: skip
        for size, axis in zip(array.shape, shapes[name], strict=True):
            if isinstance(axis, int) and size != axis:
                raise fail("E606", f"the input '{name}' has the shape {list(array.shape)}",
                           expected=_sizes(shapes[name]), hint=hint)  # fmt: skip
            if isinstance(axis, str) and axis:
                other, first = sizes.setdefault(axis, (size, name))
                if other != size:
                    raise fail("E613", f"the inputs {shown({first: feeds[first], name: array})} differ in the axis"
                               f" '{axis}', which they share: {other} and {size}", expected="equal sizes")  # fmt: skip
    return sizes


def _sizes(shape: list[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def check_values(feeds: Mapping[str, Array], limits: Mapping[str, Any]) -> None:
    """Hold inputs that are looked up in tables, token ids and types, against the tables' rows.

    Raises:
        PeltError: E615 a value that has no row.
    """
    for name, rows in limits["values"].items():
        if name not in feeds or feeds[name].dtype.kind not in "iu":
            continue
        outside = np.asarray((feeds[name] < 0) | (feeds[name] >= rows))
        if outside.any():
            at = _first(outside)
            more = f" (and {outside.sum() - 1} more like it)" if outside.sum() > 1 else ""
            raise fail("E615", f"the input '{name}' holds {feeds[name][at]} {_place(at)}{more}",
                       expected=f"values from 0 to {rows - 1}: the model's table has {rows} rows",
                       hint="is the tokenizer this model's own?" if name.endswith("input_ids") else "")  # fmt: skip


def check_tokens(feeds: Mapping[str, Array], limits: Mapping[str, Any]) -> None:
    """Hold the tokens that stand for the parts of an image or a recording against what the model makes of one.

    Raises:
        PeltError: E642 a text with more of them, or fewer.
    """
    for token, count in limits.get("tokens", {}).items():
        ids = feeds.get("input_ids")
        for row, found in enumerate([] if ids is None else (ids == int(token)).sum(-1)):
            if found != count:
                raise fail(
                    "E642",
                    f"text {row} in 'input_ids' has {found} tokens {token}, which stand for what the"
                    " model sees or hears",
                    expected=f"{count} of them, one for each feature that it makes",
                    hint="the checkpoint's processor puts them there: session.prepare(text=..., image=...)",
                )


def check_lengths(
    sizes: Mapping[str, tuple[int, str]], counted: Mapping[str, int], limits: Mapping[str, Any]
) -> None:  # fmt: skip
    """Hold axes against the position tables.

    Args:
        sizes: of axes by name, each with an input that has it.
        counted: the most tokens in a text that are not padding, by axis, where a mask tells.

    Raises:
        PeltError: E616 a text that is too long.
    """
    for axis, limit in limits["lengths"].items():
        length, name = sizes.get(axis, (0, ""))
        if not limit["padding"]:
            length = min(length, counted.get(axis, length))
        if length > limit["most"]:
            raise fail("E616", f"a text of {length} tokens in the input '{name}' is too long for the model",
                       expected=f"at most {limit['most']} tokens: the model has no positions for more",
                       hint="cut the text, or give it in parts")  # fmt: skip


def count_tokens(feeds: Mapping[str, Array], shapes: Mapping[str, list[int | str]]) -> dict[str, int]:
    """The most tokens of a text that a mask lets be seen, by the axis [B, S] of the mask."""
    return {str(shapes[name][1]): int((array != 0).sum(-1).max()) for name, array in feeds.items()
            if name.endswith("mask") and array.ndim == 2}  # fmt: skip


def checked_options(options: Mapping[str, Any], kinds: Mapping[str, str], limits: Mapping[str, Any]) -> dict[str, Any]:
    """What `generate` is given, the text to continue held against what the graphs take.

    Args:
        options: of `generate`; `inputs` is its other name for the main input.
        kinds: ONNX Runtime's types of the inputs [B, S], by name.

    Returns:
        The options, those inputs as torch tensors.

    Raises:
        PeltError: E606, E613 to E617, as for a session's own call.
    """
    import torch

    found, feeds = dict(options), dict[str, Array]()
    for name, value in options.items():
        known = "input_ids" if name == "inputs" else name
        if value is not None and known in kinds:
            feeds[known] = converted(known, value, kinds[known])
            tensor = torch.as_tensor(feeds[known])
            found[name] = tensor.to(value.device) if isinstance(value, torch.Tensor) else tensor
        elif isinstance(value, np.ndarray):
            found[name] = torch.as_tensor(value)
    axes = {"decoder_input_ids": "target", "decoder_attention_mask": "target"}
    shapes: dict[str, list[int | str]] = {name: ["batch", axes.get(name, "sequence")] for name in feeds}
    if options.get("past_key_values") is not None:  # of which the mask tells too
        shapes["attention_mask"] = ["batch", "total"]
    check(feeds, shapes, limits)
    return found


@contextmanager
def translating(given: str, folder: str = "") -> Iterator[None]:
    """Say in our words what ONNX Runtime says when it cannot go on.

    Args:
        given: the inputs' shapes.

    Raises:
        PeltError: E612.
    """
    try:
        yield
    except Exception as error:
        if not (type(error).__module__.startswith("onnxruntime") or type(error) in (RuntimeError, MemoryError)):
            raise
        raise fail("E612", f"ONNX Runtime could not run the model: {essence(error)}", Place(folder),
                   hint=f"it was given {given}") from None  # fmt: skip


def essence(error: BaseException) -> str:
    """The reason in one line, without the codes, source files and conditions that it comes with."""
    text = " ".join((str(error) or type(error).__name__).split())
    node = re.search(r"while running (\w+) node", text)
    text = re.sub(r"^.*Status Message: |^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^/\S+:\d+ .*? was false\. |^/\S+:\d+ ", "", text)
    return (f"in {node.group(1)}: " if node else "") + text[:300]
