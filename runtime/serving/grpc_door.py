"""The door for gRPC: the service of the Open Inference Protocol. Its messages are those that the package `tritonclient`
was generated with, from the protocol's own file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as generated

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
from peltc.runtime.serving.service import Caller, Service
from peltc.spec.diagnostics import PeltError, fail

Array = np.ndarray[Any, Any]
CODES = {400: grpc.StatusCode.INVALID_ARGUMENT, 403: grpc.StatusCode.PERMISSION_DENIED,
         404: grpc.StatusCode.NOT_FOUND, 429: grpc.StatusCode.RESOURCE_EXHAUSTED,
         503: grpc.StatusCode.UNAVAILABLE}  # fmt: skip
CONTENTS = {"BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
            "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
            "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
            "BYTES": "bytes_contents"}  # fmt: skip
"""Where values lie that are no bytes."""


async def listen(service: Service, address: str) -> tuple[Any, int]:
    """Start a server.

    Args:
        address: `host:port`, the port 0 for one that is free.

    Returns:
        The server, to be stopped with a grace of seconds, and its port.

    Raises:
        PeltError: E808 the address cannot be listened at.
    """
    most = service.limits.body
    options = [("grpc.max_receive_message_length", most), ("grpc.so_reuseport", 0)]
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=service.limits.connections)
    generated.add_GRPCInferenceServiceServicer_to_server(Door(service), server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        raise fail(
            "E808", f"cannot listen at {address} for gRPC", hint="--grpc-port 0 takes one that is free"
        ) from None
    await server.start()
    return server, port


class Door(generated.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The calls of the service, a method for each; those that are not here answer that they are not implemented."""

    def __init__(self, service: Service):
        self.service = service

    async def ServerLive(self, request: Any, context: Any) -> Any:
        """Health: the process answers."""
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        """Health: the artifact is open."""
        return messages.ServerReadyResponse(ready=True)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        """Health of the model."""
        return messages.ModelReadyResponse(ready=request.name == self.service.name)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        """Server metadata."""
        return messages.ServerMetadataResponse(name="peltc", version=metadata.version("peltc"))

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        """Model metadata."""
        try:
            self.service.check_name(request.name)
        except PeltError as error:
            await self._refuse(error, context)
        return messages.ModelMetadataResponse(**self.service.metadata())

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        """Answer a request; its outputs are bytes, whatever its inputs were."""
        started, status = time.monotonic(), 200
        try:
            self.service.check_name(request.model_name)
            asked = await self.service.aside(read, request)
            headers = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
            outputs = await self.service.answer(asked, Caller(headers, context.peer()))
            return await self.service.aside(write, asked, self.service.name, outputs)
        except Exception as error:
            status = await self._refuse(error, context)
        finally:
            self.service.count("grpc", status, started)

    async def _refuse(self, error: Exception, context: Any) -> int:
        status, said = self.service.refusal(error)
        context.set_code(CODES.get(status, grpc.StatusCode.INTERNAL))
        context.set_details(said)
        return status


def read(request: Any) -> Inference:
    """A request.

    Raises:
        PeltError: E801 it is none of the protocol's.
    """
    inputs: dict[str, Array] = {}
    raw: Sequence[bytes] = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise wrong(f"there are {len(request.inputs)} inputs, and {len(raw)} raw_input_contents")
    for i, tensor in enumerate(request.inputs):
        name, kind, shape = tensor.name, tensor.datatype, list(tensor.shape)
        check_shape(name, kind, shape)
        if name in inputs:
            raise wrong(f"the input {name!r:.60} stands twice")
        if raw:
            if tensor.HasField("contents"):
                raise wrong(f"the input {name!r:.60} has contents beside raw_input_contents")
            inputs[name] = from_bytes(name, kind, shape, raw[i])
        else:
            inputs[name] = from_values(name, kind, shape, _values(name, kind, tensor.contents))
    parameter = dict(request.parameters).get(PROFILE)
    named = None if parameter is None else getattr(parameter, parameter.WhichOneof("parameter_choice") or "", 0)
    outputs = {output.name: True for output in request.outputs} or None
    return Inference(request.id, inputs, profile_of(inputs, named), outputs, True)


def write(asked: Inference, model: str, outputs: dict[str, Array]) -> Any:
    """A response."""
    response = messages.ModelInferResponse(model_name=model, id=asked.id)
    for name, array in outputs.items():
        array = np.ascontiguousarray(plain(array))
        response.outputs.add(name=name, datatype=NAMES[array.dtype], shape=array.shape)
        response.raw_output_contents.append(array.tobytes())
    return response


def _values(name: str, kind: str, contents: Any) -> list[Any]:
    """The values of a tensor that are no bytes; of another type than it says, there are none."""
    if kind not in CONTENTS:
        raise wrong(f"the input {name!r:.60} is {kind}, which stands in raw_input_contents alone")
    values = list(getattr(contents, CONTENTS[kind]))
    if kind != "BYTES":
        return values
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError:
        raise wrong(f"a text of the input {name!r:.60} is not UTF-8") from None
