"""The graph of a short model, given all its layers."""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir
from peltc.compiler.export.stacks import FIRST, LAST, SECOND, SHARED, UNITS, Irregular, Shapes, Stack


def grow(model: ir.Model, parameters: Shapes, stacks: Sequence[Stack]) -> dict[str, tuple[int, ...]]:
    """Give the graph of a short model all layers, in place. Returns the shapes of its parameters, in layer order.

    Args:
        model: a cleaned graph; its parameters are graph inputs.
        parameters: their shapes by name.
        stacks: the stacks that were shortened.

    Raises:
        Irregular: the segments of two units are not isomorphic, or are not joined like a chain. The graph is of no use
            then.
    """
    shapes = dict(parameters)
    for stack in stacks:
        shapes = _Growth(model.graph, shapes, stack).run()
    return shapes


class _Growth:
    """One stack of a graph, on its way from the short to the full length."""

    def __init__(self, graph: ir.Graph, parameters: Shapes, stack: Stack):
        self.graph = graph
        self.parameters = parameters
        self.stack = stack
        self.own: dict[ir.Value, int] = {}
        self.level: dict[ir.Value, int] = {}
        self.segments: dict[int, list[ir.Node]] = {SHARED: [], FIRST: [], SECOND: [], LAST: []}
        self.image: dict[ir.Value, ir.Value] = {}
        self.carried: dict[ir.Value, ir.Value] = {}
        self.taken = {v.name for v in (*graph.inputs, *graph.initializers.values())}
        for node in graph:
            self.taken |= {node.name, *(v.name for v in node.outputs)}

    def run(self) -> dict[str, tuple[int, ...]]:
        self.divide()
        self.match()
        self.check_ends()
        return self.copy()

    def divide(self) -> None:
        """Find each value's level, and thereby the segments."""
        import onnx_ir as ir

        for value in self.graph.inputs:
            name = value.name or ""
            if (name in self.parameters or self.stack.cached(name)) and (unit := self.stack.unit(name)) != SHARED:
                self.own[value] = unit
        self.level |= self.own
        for node in self.graph:
            if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
                raise Irregular(f"the graph has control flow, {node.op_type}")
            level = SHARED
            if not self.measures(node):
                level = max((self.of(value) for value in node.inputs), default=SHARED)
            self.segments[level].append(node)
            if level != SHARED:
                self.level.update(dict.fromkeys(node.outputs, level))
        if not self.segments[FIRST]:
            raise Irregular(f"the graph does not depend on {self.stack.path}")

    def of(self, value: ir.Value | None) -> int:
        """A value's level."""
        return SHARED if value is None else self.level.get(value, SHARED)

    def measures(self, node: ir.Node) -> bool:
        """Whether a node reads, on behalf of all units, the shape of one unit's entry of a cache: the exporter asks
        any layer how many tokens are cached. That all entries have this shape is checked; where each unit asks for the
        shape of its own, the answers stay apart."""
        entry = node.inputs[0] if (node.domain, node.op_type) == ("", "Shape") else None
        if entry is None or entry not in self.own or not self.stack.cached(entry.name or ""):
            return False
        names = {self.stack.shift(entry.name or "", units) for units in range(-LAST, LAST + 1)}
        alike = [value for value in self.own if value.name in names]
        askers = {sum(_same_node(user, node) for user in value.consumers()) for value in alike}
        shape = entry.shape
        known = shape is not None and all(isinstance(size, int) or size.value is not None for size in shape)
        return known and len(alike) == UNITS and len(askers) > 1 and all(value.shape == shape for value in alike)

    def match(self) -> None:
        """Map the first segment onto the second: node by node, in order."""
        first, second = self.segments[FIRST], self.segments[SECOND]
        if len(first) != len(second):
            raise Irregular(f"two units of {self.stack.path} have {len(first)} and {len(second)} nodes")
        for one, other in zip(first, second, strict=True):
            if not _same_node(one, other):
                raise Irregular(f"two units of {self.stack.path} differ at {one.name} and {other.name}")
            for a, b in zip(one.inputs, other.inputs, strict=True):
                if not self.same_input(a, b):
                    raise Irregular(f"two units of {self.stack.path} are wired differently at {one.name}, {other.name}")
            self.image.update(zip(one.outputs, other.outputs, strict=True))

    def same_input(self, a: ir.Value | None, b: ir.Value | None) -> bool:
        """Whether a value is to the first segment what another is to the second: the unit's own, handed over by the
        unit before, or shared by all."""
        if a is None or b is None:
            return a is b
        if b in self.own:
            return a in self.own and self.of(b) == SECOND and b.name == self.stack.shift(a.name or "", 1)
        if self.of(b) == SECOND:
            return self.image.get(a) is b
        if self.of(b) == FIRST:
            return self.of(a) == SHARED and self.carried.setdefault(b, a) is a
        return self.of(a) == SHARED and (a is b or _same_constant(a, b))

    def check_ends(self) -> None:
        """Check that the segments form a chain: each is read by the next alone, the last unit reads what the others
        read, and each returns its entries of the caches and nothing else."""
        returned: dict[int, dict[str, ir.Value]] = {FIRST: {}, SECOND: {}, LAST: {}}
        for value in self.graph.outputs:
            name, level = value.name or "", self.of(value)
            unit = self.stack.unit(name) if self.stack.cached(name) else SHARED
            if unit != level and (unit != SHARED or level != LAST):
                raise Irregular(f"an output of the graph comes from the middle of {self.stack.path}")
            if unit != SHARED:
                returned[unit][self.stack.shift(name, LAST - unit)] = value
        one, other, last = (returned[unit] for unit in (FIRST, SECOND, LAST))
        if not one.keys() == other.keys() == last.keys() or any(self.image.get(one[n]) is not other[n] for n in one):
            raise Irregular(f"the units of {self.stack.path} return different parts of a cache")
        read = {value for node in self.segments[LAST] for value in node.inputs if value is not None}
        if any(self.of(value) == FIRST or (self.of(value) == SECOND and value.producer() is None) for value in read):
            raise Irregular(f"{self.stack.path} is no chain: a unit is read past the next one")
        if not self.carried or not all(self.image[value] in read for value in self.carried):
            raise Irregular(f"{self.stack.path} is no chain: the last unit does not read what the others read")

    def copy(self) -> dict[str, tuple[int, ...]]:
        """Copy the second segment, join the copies, and move the last unit to its place."""
        graph, stack = self.graph, self.stack
        nodes: list[ir.Node] = []
        for value, unit in self.own.items():
            if unit == LAST:
                value.name = stack.shift(value.name or "", stack.copies)
        for value in graph.outputs:
            if stack.cached(value.name or "") and stack.unit(value.name or "") == LAST:
                value.name = stack.shift(value.name or "", stack.copies)
        for node in self.segments[LAST]:
            _move_scope(node, stack, stack.copies)
        own = [value for value, unit in self.own.items() if unit == SECOND]
        copied = [{v: _like(v, stack.shift(v.name or "", copy)) for v in own} for copy in range(1, stack.copies + 1)]
        self.insert(graph.inputs, own, copied)
        before = {value: value for node in self.segments[SECOND] for value in node.outputs}
        for copy, now in enumerate(copied, 1):
            for node in self.segments[SECOND]:
                nodes.append(self.copy_node(node, copy, now, before))
            before = now
        self.insert(graph.outputs, [value for value in graph.outputs if self.of(value) == SECOND], copied)
        graph.insert_before(self.segments[LAST][0], nodes)
        for node in self.segments[LAST]:
            for index, source in enumerate(node.inputs):
                if source is not None and source in before:
                    node.replace_input_with(index, before[source])
        graph.sort()
        shapes = {stack.shift(n, stack.copies) if stack.unit(n) == LAST else n: s for n, s in self.parameters.items()}
        for name in (value.name or "" for value in own if value.name in self.parameters):
            for copy in range(1, stack.copies + 1):
                shapes[stack.shift(name, copy)] = self.parameters[name]
        return {value.name: shapes[value.name] for value in graph.inputs if value.name in shapes}

    def insert(
        self,
        listed: MutableSequence[ir.Value],
        values: Sequence[ir.Value],
        copied: Sequence[Mapping[ir.Value, ir.Value]],
    ) -> None:
        """Put the copies of some inputs or outputs after them, in the order of layers; a cache has a place of its own.

        Args:
            listed: the inputs or outputs of the graph, in place.
            values: those of the second unit.
            copied: the values of each copy, by those of the second unit.
        """
        groups: dict[str | None, list[ir.Value]] = {}
        for value in values:
            groups.setdefault(self.stack.cached(value.name or ""), []).append(value)
        for group in groups.values():
            position = max(listed.index(value) for value in group) + 1
            for now in copied:
                for value in group:
                    listed.insert(position, now[value])
                    position += 1

    def copy_node(
        self, node: ir.Node, copy: int, now: dict[ir.Value, ir.Value], before: Mapping[ir.Value, ir.Value]
    ) -> ir.Node:
        """A copy of a node of the second segment.

        Args:
            node: the node.
            copy: the copy's number, from 1.
            now: the copy's own values, by those of the segment; the node's are added.
            before: the same for the copy before.
        """
        import onnx_ir as ir

        inputs: list[ir.Value | None] = []
        for value in node.inputs:
            if value is not None and value in self.carried:
                inputs.append(before[self.image[value]])
            else:
                inputs.append(None if value is None else now.get(value, value))
        for value in node.outputs:
            entry = value.is_graph_output() and self.stack.shift(value.name or "", copy)
            now[value] = _like(value, entry or self.fresh(value.name, copy))
        clone = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            node.attributes.values(),
            overload=node.overload,
            outputs=[now[value] for value in node.outputs],
            version=node.version,
            name=self.fresh(node.name, copy),
            metadata_props=dict(node.metadata_props),
        )
        _move_scope(clone, self.stack, copy)
        return clone

    def fresh(self, name: str | None, copy: int) -> str | None:
        """A name that the graph does not have."""
        if not name:
            return name
        found = f"{name}.{copy}"
        while found in self.taken:
            found += "_"
        self.taken.add(found)
        return found


