"""Tables of embeddings as sites: what is meant by a selector, what is refused, what a tied head does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch

import peltc
from peltc.runtime.building.compile import compile, plan_for
from peltc.runtime.running.session import Session
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.diagnostics import PeltError
from peltc.spec.specification import load_spec

LORA = {"method": "lora", "at": "embedding.word", "r": 2}


def planned(folder: Path, *entries: dict[str, Any], **more: Any) -> Any:
    return plan_for(load_spec({"pelt": 1, "attach": list(entries), **more}), folder)[0]


def some(plan: Any, scale: float = 0.3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(0, scale, t.shape).astype(np.float32) for name, t in plan.tensors.items()}


def test_tables_are_found_by_what_picks_their_rows(model_folder: Callable[..., Path]) -> None:
    found = {family: [(s.path, s.sizes["in"]) for s in peltc.survey(model_folder(family)) if s.kind == "table"]
             for family in ("bert", "roberta", "gpt2", "llama", "t5")}  # fmt: skip
    three = [("embedding.word", 100), ("embedding.type", 2), ("embedding.position", 64)]
    assert found == {
        "bert": three,
        "roberta": three,  # whose positions are counted from the ids that are no padding
        "gpt2": [("embedding.word", 100), ("embedding.position", 64)],
        "llama": [("embedding.word", 100)],
        "t5": [("encoder.embedding.word", 100), ("decoder.embedding.word", 100)],
    }


@pytest.mark.parametrize("selector", [{"at": "*"}, {"at": "*word*"}, {"parameter": "**"}, {"parameter": "*.weight"}])
def test_tables_are_not_meant_by_the_way(selector: dict[str, str], model_folder: Callable[..., Path]) -> None:
    entry = {"method": "lora", "r": 2, **selector}
    try:
        plan = planned(model_folder("bert"), entry)
    except PeltError as error:
        assert error.diagnostics[0].code == "E203"
    else:
        assert {claim.site.kind for claim in plan.claims} == {"linear"}


@pytest.mark.parametrize("parameter", ["**.word_embeddings.weight", "bert.embeddings.word_embeddings.weight"])
def test_a_table_by_its_parameter(parameter: str, model_folder: Callable[..., Path]) -> None:
    plan = planned(model_folder("bert"), {"method": "lora", "parameter": parameter})
    assert [claim.site.key for claim in plan.claims] == ["embedding.word (table)"]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"delta": "linear(relu(x), A)"}, "in 'relu(x)': 'relu' cannot take the input of a table"),
        ({"delta": "linear(x * 2, A)"}, "'multiply' cannot take the input of a table"),
        ({"input": "x"}, "changes nothing"),
        ({"delta": "mean_seq(y, mask) + linear(x, A)"}, "it reads 'mask', and a table reads ids"),
        ({"delta": "linear(h, A)"}, "it reads 'h', and a table reads ids"),
    ],
)
def test_what_ids_cannot_do(method: dict[str, str], words: str, model_folder: Callable[..., Path]) -> None:
    own = {
        "title": "own",
        "source": "here",
        "site": "linear",
        "parameters": {"A": {"shape": ["out", "d_model" if "(h" in str(method) else "in"], "init": "zeros"}},
        **method,
    }
    with pytest.raises(PeltError) as caught:
        planned(model_folder("bert"), {"method": "own", "at": "embedding.word"}, methods={"own": own})
    assert words in str(caught.value)


def test_whatever_depends_on_an_id_alone_is_a_table(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A map of ids that is not linear in what it makes of them folds all the same."""
    own = {"title": "own", "source": "here", "site": "linear", "output": "y * tanh(linear(x, A) + 0.5)",
           "parameters": {"A": {"shape": ["out", "in"], "init": "zeros"}}}  # fmt: skip
    spec = {"pelt": 1, "attach": [{"method": "own", "at": "embedding.word"}], "methods": {"own": own}}
    plan = plan_for(load_spec(spec), model_folder("bert"))[0]
    manifest = compile(spec, model_folder("bert"), tmp_path / "out", some(plan))
    assert manifest["modules"][0]["absorbed"] == "bert.embeddings.word_embeddings.weight"
    assert manifest["verification"]["worst"] <= TOLERANCE["float32"]


