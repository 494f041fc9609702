"""Verification in half precision can fail, in the step that it should, and means the same on every machine."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import numpy as np
import onnx_ir as ir
import precision
import pytest
import torch
from jsonschema import Draft202012Validator

import peltc
from peltc.compiler.files.manifest import read_manifest, write_manifest
from peltc.compiler.pipeline import build
from peltc.compiler.plan.claims import Plan
from peltc.runtime.building.compile import plan_for
from peltc.runtime.building.trained import save_adapter
from peltc.runtime.running.session import Session
from peltc.runtime.verification.answers import MEASURE
from peltc.runtime.verification.rewritten import Exposed
from peltc.runtime.verification.stored import Deviation, last_place
from peltc.runtime.verification.verify import UNIT, example, floor, verify_folder
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

Array = np.ndarray[Any, Any]
Tamper = Callable[[Plan, dict[str, Array]], tuple[Plan, dict[str, Array]]]


class Half:
    """A case in float16: its artifact, built of other tensors than it is verified with, or of another plan."""

    def __init__(self, folder: Path, out: Path, family: str, case: str, mode: str, scale: float = 0.1):
        self.out = out
        self.plan, self.base = plan_for(load_spec(cases.spec(case, family, mode)), folder)
        self.tensors = cases.tensors(self.plan, scale)
        assert self.base.precision == "float16"

    def build(self, tamper: Tamper = lambda plan, tensors: (plan, tensors)) -> Half:
        plan, tensors = tamper(self.plan, dict(self.tensors))
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        build(plan, self.base, tensors, self.out)
        save_adapter(self.out, self.plan, self.tensors)
        return self

    def verify(self, step: str | None = None) -> dict[str, Any]:
        return verify_folder(self.out, self.plan, self.base, self.tensors, step=step)


@pytest.fixture
def half(model_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Half]:
    def make(family: str, case: str, mode: str, scale: float = 0.1) -> Half:
        return Half(model_folder(family, "float16"), tmp_path / "out", family, case, mode, scale)

    return make


# the function


def slightly(plan: Plan, tensors: dict[str, Array]) -> tuple[Plan, dict[str, Array]]:
    """The first module's scale off by 1 %."""
    first = next(t.name for t in plan.claims[0].tensors.values() if t.name.endswith(".B"))
    return plan, {**tensors, first: np.float32(1.01) * tensors[first]}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(("mode", "code"), [("fold", "E705"), ("static", "E701")])
def test_a_scale_off_by_a_hundredth(half: Callable[..., Half], family: str, mode: str, code: str) -> None:
    with pytest.raises(PeltError, match=code) as error:
        half(family, "lora", mode).build(slightly).verify("function")
    assert ("attention" in str(error.value) or "attn" in str(error.value)) == (mode == "fold"), "it names the parameter"


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_scale_off_whose_change_rounding_hides(half: Callable[..., Half], family: str) -> None:
    """Of a module that changes weights by 1e-4 of themselves, float16 stores little more than some last digits."""
    found = half(family, "lora", "fold", 1.2e-3).build(slightly)
    claim = found.plan.claims[0]
    a, b = (found.tensors[claim.tensors[name].name] for name in ("A", "B"))
    weight = np.asarray(found.base.stored(claim.absorbed).array(), np.float32)
    change = claim.constants["alpha"] / claim.constants["r"] * b @ a
    assert np.linalg.norm(change) < 3e-4 * np.linalg.norm(weight)
    with pytest.raises(PeltError, match="E705"):
        found.verify("function")
    found.build()
    found.verify("function")


def test_a_bias_folded_wrongly(half: Callable[..., Half]) -> None:
    def shifted(plan: Plan, tensors: dict[str, Array]) -> tuple[Plan, dict[str, Array]]:
        name = next(name for name in tensors if "attention.output" in name)
        return plan, {**tensors, name: tensors[name] * np.float32(1.01)}

    with pytest.raises(PeltError, match=r"E705.*attention\.output\.dense\.bias"):
        half("bert", "bitfit", "fold").build(shifted).verify("function")


def test_a_bias_that_the_base_does_not_have(half: Callable[..., Half]) -> None:
    def shifted(plan: Plan, tensors: dict[str, Array]) -> tuple[Plan, dict[str, Array]]:
        name = next(name for name in tensors if "attention.output" in name)
        return plan, {**tensors, name: tensors[name] * np.float32(1.01)}

    found = half("llama", "bitfit", "fold").build()
    assert found.verify("function")["stored"]["parameters"] == len(read_manifest(found.out)["folded"])
    with pytest.raises(PeltError, match=r"E705.*pelt_bias"):
        found.build(shifted).verify("function")