def _same_node(one: ir.Node, other: ir.Node) -> bool:
    """Whether two nodes compute the same of their inputs."""
    if one.op_identifier() != other.op_identifier() or one.version != other.version:
        return False
    if (len(one.inputs), len(one.outputs)) != (len(other.inputs), len(other.outputs)):
        return False
    if one.attributes.keys() != other.attributes.keys():
        return False
    if not all(_same_attribute(one.attributes[key], other.attributes[key]) for key in one.attributes):
        return False
    return all(a.type == b.type and a.shape == b.shape for a, b in zip(one.outputs, other.outputs, strict=True))


def _same_attribute(one: ir.Attr, other: ir.Attr) -> bool:
    import onnx_ir as ir

    if one.type != other.type or one.is_ref() or other.is_ref():
        return False
    if one.type == ir.AttributeType.TENSOR:
        return _same_tensor(one.value, other.value)
    return bool(one.value == other.value)


def _same_constant(one: ir.Value, other: ir.Value) -> bool:
    constants = one.const_value, other.const_value
    return one.is_initializer() and other.is_initializer() and None not in constants and _same_tensor(*constants)


def _same_tensor(one: Any, other: Any) -> bool:
    return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())


def _like(value: ir.Value, name: str | None) -> ir.Value:
    """A new value with the type, the shape and the metadata of another."""
    import onnx_ir as ir

    shape = None if value.shape is None else value.shape.copy()
    return ir.Value(name=name, shape=shape, type=value.type, metadata_props=dict(value.metadata_props))


def _move_scope(node: ir.Node, stack: Stack, units: int) -> None:
    """Let a node's metadata name the layer that it now belongs to."""
    for key, text in node.metadata_props.items():
        node.metadata_props[key] = stack.shift(text, units)
