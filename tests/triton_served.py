"""A model repository, served: by Triton itself, where the variable PELT_TRITON has its command, and always by a
stand-in that is as strict as Triton's sources are about configs, names, types and sizes, and runs the repository's own
files.

The stand-in is no server. It joins no requests, knows no GPU, and computes each model by what Triton would compute it
with: ONNX Runtime on the model's file, the model's own `model.py`, an ensemble's steps.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import queue
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
import tritonclient.grpc as client
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as messages
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

Array = np.ndarray[Any, Any]
TYPES = {"TYPE_BOOL": np.bool_, "TYPE_INT32": np.int32, "TYPE_INT64": np.int64, "TYPE_FP16": np.float16,
         "TYPE_FP32": np.float32, "TYPE_STRING": np.object_}  # fmt: skip
ORT = {"TYPE_BOOL": "tensor(bool)", "TYPE_INT32": "tensor(int32)", "TYPE_INT64": "tensor(int64)",
       "TYPE_FP16": "tensor(float16)", "TYPE_FP32": "tensor(float)"}  # fmt: skip

LEVELS = {-1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC, 0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
          1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED, 2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL}  # fmt: skip
"""What the backend for ONNX Runtime makes of a config's `optimization.graph.level`."""


class Refused(Exception):
    """What a server says to a request, or to a model that it is to load."""


# the stand-in: what `model.py` imports


class Tensor:
    def __init__(self, name: str, array: Array):
        assert isinstance(array, np.ndarray) and name
        self._name, self._array = name, np.ascontiguousarray(array)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Array:
        return self._array

    def to_dlpack(self) -> Any:
        return self._array.copy().__dlpack__()

    @staticmethod
    def from_dlpack(name: str, capsule: Any) -> Tensor:
        class Held:
            def __dlpack__(self, **_: Any) -> Any:
                return capsule

            def __dlpack_device__(self) -> tuple[int, int]:
                return (1, 0)

        return Tensor(name, np.from_dlpack(Held()))  # type: ignore[arg-type]


class TritonError:
    INVALID_ARG = 2

    def __init__(self, message: str, code: int = 0):
        self._message = message

    def message(self) -> str:
        return self._message


class InferenceResponse:
    def __init__(self, output_tensors: Iterable[Tensor] = (), error: TritonError | None = None):
        self._tensors, self._error = list(output_tensors), error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors


class Sender:
    def __init__(self) -> None:
        self.sent: list[InferenceResponse] = []
        self.done = self.cancelled = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.done, "a response after the last one"
        if response is not None:
            self.sent.append(response)
        self.done = flags == 1

    def is_cancelled(self) -> bool:
        return self.cancelled


class Asked:
    """A request as `execute` is given it."""

    def __init__(self, inputs: Mapping[str, Array]):
        self.inputs = {name: Tensor(name, array) for name, array in inputs.items()}
        self.sender = Sender()

    def get_response_sender(self) -> Sender:
        return self.sender


def utils(server: StandIn) -> ModuleType:
    """The module `triton_python_backend_utils` of a server."""
    made = ModuleType("triton_python_backend_utils")

    class InferenceRequest:
        def __init__(
            self, model_name: str, requested_output_names: list[str], inputs: list[Tensor], preferred_memory: Any
        ):
            self.model, self.outputs, self.inputs = model_name, requested_output_names, inputs

        async def async_exec(self) -> InferenceResponse:
            await asyncio.sleep(0)  # others take their turns
            try:
                found = server.ask(self.model, {tensor.name(): tensor.as_numpy() for tensor in self.inputs})
                return InferenceResponse([Tensor(name, found[name]) for name in self.outputs])
            except Refused as error:
                return InferenceResponse([], TritonError(str(error)))

    vars(made).update(
        Tensor=Tensor, TritonError=TritonError, InferenceResponse=InferenceResponse, InferenceRequest=InferenceRequest,
        PreferredMemory=lambda kind, number: (kind, number), TRITONSERVER_MEMORY_CPU=0,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        get_input_tensor_by_name=lambda request, name: request.inputs.get(name),
    )  # fmt: skip
    return made


# the stand-in: models


