"""By rows: every text of a batch with a profile of its own.

    before   constant [*s] ─► node ─► ...
    after    profiles [K, *s] ─► Gather at the row's profile ─► [B, *s] ─► the same node for each row ─► ...

What a node computes of one profile's tensor, it computes here of B of them: the axis of the rows comes first, and each
kind of node says where its own axes are then. Where such a value meets one of the batch, whose first axis is the rows
already, the result is an ordinary value of the batch. Row 0 of all profiles is the modules at their start values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from peltc.compiler.files.manifest import PROFILE
from peltc.spec.diagnostics import fail

Array = np.ndarray[Any, Any]
ROWS = "rows"
"""The axis of what each row has of a profile: the batch's length, or 1 where all rows have the same profile."""
ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Pow", "Where", "Max", "Min", "Greater", "Less", "Equal"}
UNARY = {"Cast", "Identity", "Neg", "Exp", "Log", "Sqrt", "Abs", "Relu", "Gelu", "Sigmoid", "Tanh", "Erf", "Reciprocal"}
REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceL2", "ReduceMax"}
SHAPES = {"Shape", "Size", "ConstantOfShape", "Range"}
"""Nodes whose results are sizes, or made of sizes alone."""


class Rows:
    """The pass on one graph. `lifted` holds values that have the axis of the rows before their own axes, by the value
    of one profile that they stand for.

    Args:
        graph: it is changed in place.
        names: the inputs' names by those of the constants that profiles bring.
    """

    def __init__(self, graph: ir.Graph, names: Mapping[str, str]):
        self.graph, self.names = graph, names
        self.lifted: dict[ir.Value, ir.Value] = {}
        self.every: dict[ir.Value, ir.Value] = {}
        self.mixed: set[ir.Value] = set()  # values of the batch that profiles have had a part in
        self.done: list[ir.Node] = []
        self.added: list[ir.Node] = []
        self.place: ir.Node | None = None
        self.first = next(v for v in graph.inputs if v.const_value is None)
        assert self.first.shape is not None
        self.batch = str(self.first.shape[0])
        self.dynamic: set[ir.Value] = {v for v in graph.inputs if v.const_value is None}

    def run(self) -> None:
        """Let each row of the batch choose among profiles.

        Raises:
            PeltError: E208 a node that cannot be computed for each row.
        """
        self.index = self.choose()
        for name, called in self.names.items():
            if (value := self.graph.initializers.get(name)) is not None:
                self.offer(value, called)
        front, self.added = self.added, []
        self.graph.insert_before(self.graph[0], front)
        for node in list(self.graph):
            self.visit(node)
        for node in reversed(self.done):  # what is computed by rows now
            self.graph.remove(node, safe=True)
        self.graph.sort()

    def choose(self) -> ir.Value:
        """The places of the rows' profiles among all of them [ROWS]."""
        profile = ir.Value(name=PROFILE, shape=ir.Shape([ROWS]), type=ir.TensorType(ir.DataType.INT64))
        self.graph.inputs.append(profile)
        place = self.emit("Add", [profile, self.integers([1])], "row")
        place.type, place.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([ROWS])
        return place

    def visit(self, node: ir.Node) -> None:
        """Look at a node, whose inputs are known by then."""
        if any(v in self.dynamic for v in node.inputs if v is not None):
            self.dynamic |= set(node.outputs)
        if any(v in self.lifted for v in node.inputs if v is not None):
            self.map(node)

    def offer(self, value: ir.Value, called: str) -> None:
        """A constant as an input of all profiles, and the rows' own."""
        tensor = value.const_value
        assert tensor is not None
        array = tensor.numpy()
        self.graph.initializers.pop(value.name or "")
        default = ir.tensor(np.ascontiguousarray(array[None]), name=called)
        every = ir.Value(name=called, shape=ir.Shape(["profiles", *array.shape]), type=ir.TensorType(tensor.dtype),
                         const_value=default)  # fmt: skip
        every.metadata_props.update(value.metadata_props)
        self.graph.register_initializer(every)
        self.graph.inputs.append(every)
        own = self.emit("Gather", [every, self.index], f"{called}.rows", {"axis": 0})
        own.type, own.shape = ir.TensorType(tensor.dtype), ir.Shape([ROWS, *array.shape])
        self.lifted[value] = own
        self.every[value] = every

    # nodes

    def emit(
        self, kind: str, inputs: Sequence[ir.Value | None], name: str, attributes: Mapping[str, object] | None = None
    ) -> ir.Value:
        node = ir.node(kind, list(inputs), attributes=dict(attributes or {}), name=name)  # type: ignore[arg-type]
        node.outputs[0].name = name
        if self.place is not None:
            node.metadata_props.update(self.place.metadata_props)
        self.added.append(node)
        return node.outputs[0]

    def integers(self, numbers: Sequence[int]) -> ir.Value:
        return self.constant("pelt.rows." + "_".join(map(str, numbers)), np.array(numbers, np.int64))

    def constant(self, label: str, array: Array) -> ir.Value:
        """A constant of the graph, by a label."""
        if label in self.graph.initializers:
            return self.graph.initializers[label]
        tensor = ir.tensor(array, name=label)
        value = ir.Value(name=label, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def map(self, node: ir.Node) -> ir.Value:
        """Compute a node for each row; the result."""
        self.place, self.added = node, []
        kind = "elementwise" if node.op_type in ELEMENTWISE else "unary" if node.op_type in UNARY else node.op_type
        kind = "reduction" if node.op_type in REDUCTIONS else kind
        rule: Callable[[ir.Node], ir.Value | None] | None = getattr(self, f"on_{kind}", None)
        if rule is None:
            raise self.refused(node)
        result = rule(node)
        if result is None:
            raise self.refused(node)
        self.graph.insert_before(node, self.added)
        old = node.outputs[0]
        if old in self.dynamic:  # an ordinary value of the batch
            result.shape, result.type = old.shape, old.type
            for use in tuple(old.uses()):
                use.node.replace_input_with(use.idx, result)
            for i, output in enumerate(self.graph.outputs):
                if output is old:
                    name, old.name = old.name, f"{old.name}.one"
                    result.name = name
                    self.graph.outputs[i] = result
            self.dynamic.add(result)
            self.mixed.add(result)
        else:
            result.type = old.type
            if old.shape is not None:
                result.shape = ir.Shape([ROWS, *old.shape])
            self.lifted[old] = result
        self.done.append(node)
        return result

    def refused(self, node: ir.Node) -> Exception:
        who = node.metadata_props.get("pelt.attachment") or next(
            (v.metadata_props["pelt.attachment"] for v in node.inputs if v is not None
             and "pelt.attachment" in v.metadata_props), "a module")  # fmt: skip
        where = node.metadata_props.get("pelt.site", node.name or "")
        return fail("E208", f"'{who}' at {where} cannot be computed for each row of a batch: the step {node.op_type}"
                            " has no form with a profile per row here", expected="mode: swappable")  # fmt: skip

    # what is known of values

    def rank(self, value: ir.Value) -> int | None:
        return None if value.shape is None else len(value.shape)

    def of_batch(self, value: ir.Value) -> bool:
        """Whether the first axis of a value that depends on the texts is the rows of the batch."""
        if value in self.mixed:
            return True
        if value.shape is not None and len(value.shape):
            size = value.shape[0]
            if isinstance(size, int) or (size is not None and str(size) not in ("None", self.batch)):
                return False
            if str(size) == self.batch:
                return True
        node = value.producer()
        if node is None or node.op_type in ("Reshape", "Transpose", "Flatten", "Gather", *SHAPES):
            return False
        inputs = [v for v in node.inputs if v is not None and v in self.dynamic]
        return bool(inputs) and all(self.of_batch(v) for v in inputs if v.dtype != ir.DataType.INT64)

    def mates(self, node: ir.Node) -> list[ir.Value] | None:
        """The inputs that are values of the batch; None where one depends on the texts and is none."""
        found = [v for v in node.inputs if v is not None and v in self.dynamic]
        return found if all(self.of_batch(v) and self.rank(v) is not None for v in found) else None

    def ranked(self, value: ir.Value, rank: int) -> ir.Value | None:
        """The rows' form of a value, with so many axes: ones behind that of the rows, or ones less."""
        own, axes = self.lifted[value], self.rank(value)
        if axes is None or value.shape is None:
            return None
        name = f"{own.name}.{rank}"
        if axes + 1 < rank:
            return self.emit("Unsqueeze", [own, self.integers(list(range(1, rank - axes)))], name)
        if axes + 1 > rank:
            extra = axes + 1 - rank
            if any(value.shape[i] != 1 for i in range(extra)):
                return None
            return self.emit("Squeeze", [own, self.integers(list(range(1, extra + 1)))], name)
        return own

    def inputs(self, node: ir.Node, rank: int) -> list[ir.Value | None] | None:
        """A node's inputs, those of profiles in the rows' form with so many axes."""
        found = [self.ranked(v, rank) if v is not None and v in self.lifted else v for v in node.inputs]
        return None if any(v is not None and v in self.lifted and f is None
                           for v, f in zip(node.inputs, found, strict=True)) else found  # fmt: skip

    def again(self, node: ir.Node, inputs: Sequence[ir.Value | None], **attributes: object) -> ir.Value:
        """The node on other inputs."""
        given = {name: a for name, a in node.attributes.items() if name not in attributes}
        copy = ir.Node(node.domain, node.op_type, inputs, given.values(), num_outputs=1)
        copy.attributes.update(ir.node("X", [], attributes=dict(attributes)).attributes)  # type: ignore[arg-type]
        copy.metadata_props.update(node.metadata_props)
        copy.name = copy.outputs[0].name = f"{node.outputs[0].name}.rows"
        copy.outputs[0].type = node.outputs[0].type
        self.added.append(copy)
        return copy.outputs[0]

    # rules: the result for all rows, or None where there is none

    def on_elementwise(self, node: ir.Node) -> ir.Value | None:
        mates = self.mates(node)
        if mates is None:
            return None
        ranks = [self.rank(v) for v in mates] or [
            None if r is None else r + 1 for r in (self.rank(v) for v in node.inputs if v is not None)
        ]
        if any(r is None for r in ranks):
            return None
        inputs = self.inputs(node, max(r for r in ranks if r is not None))
        return None if inputs is None else self.again(node, inputs)

    def on_unary(self, node: ir.Node) -> ir.Value | None:
        return self.again(node, [self.lifted.get(v, v) if v is not None else None for v in node.inputs])

    on_Softmax = on_unary
    """Along an axis that counts from the end, as all that modules bring do."""

    def on_reduction(self, node: ir.Node) -> ir.Value | None:
        axes = node.inputs[1] if len(node.inputs) > 1 else None
        if axes is None or axes.const_value is None:
            return None
        moved = [a if a < 0 else a + 1 for a in axes.const_value.numpy().tolist()]
        return self.again(node, [self.lifted.get(node.inputs[0], node.inputs[0]), self.integers(moved)])  # type: ignore[arg-type]

    def on_MatMul(self, node: ir.Node) -> ir.Value | None:
        if any(v is None or self.rank(v) is None for v in node.inputs):
            return None
        if not any(v in self.dynamic for v in node.inputs):
            return self.again(node, [self.lifted.get(v, v) for v in node.inputs if v is not None])
        x, weight = node.inputs
        assert x is not None and weight is not None
        rank = self.rank(x)
        if x in self.lifted or self.rank(weight) != 2 or rank is None:
            return None
        if rank == 2:
            return self.of_tokens(node, x, lambda text: self.again(node, [text, self.lifted[weight]]))
        own = self.ranked(weight, rank)
        return None if own is None or self.mates(node) is None else self.again(node, [x, own])

    def on_Gemm(self, node: ir.Node) -> ir.Value | None:
        """A product and a sum, of tokens [N, I]."""
        x, weight, *rest = node.inputs
        plain = node.attributes.get_float("alpha", 1.0) == 1 and node.attributes.get_int("transA", 0) == 0
        plain &= node.attributes.get_float("beta", 1.0) == 1
        if x is None or weight is None or x in self.lifted or not plain:
            return None
        turn, name = node.attributes.get_int("transB", 0), f"{node.name}.weight"

        def product(text: ir.Value) -> ir.Value | None:
            own = self.lifted.get(weight, weight)
            axes = [0, 2, 1] if weight in self.lifted else [1, 0]
            own = self.emit("Transpose", [own], name, {"perm": axes}) if turn else own
            found = self.emit("MatMul", [text, own], f"{node.name}.product")
            if not rest or rest[0] is None:
                return found
            bias = self.ranked(rest[0], 3) if rest[0] in self.lifted else rest[0]
            return None if bias is None else self.emit("Add", [found, bias], f"{node.name}.sum")

        return self.of_tokens(node, x, product)

    def of_tokens(self, node: ir.Node, x: ir.Value, compute: Callable[[ir.Value], ir.Value | None]) -> ir.Value | None:
        """What a node makes of tokens [N, I], computed of texts [B, S, I]: those whose tokens they are, where the
        exporter wrote all texts' tokens in one row before a product; texts of one token each, where they are pooled."""
        whole = self.whole(x)
        if whole is None and (self.mates(node) is None or self.rank(x) != 2):
            return None
        text = self.emit("Unsqueeze", [x, self.integers([1])], f"{node.name}.text") if whole is None else whole
        found = compute(text)
        if found is None:
            return None
        if whole is None:
            return self.emit("Squeeze", [found, self.integers([1])], f"{node.name}.one")
        width = node.outputs[0].shape[-1] if node.outputs[0].shape is not None else None
        if not isinstance(width, int):
            return None
        return self.emit("Reshape", [found, self.integers([-1, width])], f"{node.name}.tokens")

    def whole(self, x: ir.Value) -> ir.Value | None:
        """The texts [B, S, I] whose tokens x [N, I] holds in one row; None where it is not made of them so."""
        node = x.producer()
        text = node.inputs[0] if node is not None and node.op_type == "Reshape" else None
        if text is None or text.shape is None or x.shape is None or len(text.shape) != 3 or len(x.shape) != 2:
            return None
        alike = isinstance(x.shape[-1], int) and x.shape[-1] == text.shape[-1]
        return text if alike and self.of_batch(text) else None

    def on_Transpose(self, node: ir.Node) -> ir.Value | None:
        perm = node.attributes.get_ints("perm")
        moved = [0, *(p + 1 for p in perm)]
        return self.again(node, [self.lifted[node.inputs[0]]], perm=moved)  # type: ignore[index]

    def on_Expand(self, node: ir.Node) -> ir.Value | None:
        rank = self.rank(node.outputs[0])
        value = node.inputs[0]
        if rank is None or value is None or value not in self.lifted:
            return None
        own = self.ranked(value, rank)
        return None if own is None else self.again(node, [own, node.inputs[1]])

    def on_Slice(self, node: ir.Node) -> ir.Value | None:
        value, start, stop, axes, *steps = node.inputs
        if value not in self.lifted or axes is None or axes.const_value is None:
            return None
        moved = self.integers([a if a < 0 else a + 1 for a in axes.const_value.numpy().tolist()])
        return self.again(node, [self.lifted[value], start, stop, moved, *steps])

    def on_Concat(self, node: ir.Node) -> ir.Value | None:
        if self.mates(node):
            return None  # a profile's part has been given the batch's shape before
        axis = node.attributes.get_int("axis")
        parts: list[ir.Value] = []
        for value in node.inputs:
            assert value is not None
            own = self.lifted.get(value)
            if own is None:
                sizes = self.emit("Shape", [value], f"{node.name}.sizes.{len(parts)}")
                rows = self.emit("Shape", [self.index], f"{node.name}.rows.{len(parts)}")
                whole = self.emit("Concat", [rows, sizes], f"{node.name}.shape.{len(parts)}", {"axis": 0})
                own = self.emit("Expand", [value, whole], f"{node.name}.part.{len(parts)}")
            parts.append(own)
        return self.again(node, parts, axis=axis if axis < 0 else axis + 1)

    def on_LayerNormalization(self, node: ir.Node) -> ir.Value | None:
        """Without gain and bias first, which are the rows' own."""
        x, gain, *rest = node.inputs
        mates, rank = self.mates(node), self.rank(x) if x is not None else None
        if not mates or x in self.lifted or rank is None or gain is None or gain.shape is None or x is None:
            return None
        width = gain.shape[0]
        if not isinstance(width, int):
            return None
        ones = np.ones(width, (gain.dtype or ir.DataType.FLOAT).numpy())
        result = self.again(node, [x, self.constant(f"pelt.rows.ones.{width}", ones)])
        for kind, value in (("Mul", gain), ("Add", rest[0] if rest else None)):
            if value is not None:
                own = self.ranked(value, rank) if value in self.lifted else value
                if own is None:
                    return None
                result = self.emit(kind, [result, own], f"{node.name}.{kind.lower()}")
        return result

    def on_Reshape(self, node: ir.Node) -> ir.Value | None:
        value, shape = node.inputs
        sizes = None if shape is None or shape.const_value is None else shape.const_value.numpy().tolist()
        if value is None or value not in self.lifted or sizes is None or any(size < 1 for size in sizes):
            return None
        return self.again(node, [self.lifted[value], self.integers([-1, *sizes])])

    def on_Gather(self, node: ir.Node) -> ir.Value | None:
        """Rows of a table by ids [B, S]: all profiles' tables are one, in which a text's rows begin at its own. Of a
        table that all profiles share, by places that each profile has."""
        table, ids = node.inputs
        if table not in self.lifted and ids in self.lifted and node.attributes.get_int("axis", 0) == 0:
            return self.again(node, [table, self.lifted[ids]])
        every = self.every.get(table) if table is not None else None
        if every is None or ids is None or table is None or table.shape is None or not self.of_batch(ids):
            return None
        rows, *rest = table.shape
        if node.attributes.get_int("axis", 0) != 0 or not isinstance(rows, int) or self.rank(ids) != 2:
            return None
        flat = self.emit("Reshape", [every, self.integers([-1, *map(int, rest)])], f"{node.name}.tables")  # type: ignore[arg-type]
        start = self.emit("Mul", [self.index, self.integers([rows])], f"{node.name}.start")
        start = self.emit("Unsqueeze", [start, self.integers([1])], f"{node.name}.starts")
        places = self.emit("Add", [ids, start], f"{node.name}.places")
        return self.again(node, [flat, places])
