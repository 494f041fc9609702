"""A request of the Open Inference Protocol, version 2, whichever door it came through: its tensors, and its profiles.
Names of types are the protocol's.

https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peltc.spec.diagnostics import PeltError, fail, one_of

Array = np.ndarray[Any, Any]
PROFILE = "profile"
"""What says the profile: a parameter of the request, for all of its texts, or an input of type BYTES with a name for
each; no name, or an empty one, is the bare base."""
TYPES: dict[str, Any] = {
    "BOOL": np.bool_, "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8,
    "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64, "FP16": np.float16, "FP32": np.float32,
    "FP64": np.float64,
}  # fmt: skip
NAMES = {np.dtype(kind): name for name, kind in TYPES.items()}
GRAPH = {"bool": "BOOL", "float16": "FP16", "bfloat16": "FP32", "float": "FP32", "double": "FP64"}
"""ONNX Runtime's names of types that are not the protocol's in small letters; bfloat16, which the protocol does not
have, is float32 in requests and responses."""


@dataclass(frozen=True)
class Inference:
    """A request.

    Attributes:
        id: the caller's name for it, which the response repeats.
        inputs: arrays by name.
        profile: the name of the profile of all texts, or a list with one for each.
        outputs: the names of the outputs that are wanted, and whether each is wanted as bytes; None for all.
        binary: whether outputs are wanted as bytes where nothing else is said.
    """

    id: str
    inputs: dict[str, Array]
    profile: str | list[str | None] | None
    outputs: dict[str, bool] | None
    binary: bool


def wrong(what: str, expected: str = "") -> PeltError:
    """The finding about a request that is not the protocol's."""
    return fail("E801", what, expected=expected)


def datatype(kind: str) -> str:
    """The protocol's name of a type that ONNX Runtime calls `tensor(int64)`: that in which it is given and answered."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return GRAPH.get(name, name.upper())


def plain(array: Array) -> Array:
    """An output in a type that the protocol has: float32 in place of those that it has not."""
    return array if array.dtype in NAMES else array.astype(np.float32)


def check_shape(name: str, kind: object, shape: Sequence[object]) -> None:
    """Whether a tensor is of a type and a shape that there are.

    Raises:
        PeltError: E801.
    """
    if kind not in TYPES and kind != "BYTES":
        raise wrong(f"the input {name!r:.60} has the datatype {kind!r:.40}", one_of([*TYPES, "BYTES"]))
    if not all(type(size) is int and 0 <= size < 1 << 31 for size in shape) or len(shape) > 8:
        raise wrong(f"the input {name!r:.60} has the shape {list(shape)!r:.60}", "at most 8 sizes")


def from_bytes(name: str, kind: str, shape: Sequence[int], content: bytes) -> Array:
    """A tensor from its bytes, the lowest of each value first.

    Raises:
        PeltError: E801 they are more, or fewer, than its shape says.
    """
    if kind == "BYTES":
        return _shaped(name, np.array(_strings(name, content), object), shape)
    if len(content) != math.prod(shape) * np.dtype(TYPES[kind]).itemsize:
        raise wrong(f"the input {name!r:.60} is {kind} {list(shape)}, and has {len(content):,} bytes")
    return np.frombuffer(content, np.dtype(TYPES[kind]).newbyteorder("<")).astype(TYPES[kind]).reshape(shape)


def from_values(name: str, kind: str, shape: Sequence[int], values: Sequence[Any]) -> Array:
    """A tensor from its values in order, in the type that its datatype says.

    Raises:
        PeltError: E801 values of another type, or more or fewer than its shape says.
    """
    if kind == "BYTES":
        if not all(isinstance(value, str) for value in values):
            raise wrong(f"the input {name!r:.60} is BYTES, and not all of its values are texts")
        return _shaped(name, np.array(values, object), shape)
    wanted = np.dtype(TYPES[kind])
    types = {"b": (bool,), "f": (int, float)}.get(wanted.kind, (int,))
    if not all(type(value) in types for value in values):
        raise wrong(f"the input {name!r:.60} holds values that are not {kind}")
    try:
        return _shaped(name, np.array(values, wanted), shape)
    except (OverflowError, ValueError):
        raise wrong(f"the input {name!r:.60} holds values that {kind} cannot hold") from None


def profile_of(inputs: dict[str, Array], parameter: object) -> str | list[str | None] | None:
    """What a request says of profiles.

    Args:
        inputs: from which the one that says it is taken out.
        parameter: the request's, None where there is none.

    Raises:
        PeltError: E801 it is said twice, or is no name.
    """
    each = inputs.pop(PROFILE, None)
    if parameter is not None and (not isinstance(parameter, str) or each is not None):
        raise wrong("the profile is said twice, or the parameter is no text", "a name, or an input of type BYTES")
    if each is None:
        return parameter or None if isinstance(parameter, str) else None
    if each.dtype != object or each.ndim > 2:
        raise wrong("the input 'profile' is no list of names", "datatype BYTES, shape [texts]")
    return [name or None for name in each.reshape(-1).tolist()]


def _shaped(name: str, array: Array, shape: Sequence[int]) -> Array:
    if array.size != math.prod(shape):
        raise wrong(f"the input {name!r:.60} has the shape {list(shape)} and {array.size:,} values")
    return array.reshape(shape)


def _strings(name: str, content: bytes) -> list[str]:
    """Texts as bytes: the length of each in 4 bytes, the lowest first, before it."""
    found, at = [], 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "little")
        if at + 4 + size > len(content):
            raise wrong(f"the bytes of the input {name!r:.60} end within a text")
        try:
            found.append(content[at + 4 : at + 4 + size].decode())
        except UnicodeDecodeError:
            raise wrong(f"a text of the input {name!r:.60} is not UTF-8") from None
        at += 4 + size
    return found