def test_norms(half: Callable[..., Half]) -> None:
    def shifted(plan: Plan, tensors: dict[str, Array]) -> tuple[Plan, dict[str, Array]]:
        name = next(iter(tensors))
        return plan, {**tensors, name: tensors[name] * np.float32(1.01)}

    with pytest.raises(PeltError, match=r"E705.*(norm|Norm)"):
        half("llama", "norm_tuning", "fold").build(shifted).verify("function")


@pytest.mark.parametrize(("case", "mode", "code"), [("lora", "fold", "E705"), ("bottleneck", "static", "E701")])
def test_swapped_layers(half: Callable[..., Half], case: str, mode: str, code: str) -> None:
    def swap(plan: Plan, tensors: dict[str, Array]) -> tuple[Plan, dict[str, Array]]:
        turned = {"0": "1", "1": "0"}
        other = {re.sub(r"layers\.(\d)", lambda m: f"layers.{turned[m[1]]}", n): a for n, a in tensors.items()}
        return plan, other

    with pytest.raises(PeltError, match=code):
        half("bert", case, mode).build(swap).verify("function")


def test_a_module_that_no_weight_took_in(half: Callable[..., Half]) -> None:
    def forget(plan: Plan, tensors: dict[str, Array]) -> tuple[Plan, dict[str, Array]]:
        fewer = replace(plan, claims=plan.claims[:-1])
        return fewer, {name: tensors[name] for name in fewer.tensors}

    with pytest.raises(PeltError, match="E705"):
        half("bert", "lora", "fold").build(forget).verify("function")


def test_bytes_of_a_folded_weight(half: Callable[..., Half]) -> None:
    """One bit in the last place of one element."""
    found = half("bert", "lora", "fold").build()
    found.verify("function")
    file = found.out / "model.onnx.data"
    content = bytearray(file.read_bytes())
    content[64] ^= 1
    file.write_bytes(content)
    with pytest.raises(PeltError, match="E705"):
        found.verify("function")


def test_constants_are_not_rounded_for_good(half: Callable[..., Half]) -> None:
    """The exporter's own constants are of operations, and those of modules are float32, in a graph that computes in
    float16."""
    found = half("gpt2", "bottleneck", "static").build()
    graph = ir.load(found.out / "model.onnx").graph
    wide = [v for v in graph.initializers.values() if v.const_value is not None and v.dtype == ir.DataType.FLOAT]
    assert any(node.op_type == "FastGelu" for node in graph), "whose own constants are exact"
    cores = [node for node in graph if node.op_type == "Attention"]
    assert cores and all(abs(c.attributes["scale"].as_float() - 8**-0.5) < 1e-7 for c in cores), "of the attention"
    assert sum(v.const_value.size > 100 for v in wide) >= 4, "of the adapters"
    assert all(use.node.op_type == "Cast" for v in wide if v.const_value.size > 100 for use in v.uses())


