"""The Open Inference Protocol, version 2, over HTTP: requests read and responses written, tensors as JSON or as the
bytes after it (the extension for binary tensors). Names of fields are the protocol's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from peltc.runtime.serving.inference import (
    NAMES,
    PROFILE,
    Inference,
    check_shape,
    from_bytes,
    from_values,
    plain,
    profile_of,
    wrong,
)

Array = np.ndarray[Any, Any]
HEADER = "Inference-Header-Content-Length"


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
    profile = profile_of(inputs, parameters.get(PROFILE))
    return Inference(_text(request.get("id", ""), "id"), inputs, profile, wanted or None, binary)


def write(request: Inference, model: str, outputs: Mapping[str, Array]) -> tuple[bytes, dict[str, str]]:
    """A response: its body, and its headers.

    Args:
        model: what the model is called.
        outputs: the model's, by name.
    """
    wanted = request.outputs or dict.fromkeys(outputs, request.binary)
    entries, tail = [], []
    for name, binary in wanted.items():
        array = plain(outputs[name])
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


def _tensor(name: str, tensor: Mapping[str, Any], rest: bytes) -> tuple[Array, bytes]:
    """An input, and the bytes that are left for others."""
    kind, shape = tensor.get("datatype"), _list(tensor.get("shape"), "a shape")
    check_shape(name, kind, shape)
    assert isinstance(kind, str)
    size = _mapping(tensor.get("parameters", {}), "parameters").get("binary_data_size")
    if size is None:
        data = _list(tensor.get("data"), f"the data of the input {name!r:.60}")
        return from_values(name, kind, shape, _flat(data, 8)), rest
    if type(size) is not int or not 0 <= size <= len(rest) or "data" in tensor:
        raise wrong(f"the input {name!r:.60} has binary_data_size {size!r:.40}", f"at most {len(rest):,}, and no data")
    return from_bytes(name, kind, shape, rest[:size]), rest[size:]


def _flat(values: list[Any], depth: int) -> list[Any]:
    if not any(isinstance(value, list) for value in values):
        return values
    if not depth or not all(isinstance(value, list) for value in values):
        raise wrong("the data of an input are lists beside values, or too deep")
    return [inner for value in values for inner in _flat(value, depth - 1)]


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
