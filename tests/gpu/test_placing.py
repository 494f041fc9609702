"""What is said of graphs for CUDA: by ONNX Runtime's own CUDA provider, which places nodes without a device too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import driverless
import onnx_ir as ir
import pytest
import torch
from lowered import model_of

import peltc
from peltc.compiler.lowering import kernels
from peltc.compiler.lowering.kernels import LACKING, SHAPES, check_kernels, place, table
from peltc.runtime.building.compile import plan_for
from peltc.spec.diagnostics import PeltError

Folder = Callable[..., Path]
CELLS = [
    ("bert", "tiny_attention", "bfloat16"), ("llama", "prefix", "float16"),
    *(pytest.param(*cell, marks=pytest.mark.slow) for cell in (
        ("t5", "unipelt", "float32"), ("gpt2", "lora", "float32"), ("llama", "bottleneck", "bfloat16"),
        ("mixtral", "lora", "float32"))),
]  # fmt: skip
needs_provider = pytest.mark.skipif(bool(driverless.missing()), reason=driverless.missing() or "-")


def artifact(family: str, case: str, precision: str, folder: Folder, out: Path) -> dict[str, Any]:
    spec = peltc.load_spec(cases.spec(case, family, "static", precision))
    plan, _ = plan_for(spec, folder(family))
    generates = family not in ("bert", "mixtral") and case != "unipelt"
    return peltc.compile(spec, folder(family), out, cases.tensors(plan), generation=generates, verify=False)


@needs_provider
@pytest.mark.parametrize(("family", "case", "precision"), CELLS)
def test_placed_as_by_onnxruntime(
    family: str, case: str, precision: str, model_folder: Folder, shared: Path, tmp_path: Path
) -> None:
    """Node by node; and copies, and whether a CUDA graph is accepted."""
    names = artifact(family, case, precision, model_folder, tmp_path / "out")["graphs"]
    models = [driverless.numbered(tmp_path / "out" / f"{name}.onnx") for name in names]
    files = [tmp_path / "out" / f"{name}.numbered" for name in names]
    for model, theirs in zip(models, driverless.asked(shared / "cuda", "placing.py", *files), strict=True):
        ours = place(model)
        on_cpu = {node.name for node, where in ours.where.items() if where in (SHAPES, LACKING)}
        decided = {node.name for node, where in ours.where.items() if where != kernels.CONSTANT}
        assert {name for name in theirs["off"] if name in decided} == on_cpu
        assert bool(theirs["copies"]) == bool(ours.hinders)
        assert (theirs["captured"] is True) == (ours.captured() is True)


def test_what_is_known_of_the_kernels() -> None:
    """Of ONNX Runtime 1.31, found in other ways before there was a table."""
    version, operators = table()
    assert version.startswith("1.31")

    def has(operator: str, kind: str, opset: int = 23) -> bool:
        known = operators[operator]
        entry = known[max(since for since in known if since <= opset)]
        return entry.fits(entry.bound([kind]))

    for operator in ("Attention", "RotaryEmbedding", "RMSNormalization", "com.microsoft::MatMulNBits"):
        assert all(has(operator, kind) for kind in ("float", "float16", "bfloat16"))
    for operator in ("Greater", "Less", "Equal", "Log", "Reciprocal", "ReduceL2", "ReduceMax", "Pad", "CumSum", "Clip",
                     "LeakyRelu"):  # fmt: skip
        assert has(operator, "float16") and not has(operator, "bfloat16")
    for operator in ("Elu", "Selu"):
        assert has(operator, "float", 21) and not has(operator, "float", 22)
    gqa = "com.microsoft::GroupQueryAttention"
    assert has(gqa, "float16", 1) and has(gqa, "bfloat16", 1) and not has(gqa, "float", 1)


LOGARITHM: dict[str, Any] = {
    "title": "A user's own, of which bfloat16 has no kernel", "source": "these tests", "site": "block",
    "parameters": {"u": {"shape": ["d"], "init": "zeros"}}, "delta": "log(y * y + 1) * u",
}  # fmt: skip


def logarithm(folder: Path, **deploy: str) -> tuple[dict[str, Any], dict[str, Any]]:
    content = {"pelt": 1, "methods": {"logarithm": LOGARITHM}, "deploy": deploy,
               "attach": [{"method": "logarithm", "at": "feed_forward.block", "layers": [1]}]}  # fmt: skip
    return content, cases.tensors(plan_for(peltc.load_spec(content), folder)[0])


def test_a_module_without_a_kernel_is_refused_by_its_origin(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For CUDA; elsewhere the manifest says what is lacking."""
    monkeypatch.setattr("peltc.compiler.lowering.lower.put_wider", lambda model: 0)
    folder = model_folder("bert")
    content, given = logarithm(folder, precision="bfloat16")
    found = peltc.compile(content, folder, tmp_path / "any", given, verify=False)["kernels"]["model"]
    origin = "'Log' of opset 23 in bfloat16, of 'logarithm' (logarithm) at encoder.layers.1.feed_forward.block"
    assert found["lacking"] == [origin] and found["cuda_graph"] == f"CUDA has no kernel for {origin}"
    with pytest.raises(PeltError, match="E640 CUDA has no kernel for 'Log'") as caught:
        peltc.compile(content, folder, tmp_path / "cuda", given, provider="cuda", verify=False)
    assert [d.code for d in caught.value.diagnostics] == ["E640"] and origin in str(caught.value)
    assert not (tmp_path / "cuda").exists()
    assert not peltc.compile(content, folder, tmp_path / "cpu", given, provider="cpu", verify=False)["kernels"]


