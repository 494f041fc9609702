"""What an exported graph is brought into before it is used: folded constants, standard names of outputs and axes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from peltc.compiler.export.inputs import output_name
from peltc.compiler.senses.examples import Axes
from peltc.spec.diagnostics import fail

TINY, TINY_SIZE = 1e-8, 16
"""What onnxscript takes for zero, in constants of so many elements."""


def clean(model: Any, names: set[str]) -> dict[str, tuple[int, ...]]:
    """Fold constants and drop dead code, with the parameters out of reach: as graph inputs they are constants to no
    pass, so none is folded, merged or lost. Constants of half precision keep the numbers that they are rounded from.
    Returns the shapes of the parameters that the graph reads."""
    import onnx_ir as ir
    from onnxscript import optimizer

    from peltc.compiler.graphs.wide import recall, unrounded

    graph = model.graph
    numbers = unrounded(graph, names)
    parameters = []
    for name in [n for n in graph.initializers if n in names]:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
        parameters.append(value)
    for value in graph.initializers.values():
        tensor = value.const_value
        value.const_value = ir.tensor(tensor.numpy(), name=value.name)  # a buffer, out of torch's hands
    tiny = shield(graph)
    optimizer.optimize_ir(model, num_iterations=2)
    unshield(graph, tiny)
    recall(graph, numbers)
    part_transpositions(graph)
    unused = [value for value in parameters if not value.uses()]
    for value in unused:
        graph.inputs.remove(value)
    for node in model.graph.all_nodes():
        scope = node.metadata_props.get("namespace")
        node.metadata_props.clear()
        if scope:
            node.metadata_props["namespace"] = scope
    return {value.name: tuple(int(d) for d in value.shape) for value in parameters if value.uses()}


def shield(graph: Any) -> dict[str, Any]:
    """Make inputs of constants that are nearly zero, in place. The optimizer takes numbers up to 1e-8 for zeros, and
    leaves out additions of them: the epsilon that keeps a norm of nothing from dividing by nothing.

    Returns:
        The constants' tensors by name.
    """
    import onnx_ir as ir

    found: dict[str, Any] = {}
    constants = [value for value in graph.initializers.values()]
    constants += [node.outputs[0] for node in graph if node.op_type == "Constant" and "value" in node.attributes]
    for value in constants:
        node = value.producer()
        tensor = value.const_value if node is None else node.attributes["value"].as_tensor()
        if tensor is None or tensor.size > TINY_SIZE or not tensor.dtype.is_floating_point():
            continue
        numbers = np.abs(tensor.numpy().astype(np.float64))
        if not ((numbers > 0) & (numbers <= TINY)).any():
            continue
        name = value.name
        held = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype))
        value.replace_all_uses_with(held)
        if node is None:
            del graph.initializers[name]
        else:
            graph.remove(node)
        graph.inputs.append(held)
        found[name] = tensor
    return found


def unshield(graph: Any, tiny: Mapping[str, Any]) -> None:
    """Make constants of the inputs that `shield` made, in place; of those alone that something still reads."""
    for value in [value for value in graph.inputs if value.name in tiny]:
        graph.inputs.remove(value)
        if value.uses() or value.is_graph_output():
            value.const_value = tiny[value.name]
            graph.register_initializer(value)


def part_transpositions(graph: Any) -> None:
    """Let keys exist as [B, H, T, Dh] on their way from [B, T, H, Dh] to [B, H, Dh, T], in place.

    Optimisers make one transposition of the two; ONNX Runtime does so again when it opens the graph."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type == "Transpose" and list(node.attributes.get_ints("perm", ())) == [0, 2, 3, 1]:
            heads = ir.node("Transpose", [node.inputs[0]], {"perm": [0, 2, 1, 3]}, name=f"{node.name}.heads")
            output, source = heads.outputs[0], node.inputs[0]
            output.name, output.type = f"{node.outputs[0].name}.heads", source.type
            if source.shape is not None:
                output.shape = ir.Shape([source.shape[axis] for axis in (0, 2, 1, 3)])
            heads.metadata_props.update(node.metadata_props)
            graph.insert_before(node, heads)
            node.replace_input_with(0, output)
            node.attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 3, 2])


def name_outputs(model: Any, inputs: Mapping[str, Any]) -> None:
    """Give inputs the names that they have in the model, and outputs names of words."""
    for value in model.graph.inputs:
        if (value.name or "").removeprefix("input.") in inputs:
            value.name = value.name.removeprefix("input.")
    named = {value: output_name(value.name) for value in model.graph.outputs}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value not in named and value.name in named.values():
                value.name = f"{value.name}.inner"
    for value, name in named.items():
        value.name = name


def name_axes(model: Any, axes: Axes) -> None:
    """Give the symbolic axes the names that users read: batch, sequence, target. What is computed of an axis, such as
    the number of frames in a recording, is told by its name too: `time//2 + 1`.

    Args:
        axes: the names by input; None where an axis has one size.

    Raises:
        PeltError: E505 where an axis that was to be symbolic is not.
    """
    import onnx_ir as ir

    renamed: dict[str, str] = {}
    for value in model.graph.inputs:
        if value.name in axes:
            for axis, word in enumerate(axes[value.name]):
                size = value.shape[axis]
                if word is None:
                    continue
                if isinstance(size, int) or size.value is None:
                    raise fail(
                        "E505",
                        f"the exporter froze the {word} axis of '{value.name}' at {size}",
                        expected="a symbolic axis",
                    )
                renamed[size.value] = word

    def spelled(expression: str) -> str:
        return re.sub(r"[A-Za-z_]\w*", lambda found: renamed.get(found[0], found[0]), expression)

    def rename(value: Any) -> None:
        if value is not None and value.shape is not None:
            sizes: list[Any] = [size if isinstance(size, int) else size.value for size in value.shape]
            named = [spelled(size) if isinstance(size, str) else size for size in sizes]
            if named != sizes:  # a new one: that of a square map's output is frozen
                value.shape = ir.Shape(named)

    for value in model.graph.inputs:
        if value.name in axes:
            rename(value)
    for node in model.graph.all_nodes():
        for output in node.outputs:
            rename(output)
