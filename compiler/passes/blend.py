"""Blending: every text of a batch with several profiles, each with a weight.

    x [B, ...] ─► Gather at each profile's text ─► [B·K, ...] ─► modules, a profile each ─► weighted sum ─► [B, ...]

Text b has the profiles p_b1 ... p_bK with the weights w_b1 ... w_bK. Between two steps of the base, the modules of each
profile compute for themselves, and the base reads

    y_b = Σ_k w_bk · f(x_b; θ of p_bk)

which for LoRA is the weighted sum of the changes, not a product of mixed factors. The weights of a text sum to 1:
whoever runs the graph gives what is left of 1 to the bare base, so that changes are scaled by their weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from peltc.compiler.files.manifest import PROFILE, PROFILE_WEIGHTS
from peltc.compiler.passes.rows import Rows
from peltc.compiler.passes.stack import MARK

PER_TEXT = "profiles_per_text"
"""The axis of a text's profiles."""
COPIES = "copies"
"""The axis of all profiles of all texts, B·K."""
OF_SIZES = {"Shape", "Concat", "Slice", "Gather", "Unsqueeze", "Squeeze", "Cast"}
"""Nodes through which the sizes of a value are taken apart and put together."""


class Blend(Rows):
    """The pass on one graph. `wide` holds values that there are of each text's profiles, [B·K, ...]."""

    def __init__(self, graph: ir.Graph, names: Mapping[str, str]):
        super().__init__(graph, names)
        self.wide: set[ir.Value] = set()
        self.copies: dict[ir.Value, ir.Value] = {}
        self.sums: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        super().run()
        self.place, self.added = None, []
        for i, output in enumerate(self.graph.outputs):
            if output in self.wide:
                name, output.name = output.name, f"{output.name}.each"
                self.graph.outputs[i] = self.sum(output)
                self.graph.outputs[i].name = name
        self.graph.extend(self.added)
        self.graph.sort()

    def choose(self) -> ir.Value:
        texts = ir.Shape([self.batch, PER_TEXT])
        profile = ir.Value(name=PROFILE, shape=texts, type=ir.TensorType(ir.DataType.INT64))
        self.weights = ir.Value(name=PROFILE_WEIGHTS, shape=texts, type=ir.TensorType(ir.DataType.FLOAT))
        self.graph.inputs.extend([profile, self.weights])
        index = self.emit("Reshape", [self.emit("Add", [profile, self.integers([1])], "row"), self.integers([-1])],
                          "row.flat")  # fmt: skip
        self.grid = self.sized(self.emit("Shape", [profile], "row.grid"), 2)
        each = self.emit("Range", [self.scalar(0), self.emit("Size", [index], "row.count"), self.scalar(1)], "row.each")
        many = self.emit("Gather", [self.grid, self.scalar(1)], "row.many", {"axis": 0})
        self.owner = self.emit("Div", [each, many], "row.owner")
        """Whose profile it is, of each."""
        self.owner.shape = ir.Shape([COPIES])
        for value in (index, each, many, self.owner):
            value.type = ir.TensorType(ir.DataType.INT64)
        return index

    def scalar(self, number: int) -> ir.Value:
        return self.constant(f"pelt.rows.scalar.{number}", np.array(number, np.int64))

    @staticmethod
    def sized(value: ir.Value, size: int) -> ir.Value:
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([size])
        return value

    def visit(self, node: ir.Node) -> None:
        """Give a module's node copies of what it reads of the batch; what the base reads of modules is summed up."""
        if node.op_type in ("Shape", "Size") and not any(v in self.wide for v in node.inputs if v is not None):
            return super().visit(node)
        mine, of_profiles = MARK in node.metadata_props, any(v in self.lifted for v in node.inputs if v is not None)
        wide = [i for i, v in enumerate(node.inputs) if v is not None and v in self.wide]
        self.place, self.added = node, []
        if wide and (not mine or self.ends(node)):
            for i in wide:
                node.replace_input_with(i, self.sum(node.inputs[i]))  # type: ignore[arg-type]
            wide = []
        if wide or of_profiles:
            for i, value in enumerate(node.inputs):
                if value is not None and value in self.dynamic and value not in self.wide:
                    node.replace_input_with(i, self.copied(value, node))
        self.graph.insert_before(node, self.added)
        super().visit(node)
        if wide and not of_profiles:
            for output in node.outputs:
                self.widened(output)
        return None

    def map(self, node: ir.Node) -> ir.Value:
        old, result = node.outputs[0], super().map(node)
        if old in self.dynamic:
            self.widened(result)
        return result

    def widened(self, value: ir.Value) -> None:
        self.wide.add(value)
        self.mixed.add(value)
        if value.shape is not None and len(value.shape) and value.dtype != ir.DataType.INT64:
            value.shape = ir.Shape([COPIES, *list(value.shape)[1:]])

    def ends(self, node: ir.Node) -> bool:
        """Whether a node adds what modules computed to a value of the base that only the base reads then: it is the
        same to sum up before, since the weights sum to 1."""
        bare = [v for v in node.inputs if v is not None and v in self.dynamic and v not in self.wide]
        known = [v for v in node.inputs if v is not None and v in self.wide]
        uses = [use.node for use in node.outputs[0].uses()]
        return (node.op_type == "Add" and len(bare) == len(known) == 1 and self.of_batch(bare[0])
                and not any(MARK in use.metadata_props for use in uses))  # fmt: skip

    def copied(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """A value of the batch, or the sizes of one, for each profile of each text.

        Raises:
            PeltError: E208 it is neither.
        """
        if value in self.copies:
            return self.copies[value]
        if self.of_sizes(value):
            producer = value.producer()
            assert producer is not None
            inputs = [v if v is None or v not in self.dynamic else self.copied(v, node) for v in producer.inputs]
            found = self.again(producer, inputs)
            found.type, found.shape = value.type, value.shape
        elif self.of_batch(value):
            found = self.emit("Gather", [value, self.owner], f"{value.name}.copies", {"axis": 0})
            found.type, found.shape = value.type, value.shape
            self.widened(found)
        elif (text := self.whole(value)) is not None and value.shape is not None:  # all texts' tokens in one row
            width = value.shape[-1]
            assert isinstance(width, int)
            found = self.emit("Reshape", [self.copied(text, node), self.integers([-1, width])], f"{value.name}.copies")
            found.type, found.shape = value.type, ir.Shape([None, width])
            self.wide.add(found)
        elif value.shape is not None and (len(value.shape) == 0 or value.shape[0] == 1):
            return value  # the same for all texts
        else:
            raise self.refused(node)
        self.dynamic.add(found)
        self.copies[value] = found
        return found

    def of_sizes(self, value: ir.Value) -> bool:
        """Whether a value is made of sizes of the batch's values alone."""
        node = value.producer()
        if node is None or node.op_type not in OF_SIZES:
            return False
        inputs = [v for v in node.inputs if v is not None and v in self.dynamic]
        return bool(inputs) and (node.op_type == "Shape" or all(map(self.of_sizes, inputs)))

    def sum(self, value: ir.Value) -> ir.Value:
        """The weighted sum over each text's profiles: of [B·K, ...] is [B, ...].

        Raises:
            PeltError: E208 it is of no numbers.
        """
        if value in self.sums:
            return self.sums[value]
        if value.dtype is None or not value.dtype.is_floating_point():
            producer = value.producer()
            assert producer is not None
            raise self.refused(producer)
        name = f"{value.name}.sum"
        flat = self.emit("Concat", [self.grid, self.integers([-1])], f"{name}.each", {"axis": 0})
        each = self.emit("Reshape", [value, flat], f"{name}.profiles")
        weights = self.emit("Unsqueeze", [self.weights, self.integers([1])], f"{name}.weights")
        if value.dtype != ir.DataType.FLOAT:
            weights = self.emit("Cast", [weights], f"{name}.weights.cast", {"to": value.dtype.value})
        total = self.emit("MatMul", [weights, each], f"{name}.total")
        sizes = self.emit("Shape", [value], f"{name}.sizes", {"start": 1})
        sizes = self.emit("Concat", [self.integers([-1]), sizes], f"{name}.shape", {"axis": 0})
        found = self.emit("Reshape", [total, sizes], name)
        found.type = value.type
        found.shape = None if value.shape is None else ir.Shape([self.batch, *list(value.shape)[1:]])
        for other in (each, total):
            other.type = value.type
        self.dynamic.add(found)
        self.sums[value] = found
        return found
