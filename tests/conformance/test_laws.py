"""Every method on every model family, folded and static, against PyTorch; driven from the list of methods.

A cell compiles with verification on, which holds ONNX Runtime's outputs against PyTorch's elementwise, and then looks
at the graph: what folds leaves the base's operators as they were, what stays is marked, axes stay symbolic.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cases
import models
import numpy as np
import onnx_ir as ir
import pytest

from peltc.compiler.base.opening import open_base
from peltc.compiler.pipeline import build
from peltc.compiler.plan.claims import Plan
from peltc.runtime.building.compile import compile, plan_for
from peltc.runtime.running.session import Session
from peltc.runtime.verification.verify import TOLERANCE, example, verify_folder
from peltc.spec.diagnostics import PeltError
from peltc.spec.method import shipped
from peltc.spec.specification import Spec, load_spec


def cell(family: str, case: str) -> Any:
    """A cell of the table; what combines other cases runs on a part of the families, and on the others in sweeps."""
    slow = case in cases.COMBINED and family not in cases.SAMPLE and (family, case) != ("minilm", "unipelt")
    return pytest.param(
        family, case, marks=[pytest.mark.xdist_group(family), *([pytest.mark.slow] if slow else [])]
    )  # fmt: skip


CELLS = [cell(family, case) for family in models.FAMILIES for case in cases.CASES]


def histogram(model: ir.Model | Iterable[ir.Node]) -> Counter[str]:
    """Nodes by what they compute; a norm that adds before it normalises is a norm."""
    return Counter(
        node.op_type.replace("SkipSimplifiedLayer", "RMS").removeprefix("Skip")
        for node in (model.graph if isinstance(model, ir.Model) else model)
    )


def bare(folder: Path, out: Path, precision: str = "checkpoint", variant: str = "ids") -> ir.Model:
    """The base compiled with nothing attached."""
    base = open_base(folder, precision=precision, variant=variant)
    out.mkdir(parents=True, exist_ok=True)
    build(Plan(Spec("base", ()), base.fingerprint, ()), base, {}, out)
    return ir.load(out / "model.onnx")


IMPORTED = {
    "bat", "boft", "c3a", "delora", "fourierft", "fusion", "glora", "gralora", "hira", "hra", "hra_orthogonal", "miss",
    "randlora", "reft", "road", "shira", "vblora", "waveft",
}  # fmt: skip
"""Methods that are held in oracles/test_import.py and test_import_adapters.py instead: against the library that they
are imported from, folded and static, on as many architectures as it has them for."""


def test_every_shipped_method_has_a_case() -> None:
    used = {entry.get("method") for entries in cases.CASES.values() for entry in entries}
    assert set(shipped()) - used == IMPORTED


@pytest.mark.parametrize(("family", "case"), CELLS)
def test_cell(
    family: str, case: str, model_folder: Callable[..., Path], tmp_path: Path, figures: Callable[[str, float], None]
) -> None:
    folder = model_folder(family)
    spec = load_spec(cases.spec(case, family))
    plan, base = plan_for(spec, folder)
    scale = 0.01 if family == "minilm" else 0.1  # deeper and wider: what is random must be smaller
    tensors = cases.tensors(plan, scale)
    graphs, outputs = {}, {}
    for mode in ("fold", "static"):
        out = tmp_path / mode
        manifest = compile(load_spec(cases.spec(case, family, mode)), folder, out, tensors)
        found = manifest["verification"]
        figures(f"{mode} against PyTorch, float32", found["worst"])
        assert found["worst"] <= found["tolerance"]
        assert manifest["weights"]["trained"] == sum(a.size for n, a in tensors.items() if not plan.tensors[n].frozen)
        graphs[mode] = ir.load(out / "model.onnx")
        outputs[mode] = Session(out, threads=1)(**example(base, 3, 11, 4, seed=7))
        check_axes(graphs[mode])
    for name, folded in outputs["fold"].items():
        static = outputs["static"][name]
        error = float(np.abs(folded - static).max() / np.abs(static).max())
        figures("folded against static, float32", error)
        assert error <= max(TOLERANCE["float32"], 2 * (found["base_error"] or 0))

    variant = "embeds" if plan.prepends else "ids"
    base_graph = bare(folder, tmp_path / "bare", variant=variant)
    if case in cases.FOLDS:
        extra = histogram(graphs["fold"]) - histogram(base_graph)
        unbiased = case in cases.NEED_BIAS and any("bias" not in c.site.parameters for c in plan.claims)
        assert set(extra) <= ({"Add"} if unbiased else set())
        assert not histogram(base_graph) - histogram(graphs["fold"])
        assert all(m["absorbed"] for m in manifest_of(tmp_path / "fold")["modules"])
    else:
        assert any(m["reason"] for m in manifest_of(tmp_path / "fold")["modules"])
    unmarked = histogram(node for node in graphs["static"].graph if not is_marked(node))
    unlowered = open_base(folder, variant=variant).load_graph()
    # Modules stand in the way of a lowering: then some of the nodes are left that the base has before it is lowered.
    assert not unmarked - (histogram(base_graph) | histogram(unlowered)), "an inserted node is not marked"
    planned = {p for claim in plan.claims for p in (claim.absorbed, *claim.site.parameters.values())}
    for entry in manifest_of(tmp_path / "fold")["folded"]:
        assert entry["parameter"].removesuffix(".pelt_bias") in planned | biases_of(base, planned)


def manifest_of(folder: Path) -> dict[str, Any]:
    from peltc.compiler.files.manifest import read_manifest

    return read_manifest(folder)


def biases_of(base: Any, weights: set[str]) -> set[str]:
    """The biases of the maps with these weights."""
    return {
        s.parameters["bias"] for s in base.anatomy if s.parameters.get("weight") in weights and "bias" in s.parameters
    }


def is_marked(node: ir.Node) -> bool:
    return "pelt.attachment" in node.metadata_props


def check_axes(model: ir.Model) -> None:
    """Batch and sequence are symbolic, at the inputs and at every output that has them."""
    for value in model.graph.inputs:
        assert value.shape is not None
        assert [str(size) for size in value.shape] in (["batch", "sequence"], ["batch", "target"])
    for value in model.graph.outputs:
        assert value.shape is not None
        assert str(value.shape[0]) == "batch"


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.xdist_group(f)) for f in ("bert", "gpt2", "llama")]
)
@pytest.mark.parametrize(
    "case",
    [
        "lora",
        "dora",
        "ia3",
        "bottleneck",
        "prefix",
        "norm_tuning",
        "oft",
        "prompt",
        "unipelt",
        "mole",
        "tiny_attention",
    ],
)
@pytest.mark.parametrize("mode", ["fold", "static"])
def test_half_precision(
    family: str, case: str, mode: str, model_folder: Callable[..., Path], tmp_path: Path,
    figures: Callable[[str, float], None],
) -> None:  # fmt: skip
    """No tolerance depends on a kernel: the function is exact in float32, and rounding is measured against rounding."""
    folder = model_folder(family, "float16")
    spec = load_spec(cases.spec(case, family, mode))
    plan, _ = plan_for(spec, folder)
    found = compile(spec, folder, tmp_path / "out", cases.tensors(plan))["verification"]
    figures(f"{mode} against PyTorch, float16's function", found["worst"])
    assert found["worst"] <= found["tolerance"] == TOLERANCE["float32"]
    assert found["arithmetic"]["status"] == "proven"
    for output in found["arithmetic"]["outputs"]:
        figures(f"{mode} against float32, float16 rounded", output["onnxruntime"])
        assert output["onnxruntime"] <= max(2 * output["pytorch"], found["arithmetic"]["floor"]) == output["limit"]
    folded = [entry["parameter"] for entry in manifest_of(tmp_path / "out")["folded"]]
    assert (found["stored"]["parameters"] if found["stored"] else 0) == len(folded)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_block_that_ends_in_float32(precision: str, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Norms in float32 end the blocks of this model, and modules read values of both types."""
    spec = load_spec(cases.spec("unipelt", "gemma3", "static") | {"deploy": {"mode": "static", "precision": precision}})
    folder = model_folder("gemma3")
    plan, _ = plan_for(spec, folder)
    found = compile(spec, folder, tmp_path / "out", cases.tensors(plan))["verification"]
    assert found["worst"] <= found["tolerance"] == TOLERANCE["float32"]
    assert found["arithmetic"]["status"] == ("proven" if precision == "float16" else "open")


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("case", ["lora-everywhere", "dora", "norm_tuning", "bottleneck", "prefix"])
def test_bfloat16_computed_in_itself(
    family: str, case: str, model_folder: Callable[..., Path], tmp_path: Path, figures: Callable[[str, float], None]
) -> None:
    """What is computed is proven on any machine; what rounding costs is open where the CPU has no kernels for it."""
    folder = model_folder(family, "bfloat16")
    spec = load_spec(cases.spec(case, family, precision="bfloat16"))
    plan, base = plan_for(spec, folder)
    said: list[str] = []
    found = compile(spec, folder, tmp_path / "out", cases.tensors(plan), talk=said.append)["verification"]
    figures("fold against PyTorch, bfloat16's function", found["worst"])
    assert base.precision == "bfloat16"
    assert found["worst"] <= found["tolerance"] == TOLERANCE["float32"]
    assert found["arithmetic"]["status"] == "open"
    assert found["arithmetic"]["reason"].endswith("CPUExecutionProvider has no kernels")
    assert all(o["onnxruntime"] is None and o["pytorch"] > 1e-4 for o in found["arithmetic"]["outputs"])
    assert any(line.startswith("warning: the arithmetic in bfloat16 is not verified") for line in said)


