"""What Triton is told of each model, `config.pbtxt`: its own messages, as the package `tritonclient` ships them, in the
text format of protocol buffers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as messages

from peltc.runtime.triton.graphs import Graph, Tensor


@dataclass(frozen=True)
class TritonTuning:
    """How a server runs the models.

    Attributes:
        rows: texts of a batch at most.
        delay: microseconds that the first of a batch waits for others.
        queue: requests that wait at most; those beyond them are refused.
        instances: sessions of each graph, on each GPU, or on the CPU where there is none; each holds the base.
        threads: threads of one operator on the CPU; 0 for ONNX Runtime's choice.
        tokens: tokens of a text that is generated at most, with what it begins with.
    """

    rows: int = 64
    delay: int = 2000
    queue: int = 512
    instances: int = 1
    threads: int = 0
    tokens: int = 4096


EXTENDED = 1
"""Triton's number of the level of optimisation below ONNX Runtime's highest. That one lays out convolutions on the CPU,
in a step that ends the process on some graphs in float16 (see `engine.FAULTY`), and Triton cannot leave a single step
out."""


@dataclass(frozen=True)
class Port:
    """An input or an output of a model that is no graph."""

    name: str
    type: str
    dims: tuple[int, ...]
    optional: bool = False


def text(config: Any) -> str:
    """A config as a file has it."""
    return str(text_format.MessageToString(config))


def labels_file(output: str) -> str:
    """The name of the file with the labels of an output."""
    return f"{output}.txt"


def of_graph(name: str, graph: Graph, tuning: TritonTuning, labels: Collection[str]) -> Any:
    """A graph on Triton's backend for ONNX Runtime.

    A model of sizes that requests decide is joined by the server where all of them are equal. Where something has
    another first axis than the texts, nothing is joined; since all inputs and outputs are named, the server does not
    take any other axis for that of the texts, as it does where it completes a config itself.

    Args:
        labels: the outputs whose values have labels, each in a file of its own.
    """
    config = _new(name, "onnxruntime")
    batched = graph.batched
    config.max_batch_size = tuning.rows if batched else 0
    for tensor in graph.inputs:
        _shaped(config.input.add(name=tensor.name, data_type=_type(tensor.type)), tensor, batched)
    for tensor in graph.outputs:
        output = config.output.add(name=tensor.name, data_type=_type(tensor.type))
        output.label_filename = labels_file(tensor.name) if tensor.name in labels else ""
        _shaped(output, tensor, batched)
    if batched:
        config.dynamic_batching.max_queue_delay_microseconds = tuning.delay
        config.dynamic_batching.default_queue_policy.max_queue_size = tuning.queue
    config.instance_group.add(kind=messages.ModelInstanceGroup.KIND_AUTO, count=tuning.instances)
    if graph.half:
        config.optimization.graph.level = EXTENDED
    if tuning.threads:
        config.parameters["intra_op_thread_count"].string_value = str(tuning.threads)
    return config


def of_python(
    name: str, inputs: Iterable[Port], outputs: Iterable[Port], rows: int = 0, streams: bool = False
) -> Any:  # fmt: skip
    """A model of a file `model.py`, which computes on the CPU.

    Args:
        rows: texts of a request at most, where their axis is the server's.
        streams: whether a request has any number of responses.
    """
    config = _new(name, "python")
    config.max_batch_size = rows
    _add(config, inputs, outputs)
    config.instance_group.add(kind=messages.ModelInstanceGroup.KIND_CPU, count=1)
    if streams:
        config.model_transaction_policy.decoupled = True
    return config


def of_ensemble(
    name: str, inputs: Iterable[Port], outputs: Iterable[Port], rows: int, labels: Collection[str], steps: Iterable[Any]
) -> Any:  # fmt: skip
    """Models one after the other, as one.

    Args:
        steps: of each its name, and what its inputs and its outputs are called here.
    """
    config = _new(name)
    config.platform, config.max_batch_size = "ensemble", rows
    _add(config, inputs, outputs)
    for output in config.output:
        output.label_filename = labels_file(output.name) if output.name in labels else ""
    for model, given, made in steps:
        step = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
        step.input_map.update(given)
        step.output_map.update(made)
    return config


def _new(name: str, backend: str = "") -> Any:
    config = messages.ModelConfig(name=name, backend=backend)
    config.version_policy.latest.num_versions = 1
    return config


def _type(kind: str) -> Any:
    return messages.DataType.Value("TYPE_" + ("STRING" if kind == "BYTES" else kind))


def _add(config: Any, inputs: Iterable[Port], outputs: Iterable[Port]) -> None:
    for port in inputs:
        config.input.add(name=port.name, data_type=_type(port.type), dims=port.dims, optional=port.optional)
    for port in outputs:
        config.output.add(name=port.name, data_type=_type(port.type), dims=port.dims)


def _shaped(message: Any, tensor: Tensor, batched: bool) -> None:
    """The sizes of a tensor; of a single number for each text they are [1], for a config has none without any."""
    dims = tensor.dims(batched)
    message.dims.extend(dims or [1])
    if not dims:
        message.reshape.SetInParent()
