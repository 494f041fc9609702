"""Write the table of CUDA kernels, compiler/lowering/cuda_kernels.json, from those that the installed ONNX Runtime has.

    python tests/gpu/kernels.py

Types are those of its registry. Which inputs and outputs are in the machine's own memory, the registry does not tell:
each operator is placed alone, and the copies that ONNX Runtime puts around it are counted. No device is needed. What
runs graphs of its own cannot be placed alone, and is as ONNX Runtime's source registers it. Of others that cannot be,
the table says that it is not known.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
from driverless import asked

PROVIDER = "CUDAExecutionProvider"
TABLE = Path(__file__).resolve().parents[2] / "compiler/lowering/cuda_kernels.json"
OLDEST = 18
"""The oldest opset of the standard's own domain that the table is of."""
DOMAINS = {"": "", "com.microsoft": "com.microsoft::"}
VALUES: dict[str, Any] = {"INT": 1, "INTS": [0], "FLOAT": 1.0, "STRING": "", "FLOATS": [1.0]}
"""What attributes get that an operator needs, by their type."""
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "AveragePool": {"kernel_shape": [1, 1]}, "MaxPool": {"kernel_shape": [1, 1]},
    "MatMulNBits": {"K": 32, "N": 32, "bits": 4, "block_size": 32},
}  # fmt: skip
"""What they get in its stead where such a value has no meaning."""
FEWER = {"BatchNormalization": (5, 1), "MatMulNBits": (3, 1), "MultiHeadAttention": (10, 3),
         "DecoderMaskedMultiHeadAttention": (11, 3)}  # fmt: skip
"""How many inputs and outputs are asked of an operator whose others cannot be together, or have no type alone."""
SOURCE: dict[str, tuple[list[int], list[int]]] = {"If": ([0], []), "Loop": ([0, 1], []), "Scan": ([], [])}
"""Inputs and outputs in the machine's own memory, by onnxruntime/core/providers/cuda/controlflow."""
OPEN = 2**31 - 1
"""The end of a kernel's versions that is none."""


def operators() -> Iterator[tuple[Any, list[dict[str, list[str]]]]]:
    """Each operator that CUDA has kernels for, as the schema of one of its versions, with the types of its kernels."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    schemas: dict[tuple[str, str], list[Any]] = {}
    for schema in state.get_all_operator_schema():
        schemas.setdefault((schema.domain, schema.name), []).append(schema)
    kernels: dict[tuple[str, str], list[Any]] = {}
    for kernel in state.get_all_opkernel_def():
        if kernel.provider == PROVIDER:
            kernels.setdefault((kernel.domain, kernel.op_name), []).append(kernel)
    for key in sorted(key for key in kernels if key[0] in DOMAINS and key in schemas):
        versions = sorted(schemas[key], key=lambda schema: schema.since_version)
        for schema, after in zip(versions, [*versions[1:], None], strict=True):
            if after is None or key[0] or after.since_version > OLDEST:
                yield schema, [types_of(k) for k in kernels[key] if holds(*k.version_range, schema.since_version)]


def holds(first: int, last: int, since: int) -> bool:
    """Whether a kernel of some versions is one of an operator's version: ONNX Runtime takes one without an end for the
    version alone that it begins with, since a later one may mean something else."""
    return first == since or (last != OPEN and first <= since <= last)


def types_of(kernel: Any) -> dict[str, list[str]]:
    return {name: sorted(map(plain, types)) for name, types in kernel.type_constraints.items()}


def plain(kind: str) -> str:
    """A tensor's type without the word."""
    return kind[7:-1] if kind.startswith("tensor(") else kind


def joined(kernels: list[dict[str, list[str]]]) -> list[dict[str, list[str]]]:
    """The same kernels in fewer entries: two that differ in the types of one parameter are one."""
    found: list[dict[str, list[str]]] = []
    for kernel in kernels:
        for other in found:
            differing = [name for name in kernel if kernel[name] != other.get(name)]
            if kernel.keys() == other.keys() and len(differing) <= 1:
                for name in differing:
                    other[name] = sorted({*other[name], *kernel[name]})
                break
        else:
            found.append(dict(kernel))
    return found if len(found) == len(kernels) else joined(found)


def parameters(formal: Any, schema: Any) -> list[str]:
    """The types of formal inputs or outputs: names of constraints, or types; `...` behind one that repeats."""
    only = {c.type_param_str: c.allowed_type_strs[0] for c in schema.type_constraints if len(c.allowed_type_strs) == 1}
    return [plain(only.get(f.typeStr, f.typeStr)) + ("..." if f.option.name == "Variadic" else "") for f in formal]