class Model:
    """A model of a repository, with its config; the newest version, of which there must be one."""

    def __init__(self, folder: Path, server: StandIn):
        self.server = server
        self.config = text_format.Parse((folder / "config.pbtxt").read_text(), messages.ModelConfig())
        versions = [entry for entry in folder.iterdir() if entry.is_dir() and entry.name.isdigit()]
        self.version = max(versions, key=lambda entry: int(entry.name))
        assert self.config.name == folder.name
        for output in self.config.output:
            assert not output.label_filename or (folder / output.label_filename).is_file()
        for tensor in (*self.config.input, *self.config.output):
            assert tensor.dims, "a config has no tensor without a size"
        if self.config.backend == "onnxruntime":
            self._open()
        elif self.config.backend == "python":
            self._start(folder)
        else:
            assert self.config.platform == "ensemble" and not self.config.backend

    def sizes(self, tensor: Any) -> list[int]:
        """All sizes of a tensor, as the graph has them."""
        dims = tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims
        return [*([-1] if self.config.max_batch_size else []), *dims]

    def _open(self) -> None:
        """What the backend for ONNX Runtime holds a config against."""
        assert not any(file.is_symlink() for file in self.version.iterdir())
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = LEVELS[self.config.optimization.graph.level]
        self.session = ort.InferenceSession(str(self.version / "model.onnx"), options, ["CPUExecutionProvider"])
        given = {value.name: value for value in self.session.get_inputs()}
        made = {value.name: value for value in self.session.get_outputs()}
        if {tensor.name for tensor in self.config.input} != {*given}:
            raise Refused(f"{self.config.name}: the inputs are {[*given]}")
        if any(tensor.optional for tensor in self.config.input):
            raise Refused(f"{self.config.name}: an optional input")
        for tensors, values, exact in ((self.config.input, given, False), (self.config.output, made, True)):
            for tensor in tensors:
                value, sizes = values[tensor.name], self.sizes(tensor)
                real = [size if isinstance(size, int) else -1 for size in value.shape]
                fits = len(real) == len(sizes) and all(a in (-1, b) for a, b in zip(real, sizes, strict=True))
                equal = real == sizes if exact else fits
                if not equal or ORT[messages.DataType.Name(tensor.data_type)] != value.type:
                    raise Refused(f"{self.config.name}: {tensor.name} is {value.type} {real}, and not {sizes}")

    def _start(self, folder: Path) -> None:
        file = self.version / "model.py"
        spec = importlib.util.spec_from_file_location(f"model_{folder.name}_{id(self)}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["triton_python_backend_utils"] = utils(self.server)
        try:
            self.python = module.TritonPythonModel()
            about = json.dumps({"max_batch_size": self.config.max_batch_size})
            self.python.initialize(
                {"model_repository": str(folder), "model_version": self.version.name, "model_config": about}
            )
        finally:
            del sys.modules["triton_python_backend_utils"]

    def check(self, inputs: Mapping[str, Array]) -> None:
        """What the server holds every request against."""
        known, most = {tensor.name: tensor for tensor in self.config.input}, self.config.max_batch_size
        for name, tensor in known.items():
            if name not in inputs and not tensor.optional:
                raise Refused(f"missing input '{name}' of '{self.config.name}'")
        for name, array in inputs.items():
            if name not in known:
                raise Refused(f"unexpected input '{name}' of '{self.config.name}'")
            if TYPES[messages.DataType.Name(known[name].data_type)] != array.dtype:
                raise Refused(f"'{name}' of '{self.config.name}' is {array.dtype}")
            sizes = [*([-1] if most else []), *known[name].dims]
            if len(sizes) != array.ndim or any(a not in (-1, b) for a, b in zip(sizes, array.shape, strict=True)):
                raise Refused(f"unexpected shape for input '{name}' of '{self.config.name}': {array.shape}")
        rows = {len(array) for array in inputs.values()} if most else {0}
        if len(rows) != 1 or max(rows) > most:
            raise Refused(f"{rows} texts for '{self.config.name}', at most {most}")

    def responses(self, inputs: Mapping[str, Array]) -> list[dict[str, Array]]:
        """All responses to a request."""
        self.check(inputs)
        if self.config.backend == "onnxruntime":
            reshaped = {tensor.name for tensor in self.config.input if tensor.HasField("reshape")}
            feeds = {n: a.reshape(len(a)) if n in reshaped else a for n, a in inputs.items()}
            try:
                found = self.session.run(None, feeds)
            except Exception as error:
                raise Refused(str(error)) from None
            outputs = {v.name: a for v, a in zip(self.session.get_outputs(), found, strict=True)}
            return [{t.name: outputs[t.name].reshape(-1, 1) if t.HasField("reshape") else outputs[t.name]
                     for t in self.config.output}]  # fmt: skip
        if self.config.backend == "python":
            given = {name: _bytes(array) if array.dtype == object else array for name, array in inputs.items()}
            asked = Asked(given)
            if self.config.model_transaction_policy.decoupled:
                asyncio.run(self.python.execute([asked]))
                assert asked.sender.done
                sent = asked.sender.sent
            else:
                sent = self.python.execute([asked])
                assert len(sent) == 1
            return [self._answer(response) for response in sent]
        values = dict(inputs)
        for step in self.config.ensemble_scheduling.step:
            there = {name: values[called] for name, called in step.input_map.items() if called in values}
            answer = self.server.ask(step.model_name, there)
            values |= {called: answer[name] for name, called in step.output_map.items()}
        return [{tensor.name: values[tensor.name] for tensor in self.config.output}]

    def _answer(self, response: InferenceResponse) -> dict[str, Array]:
        if (error := response.error()) is not None:
            raise Refused(error.message())
        found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        for tensor in self.config.output:
            array = found[tensor.name]
            sizes = [*([-1] if self.config.max_batch_size else []), *tensor.dims]
            assert TYPES[messages.DataType.Name(tensor.data_type)] == array.dtype
            assert len(sizes) == array.ndim and all(a in (-1, b) for a, b in zip(sizes, array.shape, strict=True))
        assert {*found} == {tensor.name for tensor in self.config.output}
        return found


class StandIn:
    """A server of repositories that is none."""

    def __init__(self, repositories: Iterable[Path]):
        self.folders: dict[str, Path] = {}
        self.models: dict[str, Model] = {}
        for repository in repositories:
            self.folders |= {entry.name: entry for entry in repository.iterdir() if entry.is_dir()}
        for name in self.folders:
            self.models[name] = Model(self.folders[name], self)

    def ask(self, model: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The one response to a request."""
        if model not in self.models:
            raise Refused(f"unknown model '{model}'")
        (found,) = self.models[model].responses(inputs)
        return found

    def stream(self, model: str, inputs: Mapping[str, Array]) -> list[dict[str, Array]]:
        """All responses to a request, the last of which may be what is wrong."""
        return self.models[model].responses(inputs)

    def load(self, model: str) -> None:
        """Load a model anew, and what an ensemble is made of before it."""
        for step in self.models[model].config.ensemble_scheduling.step:
            self.load(step.model_name)
        self.models[model] = Model(self.folders[model], self)

    def close(self) -> None:
        """Nothing is open."""


class Triton:
    """Triton itself, in a process of its own.

    Args:
        command: its command line, without options.
    """

    def __init__(self, command: str, repositories: Iterable[Path], log: Path):
        ports = [_free(), _free()]
        options = [f"--model-repository={repository}" for repository in repositories]
        options += ["--model-control-mode=explicit", "--load-model=*", "--allow-metrics=false"]
        options += [f"--http-port={ports[0]}", f"--grpc-port={ports[1]}"]
        self.stream_of = log.open("w")
        self.process = subprocess.Popen(
            [*shlex.split(command), *options], stdout=self.stream_of, stderr=subprocess.STDOUT
        )
        self.http, self.address = f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"
        self.client = client.InferenceServerClient(self.address)
        for _ in range(600):
            time.sleep(0.1)
            assert self.process.poll() is None, log.read_text()[-4000:]
            try:
                if self.client.is_server_ready():
                    return
            except InferenceServerException:
                continue
        raise AssertionError(log.read_text()[-4000:])

    @staticmethod
    def _given(inputs: Mapping[str, Array]) -> list[Any]:
        found = []
        for name, array in inputs.items():
            found.append(client.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
            found[-1].set_data_from_numpy(array)
        return found

    @staticmethod
    def _made(result: Any) -> dict[str, Array]:
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    def ask(self, model: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The one response to a request."""
        try:
            return self._made(self.client.infer(model, self._given(inputs)))
        except InferenceServerException as error:
            raise Refused(error.message()) from None

    def stream(self, model: str, inputs: Mapping[str, Array]) -> list[dict[str, Array]]:
        """All responses to a request."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        found = []
        with client.InferenceServerClient(self.address) as own:
            own.start_stream(lambda result, error: answers.put((result, error)))
            own.async_stream_infer(model, self._given(inputs), enable_empty_final_response=True)
            while True:
                result, error = answers.get(timeout=60)
                if error is not None:
                    raise Refused(error.message())
                if made := self._made(result):
                    found.append(made)
                if result.get_response().parameters["triton_final_response"].bool_param:
                    return found

    def load(self, model: str) -> None:
        """Load a model anew."""
        self.client.load_model(model)

    def close(self) -> None:
        """Stop it."""
        self.client.close()
        self.process.terminate()
        self.process.wait(60)
        self.stream_of.close()


def _bytes(texts: Array) -> Array:
    found = [text.encode() if isinstance(text, str) else text for text in texts.reshape(-1)]
    return np.array(found, object).reshape(texts.shape)


def _free() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
