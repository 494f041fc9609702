"""The Open Inference Protocol, version 2: its requests read, and its responses written, tensors as JSON or as the bytes
after it (the extension for binary tensors). Names of fields are the protocol's.

https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from peltc.spec.diagnostics import PeltError, fail, one_of

Array = np.ndarray[Any, Any]
PROFILE = "profile"
"""What says the profile: a parameter of the request, for all of its texts, or an input of type BYTES with a name for
each; no name, or an empty one, is the bare base."""
HEADER = "Inference-Header-Content-Length"
TYPES: dict[str, Any] = {
    "BOOL": np.bool_, "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8,
    "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64, "FP16": np.float16, "FP32": np.float32,
    "FP64": np.float64,
}  # fmt: skip
NAMES = {np.dtype(kind): name for name, kind in TYPES.items()}
GRAPH = {"bool": "BOOL", "float16": "FP16", "float": "FP32", "double": "FP64"}
"""ONNX Runtime's names of types that are not the protocol's in small letters."""


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


def read(body: bytes, header: str | None) -> Inference:
    """A request.

    Args:
        body: JSON, and the bytes of tensors after it.
        header: how many bytes are JSON, as the HTTP header says; None where all are.

    Raises:
        PeltError: E801 it is none of the protocol's.
    """
    size = len(body)
    if header is not None:
        size = int(header) if header.isascii() and header.isdigit() and len(header) < 20 else -1
        if not 0 <= size <= len(body):
            raise wrong(f"{HEADER} is {header!r:.40}, and the body has {len(body):,} bytes")
    try:
        said = json.loads(body[:size])
    except (ValueError, RecursionError) as error:
        raise wrong(f"the body is not JSON: {str(error)[:100]}") from None
    request = _mapping(said, "the request")
    rest, inputs = body[size:], {}
    for entry in _list(request.get("inputs"), "inputs"):
        tensor = _mapping(entry, "an input")
        name = _text(tensor.get("name"), "the name of an input")
        if name in inputs:
            raise wrong(f"the input {name!r:.60} stands twice")
        inputs[name], rest = _tensor(name, tensor, rest)
    if rest:
        raise wrong(f"{len(rest):,} bytes are left over after the last tensor")
    parameters = _mapping(request.get("parameters", {}), "parameters")
    wanted = None
    binary = parameters.get("binary_data_output") is True
    if request.get("outputs") is not None:
        wanted = {}
        for entry in _list(request["outputs"], "outputs"):
            output = _mapping(entry, "an output")
            own = _mapping(output.get("parameters", {}), "parameters").get("binary_data", binary)
            wanted[_text(output.get("name"), "the name of an output")] = own is True
    profile = _profile(inputs, parameters)
    return Inference(_text(request.get("id", ""), "id"), inputs, profile, wanted or None, binary)


def write(request: Inference, model: str, outputs: Mapping[str, Array]) -> tuple[bytes, dict[str, str]]:
    """A response: its body, and its headers.

    Args:
        model: what the model is called.
        outputs: the model's, by name.

    Raises:
        PeltError: E801 an output was asked for that the model does not have.
    """
    wanted = request.outputs or dict.fromkeys(outputs, request.binary)
    entries, tail = [], []
    for name, binary in wanted.items():
        if name not in outputs:
            raise wrong(f"the model has no output {name!r:.60}", one_of(list(outputs)))
        array = outputs[name]
        array = array if array.dtype in NAMES else array.astype(np.float32)
        entry: dict[str, Any] = {"name": name, "datatype": NAMES[array.dtype], "shape": list(array.shape)}
        if binary:
            tail.append(np.ascontiguousarray(array).tobytes())
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = array.reshape(-1).tolist()
        entries.append(entry)
    said: dict[str, Any] = {"model_name": model, "outputs": entries}
    if request.id:
        said["id"] = request.id
    head = json.dumps(said).encode()
    if not tail:
        return head, {"Content-Type": "application/json"}
    return b"".join([head, *tail]), {"Content-Type": "application/octet-stream", HEADER: str(len(head))}


def datatype(kind: str) -> str:
    """The protocol's name of a type that ONNX Runtime calls `tensor(int64)`."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return GRAPH.get(name, name.upper())