def alone(schema: Any, kernel: dict[str, list[str]]) -> ir.Model:
    """A graph of one operator, in the types of one of its kernels, between nodes that are on the device."""
    allowed = {c.type_param_str: [plain(t) for t in c.allowed_type_strs] for c in schema.type_constraints}

    def kind(formal: Any) -> ir.DataType:
        one = plain(formal.typeStr)
        types = kernel.get(one) or kernel.get(formal.name) or allowed.get(one) or [one]
        return ir.DataType[("float" if "float" in types else types[0]).upper()]

    given = {name: VALUES[a.type.name] for name, a in schema.attributes.items() if a.required and a.type.name in VALUES}
    given |= {"to": kind(schema.outputs[0]).value} if schema.name == "Cast" else ATTRIBUTES.get(schema.name, {})
    many = FEWER.get(schema.name, (len(schema.inputs), len(schema.outputs)))
    inputs = [ir.Value(name=f"in{i}", type=ir.TensorType(kind(f))) for i, f in enumerate(schema.inputs[: many[0]])]
    before = [ir.node("Identity", [value], name=f"before{i}") for i, value in enumerate(inputs)]
    it = ir.node(schema.name, [node.outputs[0] for node in before], given, domain=schema.domain, name="it",
                 num_outputs=many[1])  # fmt: skip
    after = [ir.node("Identity", [value], name=f"after{i}") for i, value in enumerate(it.outputs)]
    for letter, made in (("x", [node.outputs[0] for node in before]), ("y", it.outputs)):
        for i, value in enumerate(made):
            value.name = f"{letter}{i}"
    for i, (node, formal) in enumerate(zip(after, schema.outputs[: many[1]], strict=True)):
        node.outputs[0].name, node.outputs[0].type = f"out{i}", ir.TensorType(kind(formal))
    imports = {"": OLDEST if schema.domain else max(schema.since_version, OLDEST)}
    imports |= {schema.domain: schema.since_version} if schema.domain else {}
    outputs = [node.outputs[0] for node in after]
    return ir.Model(
        ir.Graph(inputs, outputs, nodes=[*before, it, *after], opset_imports=imports, name="alone"), ir_version=10
    )


def in_memory(schema: Any, kernel: dict[str, list[str]]) -> tuple[list[int], list[int]] | None:
    """Which inputs and outputs of an operator's kernel are in the machine's own memory; None where the operator alone
    is no graph, or CUDA does not take it."""
    if schema.name in SOURCE and not schema.domain:
        return SOURCE[schema.name]
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.optimized_model_filepath, options.log_severity_level = f"{folder}/placed.onnx", 4
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            model = ir.to_proto(alone(schema, kernel)).SerializeToString()
            session = ort.InferenceSession(model, options, [PROVIDER, "CPUExecutionProvider"])
            placed = onnx.load(f"{folder}/placed.onnx").graph.node
        except Exception:
            return None
    on = {node.name: part.ep_name for part in session.get_provider_graph_assignment_info()
              for node in part.get_nodes()}  # fmt: skip
    if on.get("it") != PROVIDER:
        return None
    copied = {i.removesuffix(f"_{PROVIDER}") for node in placed if node.op_type == "MemcpyToHost" for i in node.input}
    return ([i for i in range(len(schema.inputs)) if f"x{i}" in copied],
            [i for i in range(len(schema.outputs)) if on.get(f"after{i}", PROVIDER) != PROVIDER])  # fmt: skip


def told(start: int) -> None:
    """Print a line of JSON for each operator from a place on: its name, its entry, and its place in the list."""
    for place, (schema, kernels) in enumerate(operators()):
        if place < start:
            continue
        name = f"{DOMAINS[schema.domain]}{schema.name}-{schema.since_version}"
        inputs, outputs = (parameters(formal, schema) for formal in (schema.inputs, schema.outputs))
        entry = {"inputs": inputs, "outputs": outputs, "kernels": joined(kernels)}
        print(json.dumps([place, name, entry, None]), flush=True)
        memory = in_memory(schema, kernels[0]) if kernels else ([], [])
        print(json.dumps([place, name, entry, memory]), flush=True)


def table(stand_ins: Path) -> tuple[dict[str, Any], list[str]]:
    """All entries, and the operators whose memory is not known. They are placed in a process of its own, which a kernel
    that is made of attributes without meaning may end; another one goes on behind it then."""
    entries, memory, start = dict[str, Any](), dict[str, Any](), 0
    while True:
        lines = asked(stand_ins, "kernels.py", "--from", str(start), strict=False)
        if not lines:
            break
        for place, name, entry, found in lines:
            entries[name], memory[name], start = entry, found, place + 1
    for name, found in memory.items():
        for key, places in zip(("host_inputs", "host_outputs"), found or (), strict=False):
            entries[name] |= {key: places} if places else {}
        entries[name] |= {"memory": "unknown"} if found is None else {}
    return entries, [name for name, found in memory.items() if found is None]


if __name__ == "__main__":
    if "--from" in sys.argv:
        told(int(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            found, unknown = table(Path(folder))
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in found.items())
        head = f'{{\n "onnxruntime": "{ort.__version__}",\n "oldest": {OLDEST},\n "operators": {{\n'
        TABLE.write_text(f"{head}{lines}\n }}\n}}\n", encoding="utf-8")
        print(f"{TABLE}: {len(found)} operators; memory not known of {', '.join(unknown)}")
