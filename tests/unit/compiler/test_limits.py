"""What inputs may be, read off graphs: held against the same graphs on ONNX Runtime and against torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import peltc
from peltc.compiler.base.limits import graph_limits, values_below
from peltc.compiler.base.opening import open_base
from peltc.runtime.running.session import Session
from peltc.spec.diagnostics import PeltError

sys.path.insert(0, str(Path(__file__).parents[2] / "zoo"))
from instances import FAMILIES, save

Folder = Callable[..., Path]
BARE: dict[str, Any] = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query"}]}


@pytest.mark.parametrize(
    ("family", "values", "lengths"),
    [
        ("bert", {"input_ids": 100, "token_type_ids": 2}, {"sequence": {"most": 64, "padding": True}}),
        # Positions start after the padding token's number, and padding has that one.
        ("roberta", {"input_ids": 100, "token_type_ids": 2}, {"sequence": {"most": 62, "padding": False}}),
        ("gpt2", {"input_ids": 100}, {"sequence": {"most": 64, "padding": True}}),
        ("llama", {"input_ids": 100}, {}),  # rotations, of any length
        ("t5", {"input_ids": 100, "decoder_input_ids": 100}, {}),  # distances, cut to a range
    ],
)
def test_limits_of_families(
    family: str, values: dict[str, int], lengths: dict[str, Any], model_folder: Folder
) -> None:  # fmt: skip
    assert open_base(model_folder(family)).limits == {"values": values, "lengths": lengths}


def test_positions_of_what_the_mask_shows(tmp_path: Path) -> None:
    """OPT counts the tokens that its mask shows, and its table has two rows more than texts have tokens."""
    base = open_base(save("opt", dict(FAMILIES)["opt"], tmp_path / "opt"))
    assert base.limits["lengths"] == {"sequence": {"most": 64, "padding": False}}


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_the_limit_is_the_last_that_runs(family: str, model_folder: Folder, tmp_path: Path) -> None:
    """ONNX Runtime answers at the limit and fails one token later."""
    manifest = peltc.compile(BARE, model_folder(family), tmp_path / "out", verify=False)
    session, most = Session(tmp_path / "out"), manifest["limits"]["lengths"]["sequence"]["most"]
    session.manifest.pop("limits")
    assert session(input_ids=np.full((2, most), 5))
    with pytest.raises(PeltError, match="E612 ONNX Runtime could not run the model: in "):
        session(input_ids=np.full((2, most + 1), 5))


@pytest.mark.parametrize(("at", "most"), [("embedding.word", 60), ("embedding", 64)])
def test_tokens_before_the_text_take_positions(at: str, most: int, model_folder: Folder, tmp_path: Path) -> None:
    spec = {"pelt": 1, "attach": [{"method": "prompt", "at": at, "length": 4}]}
    manifest = peltc.compile(spec, model_folder("bert"), tmp_path / "out", verify=False)
    assert manifest["limits"]["lengths"] == {"sequence": {"most": most, "padding": True}}
    session = Session(tmp_path / "out")
    assert session(input_ids=np.full((2, most), 5))
    session.manifest.pop("limits")
    with pytest.raises(PeltError, match="E612"):
        session(input_ids=np.full((2, most + 1), 5))


def looking_up(table: int, clipped: bool = False) -> ir.Model:
    """A graph that looks its input up in a table, whatever they are called."""
    text = f"""
        <ir_version: 10, opset_import: ["": 20]>
        g (int64[words, places] w, float[{table}, 4] rows) => (float[words, places, 4] y)
        {{
            none = Sub(w, w)
            v = {"Max(none, w)" if clipped else "Identity(w)"}
            y = Gather<axis = 0>(rows, v)
        }}
    """
    return ir.from_onnx_text(text)


def test_tables_bound_what_is_looked_up() -> None:
    assert values_below(looking_up(7).graph, {"rows"}) == {"w": 7}


def test_what_is_computed_first_is_not_bounded() -> None:
    assert values_below(looking_up(7, clipped=True).graph, {"rows"}) == {}


def test_positions_behind_an_offset(tmp_path: Path) -> None:
    """Positions counted from 3 in a table of 10 rows leave 7."""
    text = """
        <ir_version: 10, opset_import: ["": 20]>
        g (int64[words, places] w, float[10, 4] rows) => (float[words, places, 4] y)
        {
            first = Constant<value = int64[1] {1}>()
            end = Constant<value = int64[1] {2}>()
            whole = Shape(w)
            some = Slice(whole, first, end)
            length = Squeeze(some)
            zero = Constant<value = int64 {0}>()
            one = Constant<value = int64 {1}>()
            three = Constant<value = int64 {3}>()
            counted = Range(zero, length, one)
            later = Add(counted, three)
            picked = Unsqueeze(later, zero)
            y = Gather<axis = 0>(rows, picked)
        }
    """
    model = ir.from_onnx_text(text)
    picked = next(node for node in model.graph if node.op_type == "Unsqueeze").outputs[0]
    picked.shape, picked.type = ir.Shape([1, "places"]), ir.TensorType(ir.DataType.INT64)
    ir.save(model, tmp_path / "graph.onnx")
    found = graph_limits(tmp_path / "graph.onnx", {"rows"})
    assert found == {"values": {}, "lengths": {"places": {"most": 7, "padding": True}}}