@pytest.mark.parametrize("case", ["lora", "bottleneck", "prefix"])
def test_bfloat16_is_computed_in_float32(
    case: str, model_folder: Callable[..., Path], tmp_path: Path, figures: Callable[[str, float], None]
) -> None:
    folder = model_folder("llama", "bfloat16")
    spec = load_spec(cases.spec(case, "llama"))
    plan, base = plan_for(spec, folder)
    manifest = compile(spec, folder, tmp_path / "out", cases.tensors(plan))
    assert base.precision == "float32"
    assert manifest["base"]["stored"] == "bfloat16"
    figures("fold against PyTorch, stored bfloat16", manifest["verification"]["worst"])


def test_a_map_takes_in_what_the_file_names_after_its_block(model_folder: Callable[..., Path]) -> None:
    """A map's own modules act before those of the block that it ends, so nothing keeps them from folding."""
    plan, _ = plan_for(load_spec(cases.spec("outer-before-inner", "bert")), model_folder("bert"))
    assert {claim.attachment: bool(claim.absorbed) for claim in plan.claims} == {"bottleneck": False, "lora": True}


class TestWitnesses:
    """Each comparison must be able to fail: what is compiled differs from what PyTorch runs, and is caught."""

    def differs(
        self, folder: Path, tmp_path: Path, case: str, mode: str, tamper: Callable[[Plan, dict[str, Any]], Any]
    ) -> None:
        spec = load_spec(cases.spec(case, "bert", mode))
        plan, base = plan_for(spec, folder)
        tensors = cases.tensors(plan)
        changed_plan, changed = tamper(plan, dict(tensors))
        tmp_path.mkdir(exist_ok=True)
        build(changed_plan, base, changed, tmp_path)
        with pytest.raises(PeltError, match="E701"):
            verify_folder(tmp_path, plan, base, tensors)

    @pytest.mark.parametrize("mode", ["fold", "static"])
    def test_wrong_scale(self, model_folder: Callable[..., Path], tmp_path: Path, mode: str) -> None:
        self.differs(
            model_folder("bert"), tmp_path, "lora", mode, lambda p, t: (p, {n: 1.01 * a for n, a in t.items()})
        )

    @pytest.mark.parametrize("mode", ["fold", "static"])
    def test_forgotten_site(self, model_folder: Callable[..., Path], tmp_path: Path, mode: str) -> None:
        def forget(plan: Plan, tensors: dict[str, Any]) -> Any:
            fewer = Plan(plan.spec, plan.fingerprint, plan.claims[:-1])
            return fewer, {name: tensors[name] for name in fewer.tensors}

        self.differs(model_folder("bert"), tmp_path, "bottleneck", mode, forget)

    def test_wrong_order(self, model_folder: Callable[..., Path], tmp_path: Path) -> None:
        def turn(plan: Plan, tensors: dict[str, Any]) -> Any:
            return Plan(plan.spec, plan.fingerprint, plan.claims[::-1]), tensors

        self.differs(model_folder("bert"), tmp_path, "several-at-one-site", "fold", turn)

    def test_transposed_factor(self, model_folder: Callable[..., Path], tmp_path: Path) -> None:
        def transpose(plan: Plan, tensors: dict[str, Any]) -> Any:
            return plan, {n: a.reshape(a.shape[::-1]).T if n.endswith(".A") else a for n, a in tensors.items()}

        self.differs(model_folder("bert"), tmp_path, "lora", "fold", transpose)

    def test_swapped_layers(self, model_folder: Callable[..., Path], tmp_path: Path) -> None:
        def swap(plan: Plan, tensors: dict[str, Any]) -> Any:
            turned = {"0": "1", "1": "0"}
            other = {re.sub(r"layers\.(\d)", lambda m: f"layers.{turned[m[1]]}", n): a for n, a in tensors.items()}
            return plan, other

        self.differs(model_folder("bert"), tmp_path, "bottleneck", "static", swap)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(
    "entry",
    [
        {"method": "lora", "at": "attention.query", "gate": {"mask_padding": True}},
        {"method": "tiny_attention", "at": "feed_forward.block"},
    ],
    ids=["gate", "attention"],
)
def test_what_reads_the_mask_does_not_see_padding(
    family: str, entry: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """More padding leaves the tokens' outputs as they are; with the mask ignored, it would not."""
    folder = model_folder(family)
    plan, _ = plan_for(load_spec({"pelt": 1, "attach": [entry]}), folder)
    compile(plan.spec, folder, tmp_path / "out", cases.tensors(plan, 0.5), verify=False)
    session = Session(tmp_path / "out", ["CPUExecutionProvider"])
    ids = np.arange(10, 16)[None]
    found = []
    for padding in (0, 3):
        after = family == "bert"
        pad = [(0, 0), (0, padding) if after else (padding, 0)]
        inputs = {"input_ids": np.pad(ids, pad), "attention_mask": np.pad(np.ones_like(ids), pad)}
        if "token_type_ids" in session.inputs:
            inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
        logits = session(**inputs)["logits"]
        found.append(logits if after else logits[:, padding:])
    np.testing.assert_allclose(found[1], found[0], atol=2e-5 * np.abs(found[0]).max())