def test_a_checkpoint_with_more_digits(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A float32 checkpoint deployed in float16: modules fold into its own digits, and all of it is rounded once."""
    plan, base = plan_for(load_spec(cases.spec("lora", "bert", "fold", "float16")), model_folder("bert"))
    tensors = cases.tensors(plan)
    build(plan, base, tensors, tmp_path)
    found = verify_folder(tmp_path, plan, base, tensors)
    assert found["worst"] <= found["tolerance"]
    assert found["arithmetic"]["status"] == "proven"


def test_generation(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Graphs with a cache are widened as well, and what a cache begins with is as precise as the other constants."""
    spec = {**cases.spec("several", "llama", "fold", "float16")}
    spec["deploy"]["generation"] = True
    folder = model_folder("llama", "float16")
    plan, _ = plan_for(load_spec(spec), folder)
    found = peltc.compile(spec, folder, tmp_path / "out", cases.tensors(plan))["verification"]
    assert {f["output"] for f in found["shapes"]} == {"logits", "generated logits"}
    assert found["worst"] <= 1e-5
    assert {o["output"] for o in found["arithmetic"]["outputs"]} == {"logits", "generated logits"}


# the arithmetic


SUMS = ("Add", "FusedMatMul", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization")


def coarse(out: Path) -> int:
    """Round sums, of products and of the residual stream, to bfloat16 in a float16 artifact; returns how many there
    are."""
    model = ir.load(out / "model.onnx")
    sums = [node for node in model.graph if node.op_type in SUMS and node.outputs[0].dtype == ir.DataType.FLOAT16]
    for node in sums:
        for total in [value for value in node.outputs if tuple(value.uses())]:
            narrow = ir.node("Cast", [total], {"to": ir.DataType.BFLOAT16.value}, name=f"{total.name}.narrow")
            back = ir.node("Cast", [narrow.outputs[0]], {"to": ir.DataType.FLOAT16.value}, name=f"{total.name}.back")
            narrow.outputs[0].name, back.outputs[0].name = narrow.name, back.name
            for use in tuple(total.uses()):
                if use.node is not narrow:
                    use.node.replace_input_with(use.idx, back.outputs[0])
            model.graph.insert_after(node, [narrow, back])
    ir.save(model, out / "model.onnx")
    return len(sums)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_sums_in_too_small_a_type(half: Callable[..., Half], family: str) -> None:
    """The function is right, and its arithmetic is not float16's."""
    found = half(family, "lora", "fold").build()
    found.verify()
    assert coarse(found.out) > 16
    assert found.verify("function")["worst"] <= 1e-5
    with pytest.raises(PeltError, match="E704") as error:
        found.verify()
    text = str(error.value)
    assert "ONNX Runtime" in text and "PyTorch" in text and "the function is right" in text
    assert "report" not in text


def test_values_beyond_the_range(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """An overflow is the arithmetic's, and told as such."""
    spec = cases.spec("lora-everywhere", "llama", "static", "float16")
    plan, base = plan_for(load_spec(spec), model_folder("llama"))
    tensors = {n: a * np.float32(1e7) if ".head." in n else a for n, a in cases.tensors(plan).items()}
    build(plan, base, tensors, tmp_path)
    with pytest.raises(PeltError, match=r"E704.*not finite"):
        verify_folder(tmp_path, plan, base, tensors, step="arithmetic")


def test_the_floor(model_folder: Callable[..., Path]) -> None:
    """Two layers of two sums each, the embedding, the last norm, and the head."""
    _, base = plan_for(load_spec(cases.spec("lora", "llama")), model_folder("llama"))
    assert floor("float16", base.anatomy) == UNIT["float16"] * 7**0.5 == np.finfo(np.float16).eps / 2 * 7**0.5
    assert UNIT["bfloat16"] == torch.finfo(torch.bfloat16).eps / 2


def test_a_half_type_exposed_in_float32(half: Callable[..., Half]) -> None:
    """It computes the same: what is exposed is cast, and nothing else."""
    found = half("gpt2", "several", "fold").build()
    inputs = example(found.base, 2, 9, 2, seed=1)
    plain, exposed = (kind(found.out, ["CPUExecutionProvider"])(**inputs) for kind in (Session, Exposed))
    assert plain.keys() == exposed.keys()
    for name, array in plain.items():
        assert array.dtype == np.float16 and exposed[name].dtype == np.float32
        # Where the CPU computes in float32 all along, ONNX Runtime does not round what is cast back at once.
        np.testing.assert_array_equal(array, exposed[name].astype(np.float16))


# stored weights


def test_units_in_the_last_place() -> None:
    values = torch.tensor([1.0, 1.5, 2.0, -0.75, 1e-7, 0.0, 60000.0], dtype=torch.float64)
    expected = [np.spacing(np.float16(abs(v))) for v in values.tolist()]
    np.testing.assert_array_equal(last_place(values, torch.float16).numpy(), np.array(expected, np.float64))
    assert float(last_place(torch.tensor(1.0, dtype=torch.float64), torch.bfloat16)) == 2.0**-7


def test_sums_of_many_terms(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A linear adapter multiplies a map of 384 features by a matrix: float32 rounds each of so many additions."""
    spec = load_spec(cases.spec("linear_adapter", "minilm", "fold", "float16"))
    folder = model_folder("minilm")
    plan, _ = plan_for(spec, folder)
    tensors = cases.tensors(plan, 0.01)
    found = peltc.compile(spec, folder, tmp_path / "out", tensors, verify="function")["verification"]
    assert found["stored"]["parameters"] == 24 and found["arithmetic"] is None


def test_what_rounding_and_float32_allow() -> None:
    """Values rounded to nearest pass, one unit more in one of them does not; nor does what rounding made infinite."""
    generator = torch.Generator().manual_seed(0)
    base = 0.1 * torch.randn((64, 64), generator=generator, dtype=torch.float64)
    exact = base + 1e-3 * torch.randn((64, 64), generator=generator, dtype=torch.float64)
    single = exact.float()

    def of(stored: torch.Tensor) -> Deviation:
        found = Deviation()
        found.add(stored, exact, single, base)
        return found

    nearest = single.half()
    assert not of(nearest).wrong
    assert 0.49 < of(nearest).units <= 0.5
    off = nearest.clone()
    off[3, 5] = torch.nextafter(off[3, 5].float(), torch.tensor(9.0)).half() + torch.finfo(torch.float16).tiny
    assert of(off).wrong
    assert of(off).where[0] == (3, 5)
    off = nearest.clone()
    off[1, 1] = torch.inf
    assert of(off).wrong


# what is said of it


def test_one_step_keeps_the_figures_of_the_other(half: Callable[..., Half], capsys: Any) -> None:
    from peltc.runtime.commands.cli import run

    found = half("llama", "lora", "fold").build()
    out = str(found.out)
    assert run(["verify", out, "--step", "arithmetic", "-q"]) == 0
    only = read_manifest(found.out)["verification"]
    assert only["worst"] is None and only["stored"] is None and only["arithmetic"]["status"] == "proven"
    assert run(["verify", out, "--step", "function", "-q"]) == 0
    both = read_manifest(found.out)["verification"]
    assert both["worst"] <= 1e-5 and both["stored"]["parameters"] == 4
    assert both["arithmetic"] == only["arithmetic"]
    capsys.readouterr()
    assert run(["verify", out, "-q"]) == 0
    text = capsys.readouterr().out
    assert MEASURE in text
    assert "arithmetic in float16: ONNX Runtime" in text and "units in the last place" in text
    assert run(["verify", out, "-q", "--provider", "NoSuchProvider"]) == 1
    assert "E604" in capsys.readouterr().err
    schema = json.loads((Path(peltc.__file__).parents[1] / "schemas/manifest.schema.json").read_text())
    for manifest in (read_manifest(found.out), {**read_manifest(found.out), "verification": only}):
        write_manifest(found.out, manifest)
        assert not [e.message for e in Draft202012Validator(schema).iter_errors(manifest)]


# machines

SAMPLE = [("float16", "llama", "mole", "static"), ("float16", "llama", "lora", "fold"),
          ("float16", "t5", "several", "fold"), ("float16", "bert", "unipelt", "static"),
          ("float16", "gpt2", "dora", "fold"), ("bfloat16", "llama", "lora-everywhere", "fold")]  # fmt: skip
"""Cells whose outputs are large, small, several, of deep formulas, and of a type that no CPU computes."""

MACHINES = [
    {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "OMP_NUM_THREADS": threads}
    for aten, onednn, threads in itertools.product(
        ("default", "avx2", ""), ("SSE41", "AVX2", "AVX512_CORE", ""), ("1", "2", "4")
    )
]


def on(machine: dict[str, str], cells: list[precision.Cell], folders: dict[str, str], out: Path) -> list[Any]:
    """The figures of cells in a process that takes itself for another machine."""
    code = (
        "import json, sys; from pathlib import Path; sys.path[:0] = json.loads(sys.argv[4]); import precision\n"
        "folders = json.loads(sys.argv[2])\n"
        "for cell in json.loads(sys.argv[1]):\n"
        "    row = precision.measure(tuple(cell), lambda f, t: Path(folders[f + t]), Path(sys.argv[3]))\n"
        "    print('ROW', json.dumps(row), flush=True)\n"
    )
    env = {**os.environ, **{key: value for key, value in machine.items() if value}}
    paths = json.dumps([str(precision.HERE), str(precision.HERE.parent)])
    arguments = [json.dumps(cells), json.dumps(folders), str(out), paths]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], env=env, capture_output=True,
                          text=True, check=True, timeout=900)  # fmt: skip
    return [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]


def machine_cells() -> list[Any]:
    """A machine in each row; two of them always, the others in sweeps."""
    always = [{"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"},
              {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"}]  # fmt: skip
    return [pytest.param(m, id="-".join(v or "own" for v in m.values()),
                         marks=[] if m in always else [pytest.mark.slow]) for m in MACHINES]  # fmt: skip


@pytest.mark.parametrize("machine", machine_cells())
def test_it_means_the_same_on_every_machine(
    machine: dict[str, str], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folders = {f + t: str(model_folder(f, t)) for t, f, _, _ in SAMPLE}
    rows = on(machine, SAMPLE, folders, tmp_path / "out")
    assert [row["cell"] for row in rows] == [list(cell) for cell in SAMPLE]
    assert not [row["refused"] for row in rows if "refused" in row]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", precision.TYPES)
@pytest.mark.parametrize("family", precision.models.FAMILIES)
def test_every_case(family: str, dtype: str, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The table's cells, anew: nothing is refused."""

    def folder(family: str, dtype: str) -> Path:
        return model_folder(family) if family == "minilm" else model_folder(family, dtype)

    rows = [precision.measure(cell, folder, tmp_path / "out") for cell in precision.cells([family]) if cell[0] == dtype]
    assert not [row for row in rows if "refused" in row]


def test_the_table_is_of_all_cells() -> None:
    """`python tests/conformance/precision.py` writes it."""
    text = precision.TABLE.read_text(encoding="utf-8")
    assert f"{len(precision.cells())} cells" in text
    assert " 0 refused" in text
    for dtype, family in itertools.product(precision.TYPES, precision.models.FAMILIES):
        assert f"| {dtype} | {family} | fold | {len(cases.CASES)} |" in text
