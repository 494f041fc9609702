"""Facts about a graph's dataflow: what depends on what, which nodes are linear maps, which are normalisations."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

LAYOUT = {"Reshape", "Transpose", "Identity", "Cast", "Squeeze", "Unsqueeze"}
CUTS = {"Split", "Slice", "Gather", "GatherND"}
NORM_STEPS = {"Pow", "ReduceMean", "Sqrt", "Reciprocal", "Cast", "Mul", "Div", "Sub", "Add", "ReduceL2", "Clip", "Max"}
NONLINEAR = {"Gelu", "Erf", "Tanh", "Sigmoid", "Relu", "Softplus", "Elu", "LeakyRelu", "HardSwish", "HardSigmoid",
             "Clip", "Exp", "Pow", "Mish", "Selu", "Celu"}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear map y = x Wᵀ + b of the graph, whatever nodes it is made of.

    Attributes:
        weight, bias: parameter names; bias may be None.
        x, y: the values read and written, with their leading axes: flattenings around the product are looked through.
        inputs, outputs: numbers of features.
        transposed: the weight is stored [in, out].
        node: the product.
    """

    weight: str
    bias: str | None
    x: ir.Value
    y: ir.Value
    inputs: int
    outputs: int
    transposed: bool
    node: ir.Node


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation with a gain: LayerNormalization, or a chain that ends in a product with the gain."""

    weight: str
    bias: str | None
    x: ir.Value
    y: ir.Value
    size: int


class Flow:
    """A graph with its parameters, and answers about it."""

    def __init__(self, graph: ir.Graph, parameters: Mapping[str, tuple[int, ...]]):
        self.graph = graph
        self.parameters = parameters
        self.nodes: list[ir.Node] = list(graph)
        self.order: dict[ir.Node, int] = {node: i for i, node in enumerate(self.nodes)}
        self._ancestors: dict[ir.Value, frozenset[ir.Value]] = {}

    # what a value depends on

    @cached_property
    def dynamic(self) -> set[ir.Value]:
        """Values that depend on the model's inputs, not on parameters and constants alone."""
        found = {v for v in self.graph.inputs if v.name not in self.parameters}
        for node in self.nodes:
            if any(v in found for v in node.inputs if v is not None):
                found.update(node.outputs)
        return found

    @cached_property
    def hidden(self) -> set[ir.Value]:
        """Values that depend on a linear map, a convolution or an embedding of the inputs: what flows through the
        model, as opposed to masks, positions and shapes."""
        found: set[ir.Value] = set()
        for node in self.nodes:
            looked_up = node.op_type == "Gather" and self.parameter(node.inputs[0]) and node.inputs[1] in self.dynamic
            convolved = node.op_type == "Conv" and self.parameter(node.inputs[1]) and node.inputs[0] in self.dynamic
            if node.op_type == "Shape":
                continue
            if looked_up or convolved or any(v in found for v in node.inputs if v is not None):
                found.update(node.outputs)
        found.update(v for v in self.graph.inputs if v.name not in self.parameters and _flows(v))
        if found:
            for node in self.nodes:
                if node.op_type != "Shape" and any(v in found for v in node.inputs if v is not None):
                    found.update(node.outputs)
        return found

    def parameter(self, value: ir.Value | None) -> str | None:
        """The parameter that a value is, or is made of by casts and layout alone."""
        while value is not None:
            if value.name in self.parameters:
                return value.name
            node = value.producer()
            if node is None or node.op_type not in LAYOUT:
                return None
            value = node.inputs[0]
        return None

    def origin(self, value: ir.Value | None) -> ir.Value:
        """What a value is by layout and casts alone."""
        assert value is not None
        while (node := value.producer()) is not None and node.op_type in LAYOUT and node.inputs[0] is not None:
            value = node.inputs[0]
        return value

    def made_of(self, value: ir.Value | None) -> str | None:
        """The one parameter that a value with no runtime input is computed from."""
        found = self.sources(value) if value is not None and value not in self.dynamic else set()
        return found.pop() if len(found) == 1 else None

    def sources(self, value: ir.Value) -> set[str]:
        """The parameters that a value without runtime inputs is computed from."""
        found: set[str] = set()
        seen, pending = {value}, [value]
        while pending:
            current = pending.pop()
            if current.name is not None and current.name in self.parameters:
                found.add(current.name)
            elif (node := current.producer()) is not None and node.op_type != "Shape":
                fresh = [v for v in node.inputs if v is not None and v not in seen]
                seen.update(fresh)
                pending.extend(fresh)
        return found

    def module_of(self, parameters: Iterable[str]) -> str:
        """`path.*` for the module that has these parameters and no others; or ''."""
        owned = set(parameters)
        paths = [os.path.dirname(name.replace(".", "/")) for name in owned]
        common = os.path.commonpath(paths).replace("/", ".") if paths else ""
        inside = {name for name in self.parameters if name.startswith(f"{common}.")}
        return f"{common}.*" if common and inside <= owned else ""

    def unflattened(self, value: ir.Value) -> ir.Value:
        """A value before its tokens were flattened."""
        found = current = value
        while (node := current.producer()) is not None and node.op_type in ("Reshape", "Identity"):
            current = node.inputs[0]  # type: ignore[assignment]
            if current is None or last_size(current) != last_size(value):
                break
            if rank(current) > rank(found):
                found = current
        return found

    @staticmethod
    def unwrapped(value: ir.Value, source: ir.Value) -> bool:
        """Whether a value is another one, or a cast of it."""
        node = value.producer()
        return value is source or (node is not None and node.op_type == "Cast" and node.inputs[0] is source)

    def scalar(self, value: ir.Value | None) -> float | None:
        """The number in a constant with one element."""
        if value is None or value.const_value is None or value.const_value.size != 1:
            return None
        number = float(value.const_value.numpy().reshape(()))
        return number if math.isfinite(number) else None

    def ancestors(self, value: ir.Value) -> frozenset[ir.Value]:
        """Every hidden value that a value depends on, itself included."""
        if value not in self._ancestors:
            seen, pending = {value}, [value]
            while pending:
                node = pending.pop().producer()
                for source in node.inputs if node is not None else ():
                    if source is not None and source in self.hidden and source not in seen:
                        seen.add(source)
                        pending.append(source)
            self._ancestors[value] = frozenset(seen)
        return self._ancestors[value]

    def depends(self, value: ir.Value, on: ir.Value) -> bool:
        return on in self.ancestors(value)

    @staticmethod
    def readers(value: ir.Value) -> list[ir.Node]:
        """The nodes that read a value, each once, in no order."""
        return list(dict.fromkeys(use.node for use in value.uses()))

    def index(self, value: ir.Value) -> int:
        """The position of a value's producer; -1 for inputs."""
        node = value.producer()
        return -1 if node is None else self.order[node]

    def behind(self, value: ir.Value, stop: Callable[[ir.Value], bool]) -> Iterator[ir.Value]:
        """Hidden values behind a value, nearest first, not passing those where `stop` says so; these come last."""
        seen, pending = {value}, [value]
        while pending:
            current = pending.pop(0)
            yield current
            if stop(current) and current is not value:
                continue
            node = current.producer()
            for source in node.inputs if node is not None else ():
                if source is not None and source in self.hidden and source not in seen:
                    seen.add(source)
                    pending.append(source)

    # linear maps

    @cached_property
    def linears(self) -> list[Linear]:
        """Every linear map of a hidden value by a matrix parameter, in order."""
        return [found for node in self.nodes if (found := self._linear(node)) is not None]

    @cached_property
    def linear_of(self) -> dict[ir.Value, Linear]:
        """Linear maps by the values they write, the bare product included."""
        table = {}
        for linear in self.linears:
            table[linear.y] = table[linear.node.outputs[0]] = linear
        return table

    @cached_property
    def stacked(self) -> dict[ir.Node, str]:
        """Products by the slices of a stacked parameter [E, ...], and its name: the linear maps of experts."""
        found = {}
        for node in self.nodes:
            if node.op_type in ("MatMul", "Gemm", "Einsum") and node.outputs[0] in self.hidden:
                for value in node.inputs:
                    if name := self._stack_of(value):
                        found[node] = name
        return found

    def _stack_of(self, value: ir.Value | None) -> str | None:
        """The stacked parameter that a value is cut out of, or is whole."""
        cut, whole = False, value is not None and rank(value) == 3
        while value is not None:
            if value.name is not None and value.name in self.parameters:
                return value.name if len(self.parameters[value.name]) == 3 and (cut or whole) else None
            node = value.producer()
            if node is None or node.op_type not in (*LAYOUT, *CUTS):
                return None
            cut |= node.op_type in CUTS
            value = node.inputs[0]
        return None

    def _linear(self, node: ir.Node) -> Linear | None:
        if node.op_type not in ("MatMul", "Gemm") or node.inputs[0] not in self.hidden:
            return None
        source, flips = node.inputs[1], _flag(node, "transB")
        while source is not None and source.name not in self.parameters:
            producer = source.producer()
            if producer is None or producer.op_type not in ("Transpose", "Cast", "Identity"):
                return None
            flips ^= producer.op_type == "Transpose"
            source = producer.inputs[0]
        if source is None or source.name is None or len(self.parameters[source.name]) != 2:
            return None
        if _flag(node, "transA"):
            return None
        shape = self.parameters[source.name]
        outputs, inputs = shape if flips else shape[::-1]
        bias = self.parameter(node.inputs[2]) if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        x, y = node.inputs[0], node.outputs[0]
        assert x is not None
        if bias is None and len(readers := self.readers(y)) == 1 and readers[0].op_type == "Add":
            other = next(v for v in readers[0].inputs if v is not y)
            name = self.parameter(other)
            if name and self.parameters[name] == (outputs,):
                bias, y = name, readers[0].outputs[0]
        producer = x.producer()
        if producer is not None and producer.op_type == "Reshape":
            inner = producer.inputs[0]
            if inner is not None and last_size(inner) == inputs and rank(inner) > rank(x):
                x = inner
        readers = self.readers(y)
        if len(readers) == 1 and readers[0].op_type == "Reshape":
            outer = readers[0].outputs[0]
            if last_size(outer) == outputs and rank(outer) > rank(y):
                y = outer
        return Linear(source.name, bias, x, y, inputs, outputs, not flips, node)

    # normalisations

    @cached_property
    def norms(self) -> list[Norm]:
        """Every normalisation with a gain, in order."""
        return [found for node in self.nodes if (found := self._norm(node)) is not None]

    def _norm(self, node: ir.Node) -> Norm | None:
        if node.inputs[0] is None if node.inputs else True:
            return None
        if node.op_type in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"):
            weight = self.made_of(node.inputs[1])
            bias = self.made_of(node.inputs[2]) if len(node.inputs) > 2 else None
            if weight and node.inputs[0] is not None:
                return Norm(weight, bias, node.inputs[0], node.outputs[0], self.parameters[weight][-1])
            return None
        if node.op_type != "Mul" or len(node.inputs) != 2:
            return None
        for gain, normed in (node.inputs, node.inputs[::-1]):
            weight = self.made_of(gain)
            if not weight or len(self.parameters[weight]) != 1 or normed is None or normed not in self.hidden:
                continue
            x = self._norm_input(normed)
            if x is None:
                continue
            bias, y = None, node.outputs[0]
            if len(readers := self.readers(y)) == 1 and readers[0].op_type == "Add":
                other = next(v for v in readers[0].inputs if v is not y)
                name = self.made_of(other)
                if name and self.parameters[name] == self.parameters[weight]:
                    bias, y = name, readers[0].outputs[0]
            return Norm(weight, bias, x, y, self.parameters[weight][0])
        return None

    def _norm_input(self, normed: ir.Value) -> ir.Value | None:
        """The value that a chain of normalisation steps starts from, if the chain takes a mean."""
        seen, pending, sources, mean = {normed}, [normed], [], False
        while pending:
            current = pending.pop()
            node = current.producer()
            if node is None or node.op_type not in NORM_STEPS or self._leaves_chain(node, current, normed):
                sources.append(current)
                continue
            mean |= node.op_type in ("ReduceMean", "ReduceL2")
            for source in node.inputs:
                if source is not None and source in self.hidden and source not in seen:
                    seen.add(source)
                    pending.append(source)
        if not mean or len(set(sources)) != 1 or sources[0] is normed:
            return None
        return sources[0]

    def _leaves_chain(self, node: ir.Node, value: ir.Value, normed: ir.Value) -> bool:
        """Whether a step already belongs to what comes before the norm: a full-width sum, or a product that is not by
        the statistics."""
        if value is normed:
            return False
        hidden = [v for v in node.inputs if v is not None and v in self.hidden]
        wide = [v for v in hidden if last_size(v) != 1]
        if node.op_type in ("Add", "Mul", "Div") and len(wide) >= 1 and last_size(value) != 1:
            statistic = [v for v in hidden if last_size(v) == 1]
            return not statistic and not (node.op_type == "Mul" and len(set(hidden)) == 1 and self._squares(value))
        return False

    def _squares(self, value: ir.Value) -> bool:
        return all(reader.op_type in ("ReduceMean", "Cast") for reader in self.readers(value))


def _flag(node: ir.Node, name: str) -> bool:
    """Whether a Gemm transposes an operand."""
    return node.op_type == "Gemm" and bool(node.attributes.get_int(name, 0))


def last_size(value: ir.Value) -> int | None:
    """The last axis' size, where it is a number."""
    if value.shape is None or not len(value.shape):
        return None
    size = value.shape[-1]
    return size if isinstance(size, int) else None


def _flows(value: ir.Value) -> bool:
    """Whether an input is part of what flows through: embedded tokens, states, cached keys, as opposed to a mask."""
    return value.dtype is not None and value.dtype.is_floating_point() and rank(value) >= 3


def rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 0