def test_what_lacks_a_kernel_is_computed_in_float32(model_folder: Folder, tmp_path: Path) -> None:
    """The function stays the same; the Casts are the module's own."""
    folder = model_folder("bert")
    content, given = logarithm(folder, precision="bfloat16", provider="cuda")
    found = peltc.compile(content, folder, tmp_path / "out", given)
    assert found["verification"]["worst"] <= found["verification"]["tolerance"]
    assert found["kernels"]["model"]["lacking"] == [] and found["kernels"]["model"]["cuda_graph"] is True
    graph = ir.load(tmp_path / "out/model.onnx").graph
    (log,) = (node for node in graph if node.op_type == "Log")
    around = [log.predecessors()[0], log.successors()[0]]
    assert [node.op_type for node in around] == ["Cast", "Cast"]
    assert all(node.metadata_props["pelt.attachment"] == "logarithm" for node in around)


class Bent(torch.nn.Module):
    """A model with an operation that CUDA lost at opset 22, in every type."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bend, self.down = torch.nn.Linear(8, 16), torch.nn.ELU(), torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.bend(self.up(x)))


def test_a_model_without_a_kernel_is_refused(tmp_path: Path) -> None:
    content = {
        "pelt": 1,
        "attach": [{"method": "lora", "parameter": "up.weight", "r": 2}],
        "deploy": {"mode": "static"},
    }
    inputs, model = {"x": torch.randn(3, 5, 8)}, Bent().eval()
    peltc.attach(model, content, example_inputs=inputs)
    with pytest.raises(PeltError, match="E640 CUDA has no kernel for 'Elu' of opset 23 in float, of the model at bend"):
        peltc.compile(content, model, tmp_path / "out", example_inputs=inputs, provider="cuda", verify=False)


def test_graphs_in_nodes_are_searched() -> None:
    """A branch that may run has nodes like any other, in the opsets of the whole model."""
    branches = (
        "then_branch = a () => (float[batch] t) {{ t = {} (x) }},"
        " else_branch = b () => (float[batch] e) {{ e = Abs (x) }}"
    )
    for operator, lacking in (("Elu", ["Elu"]), ("Exp", [])):
        model = model_of("bool c, float[batch] x", "float[batch] y", f"y = If (c) <{branches.format(operator)}>")
        model.graph.opset_imports[""] = 23
        placed = place(model)
        assert [node.op_type for node in placed.lacking] == lacking
        assert sorted(node.op_type for node in placed.where) == sorted(["If", operator, "Abs"])
        assert str(placed.captured()).startswith("'If' of opset 23")
        if lacking:
            with pytest.raises(PeltError, match="E640 CUDA has no kernel for 'Elu' of opset 23 in float"):
                check_kernels({"model": placed})


def test_operands_that_kernels_read_in_the_machine_s_memory() -> None:
    """As ONNX Runtime places an operator alone, and as its source registers it; what neither tells is said."""
    operators = table()[1]
    assert operators["Loop"][23].host_inputs == {0, 1} and operators["If"][23].host_inputs == {0}
    assert operators["com.microsoft::MultiHeadAttention"][1].host_inputs == {8}
    blocks = operators["com.microsoft::MatMulNBits"][1]
    assert blocks.known and not blocks.host_inputs and not operators["GRU"][22].known
    model = model_of("float[steps,batch,4] x, float[1,6,4] w, float[1,6,2] r", "float[1,batch,2] h",
                     "y, h = GRU <hidden_size = 2> (x, w, r)")  # fmt: skip
    assert "it is not known of its kernel" in str(place(model).captured())