def test_what_reads_other_tokens_stays_in_the_graph(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    spec = {"pelt": 1, "attach": [{**LORA, "gate": True}]}
    plan = plan_for(load_spec(spec), model_folder("bert"))[0]
    assert "depends on the others" in plan.claims[0].reason
    manifest = compile(spec, model_folder("bert"), tmp_path / "out", some(plan))
    assert manifest["verification"]["worst"] <= TOLERANCE["float32"]


@pytest.mark.parametrize("mode", ["fold", "static"])
@pytest.mark.parametrize("tied", ["apart", "together"])
def test_a_bias_of_a_table(tied: str, mode: str, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A table has none of its own: one vector is added to every row, against the model changed by hand."""
    folder = model_folder("gpt2")
    plan = planned(folder, {"method": "bitfit", "at": "embedding.word", "tied": tied}, deploy={"mode": mode})
    tensors = some(plan)
    compile(plan.spec, folder, tmp_path / "out", tensors)
    model = models.build("gpt2")
    (vector,) = (torch.from_numpy(array) for array in tensors.values())
    with torch.no_grad():
        before = model.transformer.wte.weight.clone()
        model.transformer.wte.weight = torch.nn.Parameter(before + vector)
        model.lm_head.weight = torch.nn.Parameter(before + vector if tied == "together" else before)
    ids = np.random.default_rng(3).integers(10, 100, (2, 7))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
    found = Session(tmp_path / "out")(input_ids=ids, attention_mask=np.ones_like(ids))["logits"]
    assert np.abs(found - expected).max() <= TOLERANCE["float32"] * np.abs(expected).max()


# heads that are the same tensor


@pytest.mark.parametrize("mode", ["fold", "static"])
@pytest.mark.parametrize("tied", ["apart", "together"])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_tied_head_does_what_the_spec_says(
    family: str, tied: str, mode: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Against the model with its tensors changed by hand."""
    folder = model_folder(family)
    at = "*embedding.word"
    plan = planned(folder, {**LORA, "at": at, "tied": tied}, deploy={"mode": mode})
    tensors = some(plan)
    compile(plan.spec, folder, tmp_path / "out", tensors)
    model = models.build(family)
    shift = {claim.site.path: torch.from_numpy(8 * tensors[f"lora.{claim.site.path}.A"].T
                                               @ tensors[f"lora.{claim.site.path}.B"].T)
             for claim in plan.claims if claim.mirrors is None}  # fmt: skip
    heads = {"gpt2": ["lm_head"], "t5": ["lm_head"]}[family]
    tables = {"gpt2": {"embedding.word": "transformer.wte"},
              "t5": {"encoder.embedding.word": "encoder.embed_tokens",
                     "decoder.embedding.word": "decoder.embed_tokens"}}[family]  # fmt: skip
    assert len(shift) == (1 if tied == "together" else len(tables))
    first = next(iter(shift.values()))
    with torch.no_grad():
        for path, name in tables.items():
            module = model.get_submodule(name)
            module.weight = torch.nn.Parameter(module.weight + shift.get(path, first))
        for name in heads if tied == "together" else ():
            module = model.get_submodule(name)
            module.weight = torch.nn.Parameter(module.weight + first)
    ids = np.random.default_rng(3).integers(10, 100, (2, 7))
    fed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    fed |= {"decoder_input_ids": ids[:, :4]} if family == "t5" else {}
    with torch.no_grad():
        expected = model(**{n: torch.from_numpy(a) for n, a in fed.items()}, use_cache=False).logits.numpy()
    found = Session(tmp_path / "out")(**fed)["logits"]
    assert np.abs(found - expected).max() <= TOLERANCE["float32"] * np.abs(expected).max()


def test_the_plan_says_which_of_the_two_changes(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("gpt2")
    kept = "; head, the same tensor in the checkpoint, keeps its values"
    assert planned(folder, LORA).notes == [f"'lora' changes embedding.word{kept}"]
    assert planned(folder, {**LORA, "tied": "together"}).notes == [
        "'lora' changes embedding.word and, as the same tensor, head"]  # fmt: skip
    assert planned(folder, {"method": "lora", "at": "head"}).notes == [
        "'lora' changes head; embedding.word, the same tensor in the checkpoint, keeps its values"]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "entries", "words"),
    [
        ("bert", [{**LORA, "tied": "together"}], "nothing is tied to embedding.word"),
        ("gpt2", [{**LORA, "at": "head", "tied": "together"}], "nothing is tied to head"),
        ("gpt2", [{**LORA, "gate": True, "tied": "together"}], "depends on the others in the sequence"),
        ("gpt2", [{**LORA, "tied": "together"}, {**LORA, "name": "two", "at": "head"}], "head follows its table"),
        ("gpt2", [{**LORA, "tied": "together"}, {**LORA, "name": "two"}], "changed by 'two', which is apart"),
        ("gpt2", [{**LORA, "name": "two"}, {**LORA, "tied": "together"}], "changed by 'two', which is apart"),
        ("bert", [{"method": "prompt", "at": "embedding.word"}, LORA], "where tables are the base's own"),
        ("bert", [LORA, {"method": "prompt", "at": "embedding"}], "where tables are the base's own"),
    ],
)
def test_what_cannot_follow(
    family: str, entries: list[dict[str, Any]], words: str, model_folder: Callable[..., Path]
) -> None:
    with pytest.raises(PeltError, match="E208") as caught:
        planned(model_folder(family), *entries)
    assert words in str(caught.value)


@pytest.mark.parametrize(("rows", "code"), [([5, 5], ""), (["7-3"], "E114"), ([100], "E310"), (["1-9999999"], "E114")])
def test_rows_are_numbers_and_ranges(rows: list[Any], code: str, model_folder: Callable[..., Path]) -> None:
    entry = {"method": "trainable_tokens", "at": "embedding.word", "rows": rows}
    if not code:
        assert planned(model_folder("bert"), entry).claims[0].options["rows"] == (5,)
        return
    with pytest.raises(PeltError, match=code):
        planned(model_folder("bert"), entry)