def _tensor(name: str, tensor: Mapping[str, Any], rest: bytes) -> tuple[Array, bytes]:
    """An input, and the bytes that are left for others."""
    kind = tensor.get("datatype")
    if kind not in TYPES and kind != "BYTES":
        raise wrong(f"the input {name!r:.60} has the datatype {kind!r:.40}", one_of([*TYPES, "BYTES"]))
    shape = _list(tensor.get("shape"), "a shape")
    if not all(type(size) is int and 0 <= size < 1 << 31 for size in shape) or len(shape) > 8:
        raise wrong(f"the input {name!r:.60} has the shape {shape!r:.60}", "at most 8 sizes")
    count, size = math.prod(shape), _mapping(tensor.get("parameters", {}), "parameters").get("binary_data_size")
    if size is None:
        array = _listed(name, kind, tensor.get("data"))
    else:
        if type(size) is not int or not 0 <= size <= len(rest) or "data" in tensor:
            raise wrong(
                f"the input {name!r:.60} has binary_data_size {size!r:.40}", f"at most {len(rest):,}, and no data"
            )
        own, rest = rest[:size], rest[size:]
        if kind == "BYTES":
            array = np.array(_strings(name, own), object)
        elif size != count * np.dtype(TYPES[kind]).itemsize:
            raise wrong(f"the input {name!r:.60} is {kind} {shape}, and has {size:,} bytes")
        else:
            array = np.frombuffer(own, np.dtype(TYPES[kind]).newbyteorder("<")).astype(TYPES[kind])
    if array.size != count:
        raise wrong(f"the input {name!r:.60} has the shape {shape} and {array.size:,} values")
    return array.reshape(shape), rest


def _listed(name: str, kind: str, data: object) -> Array:
    """Values that stand in the JSON, flat or nested, in the type that their datatype says."""
    flat = _flat(_list(data, f"the data of the input {name!r:.60}"), 8)
    if kind == "BYTES":
        if not all(isinstance(value, str) for value in flat):
            raise wrong(f"the input {name!r:.60} is BYTES, and not all of its values are texts")
        return np.array(flat, object)
    wanted = np.dtype(TYPES[kind])
    types = {"b": (bool,), "f": (int, float)}.get(wanted.kind, (int,))
    if not all(type(value) in types for value in flat):
        raise wrong(f"the input {name!r:.60} holds values that are not {kind}")
    try:
        return np.array(flat, wanted)
    except (OverflowError, ValueError):
        raise wrong(f"the input {name!r:.60} holds values that {kind} cannot hold") from None


def _flat(values: list[Any], depth: int) -> list[Any]:
    if not any(isinstance(value, list) for value in values):
        return values
    if not depth or not all(isinstance(value, list) for value in values):
        raise wrong("the data of an input are lists beside values, or too deep")
    return [inner for value in values for inner in _flat(value, depth - 1)]


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


def _profile(inputs: dict[str, Array], parameters: Mapping[str, Any]) -> str | list[str | None] | None:
    """What the request says of profiles; an input that says it is taken from the others."""
    each, one = inputs.pop(PROFILE, None), parameters.get(PROFILE)
    if one is not None and (not isinstance(one, str) or each is not None):
        raise wrong("the profile is said twice, or the parameter is no text", "a name, or an input of type BYTES")
    if each is None:
        return one or None
    if each.dtype != object or each.ndim > 2:
        raise wrong("the input 'profile' is no list of names", "datatype BYTES, shape [texts]")
    return [name or None for name in each.reshape(-1).tolist()]


def _mapping(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(f"{what} is {type(value).__name__}", "an object")
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise wrong(f"{what}: {type(value).__name__}", "a list")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise wrong(f"{what} is {type(value).__name__}", "a text of at most 1,000 characters")
    return value
