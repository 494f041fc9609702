"""Adapters combined: sums, cuts to a rank, and thinned sums are the mathematics on whole changes of weights, which
Hugging Face PEFT computes for some of its rules and not for others."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from import_matrix import written
from peft.utils.merge_utils import ties as ties_of_peft
from safetensors.numpy import load_file, save_file

import peltc
from peltc.compiler.combining.factors import factors
from peltc.compiler.combining.rules import combined, thinned, ties, trimmed
from peltc.runtime.commands.cli import run
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.diagnostics import PeltError

Folder = Callable[..., Path]
Array = np.ndarray[Any, Any]
IDS = {"input_ids": np.arange(3, 12)[None]}
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def drawn(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapters(base: Path, out: Path, family: str, *settings: Mapping[str, Any]) -> list[Path]:
    """Folders that PEFT saved, with random weights of their own."""
    found = []
    for i, one in enumerate(settings):
        written(family, one, base, out / f"adapter-{i}")
        file = out / f"adapter-{i}/adapter_model.safetensors"
        save_file({n: a + 0.1 * drawn(i, *a.shape) for n, a in load_file(file).items()}, file)
        found.append(file.parent)
    return found


def loaded(base: Path) -> Any:
    named = json.loads((base / "config.json").read_text())["architectures"][0]
    return getattr(transformers, named).from_pretrained(base).eval()


def answer(model: Any) -> Array:
    with torch.no_grad():
        found: Array = model(**{n: torch.as_tensor(v) for n, v in IDS.items()}).logits.numpy()
    return found


def changes(base: Path, folders: Sequence[Path]) -> list[dict[str, torch.Tensor]]:
    """Whole changes of the base's weights, as PEFT merges each adapter in float64."""
    before = {n: p.detach().double() for n, p in loaded(base).named_parameters()}
    found = []
    for folder in folders:
        live: Any = peft.PeftModel.from_pretrained(loaded(base).double(), folder)
        after = dict(live.merge_and_unload().named_parameters())
        found.append({n: after[n].detach() - before[n] for n in before if not torch.equal(after[n], before[n])})
    return found


def changed(base: Path, total: Mapping[str, torch.Tensor]) -> Array:
    """What the base answers with its weights changed so."""
    model = loaded(base).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in total:
                parameter.add_(total[name])
    return answer(model)


def total(base: Path, folders: Sequence[Path], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for one, weight in zip(changes(base, folders), weights, strict=True):
        for name, change in one.items():
            found[name] = found.get(name, torch.zeros_like(change)) + weight * change
    return found


def close(found: Array, expected: Array) -> None:
    assert np.abs(found - expected).max() < TOLERANCE["float32"] * np.abs(expected).max()


def compiled(spec: Path, base: Path, out: Path, mode: str) -> Array:
    peltc.compile(spec / "spec.yaml", base, out, mode=mode)
    found: Array = peltc.Session(out, ["CPUExecutionProvider"])(**IDS)["logits"]
    return found


KINDS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "LoRA of two ranks": ("bert", [{"target_modules": ["query", "value"], "r": 3},
                                   {"target_modules": ["query", "output.dense"], "r": 2, "use_rslora": True}]),
    "a fused map": ("gpt2", [{"target_modules": ["c_attn"], "r": 3, "fan_in_fan_out": True},
                             {"target_modules": ["c_attn"], "r": 2, "use_dora": True, "fan_in_fan_out": True}]),
    "products, rotations and vectors": (
        "llama", [{"kind": peft.LoHaConfig, "target_modules": ["q_proj"], "r": 2},
                  {"kind": peft.OFTConfig, "target_modules": ["q_proj", "v_proj"], "oft_block_size": 8},
                  {"kind": peft.IA3Config, "target_modules": ["v_proj", "down_proj"],
                   "feedforward_modules": ["down_proj"]}]),
    "vectors that scale biases": (
        "bert", [{"kind": peft.IA3Config, "target_modules": ["key", "value"], "feedforward_modules": []},
                 {"target_modules": ["key"], "r": 2}]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_is_the_sum_of_whole_changes(kind: str, model_folder: Folder, tmp_path: Path) -> None:
    """Whatever the methods; against float64, folded and static."""
    family, settings = KINDS[kind]
    base = model_folder(family)
    folders, weights = adapters(base, tmp_path, family, *settings), [0.7, -0.4, 1.3][: len(settings)]
    given = [word for weight in weights for word in ("--weight", str(weight))]
    assert run(["combine", *map(str, folders), str(base), "-o", str(tmp_path / "sum"), *given, "-q"]) == 0
    expected = changed(base, total(base, folders, weights))
    assert np.abs(expected - answer(loaded(base))).max() > 1e-2 * np.abs(expected).max()
    for mode in ("fold", "static"):
        close(compiled(tmp_path / "sum", base, tmp_path / mode, mode), expected)


def of_peft(base: Path, folders: Sequence[Path], weights: Sequence[float], kind: str, **settings: Any) -> Array:
    live: Any = peft.PeftModel.from_pretrained(loaded(base), folders[0], adapter_name="a")
    live.load_adapter(folders[1], "b")
    live.add_weighted_adapter(["a", "b"], list(weights), "both", kind, **settings)
    live.set_adapter("both")
    return answer(live.eval())


TWO = ({"target_modules": ["query", "value"], "r": 3, "lora_alpha": 6},
       {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 3})  # fmt: skip


def test_sums_and_cuts_are_pefts_and_its_sums_of_factors_are_not(model_folder: Folder, tmp_path: Path) -> None:
    base, weights = model_folder("bert"), [0.7, 0.3]
    folders = adapters(base, tmp_path, "bert", *TWO)
    made = peltc.combine(folders, base, tmp_path / "cat", weights=weights)
    assert set(made.ranks.values()) == {6} and made.error < 1e-6
    whole = compiled(tmp_path / "cat", base, tmp_path / "cat-out", "fold")
    close(whole, of_peft(base, folders, weights, "cat"))
    cut = peltc.combine(folders, base, tmp_path / "svd", weights=weights, how="svd", rank=4)
    close(compiled(tmp_path / "svd", base, tmp_path / "svd-out", "fold"),
          of_peft(base, folders, weights, "svd", svd_rank=4))  # fmt: skip
    exact = [np.linalg.svd(change.numpy(), compute_uv=False) for change in total(base, folders, weights).values()]
    lost = [float(np.sqrt((s[4:] ** 2).sum() / (s**2).sum())) for s in exact]
    assert sorted(cut.errors.values()) == pytest.approx(sorted(lost), rel=1e-4)
    assert cut.error == pytest.approx(
        np.sqrt(sum((s[4:] ** 2).sum() for s in exact) / sum((s**2).sum() for s in exact))
    )
    factored = of_peft(base, folders, weights, "linear")  # (Σ √wᵢ Bᵢ)(Σ √wᵢ Aᵢ) has products of different adapters
    assert np.abs(factored - whole).max() > 0.05 * np.abs(whole - answer(loaded(base))).max()


@pytest.mark.parametrize(("how", "rank"), [("ties", None), ("dare", None), ("ties", 3)])
def test_thinned_sums_are_those_of_whole_changes(
    how: str, rank: int | None, model_folder: Folder, tmp_path: Path
) -> None:
    base, weights = model_folder("bert"), [1.0, 0.5]
    folders = adapters(base, tmp_path, "bert", *TWO)
    made = peltc.combine(folders, base, tmp_path / how, weights=weights, how=how, rank=rank, density=0.3, seed=5)
    again = peltc.combine(folders, base, tmp_path / "again", weights=weights, how=how, rank=rank, density=0.3, seed=5)
    assert all(np.array_equal(made.tensors[name], again.tensors[name]) for name in made.tensors)
    found = compiled(tmp_path / how, base, tmp_path / "out", "fold")
    sites = {site.parameters["weight"]: site.key for site in peltc.survey(base) if site.kind == "linear"}
    expected = {}
    for name in (each := changes(base, folders))[0]:
        both = [one[name].float().numpy() for one in each]
        seed = [5, zlib.crc32(sites[name].encode()), 0]
        change = combined(how, both, weights, 0.3, seed).astype(np.float64)
        if rank is not None:
            u, s, v = np.linalg.svd(change)
            change = u[:, :rank] * s[:rank] @ v[:rank]
        expected[name] = torch.from_numpy(change)
    close(found, changed(base, expected))
    assert (made.error > 0.01) is (rank is not None)


def test_the_rules_in_float64() -> None:
    """Each rule against its definition, written out value by value."""
    given, weights = [drawn(i, 7, 5) for i in range(3)], [0.7, 0.3, -1.2]
    assert combined("cat", given, weights, 1, [0]) == pytest.approx(
        sum(w * g.astype(np.float64) for w, g in zip(weights, given, strict=True)), abs=1e-6)  # fmt: skip
    kept = [trimmed(np.float32(w) * g, 0.4) for w, g in zip(weights, given, strict=True)]
    for one, g, w in zip(kept, given, weights, strict=True):
        limit = sorted(np.abs(w * g).reshape(-1))[-14]
        assert (one != 0).sum() == 14 and np.abs(one[one != 0]).min() >= limit * (1 - 1e-6)
    expected = np.zeros((7, 5))
    for place in np.ndindex(7, 5):
        values = [float(one[place]) for one in kept]
        sign = np.sign(sum(values))
        agree = [v for v in values if v and np.sign(v) == sign]
        expected[place] = sum(agree) / len(agree) if agree else 0
    assert combined("ties", given, weights, 0.4, [0]) == pytest.approx(expected, abs=1e-6)
    same = ties_of_peft([torch.from_numpy(g) for g in given], torch.ones(3), 0.4).numpy()
    assert ties(given, 0.4) == pytest.approx(same, abs=1e-6)


def test_dropped_values_leave_the_mean_as_it_was() -> None:
    change = drawn(0, 20, 30)
    drops = [thinned(change, 0.25, [i]) for i in range(2000)]
    shares = np.mean([(one != 0).mean() for one in drops])
    assert shares == pytest.approx(0.25, abs=0.002)
    assert np.mean(drops, 0) == pytest.approx(change, abs=0.35)
    assert set(np.unique(np.round(drops[0][drops[0] != 0] / change[drops[0] != 0], 5))) == {4}


@pytest.mark.parametrize(("shape", "rank"), [((300, 200), 5), ((60, 300), 40), ((20, 20), 20)])
def test_factors_have_the_rank_of_the_matrix(shape: tuple[int, int], rank: int) -> None:
    matrix = drawn(1, shape[0], rank) @ drawn(2, rank, shape[1])
    found = factors(matrix)
    if rank == min(shape):
        assert found is None  # they would be larger than the matrix
    else:
        assert found is not None and found[0].shape == (shape[0], rank) and found[2] < 1e-6
        assert np.abs(found[0] @ found[1] - matrix).max() < 1e-5 * np.abs(matrix).max()
    cut = factors(matrix, 3)
    best = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    assert cut is not None and cut[2] == pytest.approx(np.sqrt((best[3:] ** 2).sum() / (best**2).sum()), rel=1e-4)
    assert np.linalg.norm(matrix - cut[0] @ cut[1]) / np.linalg.norm(matrix) == pytest.approx(cut[2], rel=1e-3)
    nothing = factors(np.zeros((4, 6), np.float32), 2)
    assert nothing is not None and nothing[2] == 0
    assert factors(drawn(3, 200, 150)) is None


def test_a_head_is_carried_over_and_two_are_refused(model_folder: Folder, tmp_path: Path) -> None:
    base = model_folder("bert")
    headed = {"target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "r": 4}
    folders = adapters(base, tmp_path, "bert", headed, {"target_modules": ["query", "value"], "r": 4}, headed)
    made = peltc.combine(folders[:2], base, tmp_path / "one", weights=[0.5, 0.5])
    assert [entry.method.name for entry in made.spec.attach] == ["change", "change", "replace"]
    peltc.compile(tmp_path / "one/spec.yaml", base, tmp_path / "out")
    with pytest.raises(PeltError, match="E435 adapter-0 and adapter-2 both bring a map of their own for head"):
        peltc.combine([folders[0], folders[2]], base, tmp_path / "two")
    exported = peltc.export_peft(tmp_path / "one/spec.yaml", base, tmp_path / "peft")
    assert (exported["peft_type"], exported["modules_to_save"]) == ("LORA", ["classifier"])


def test_what_is_no_change_of_a_weight_is_refused(model_folder: Folder, tmp_path: Path) -> None:
    base = model_folder("bert")
    lora = {"pelt": 1, "attach": [{"method": "lora", "at": "attention.query"}]}
    block = {"pelt": 1, "attach": [{"method": "bottleneck", "at": "feed_forward.block"}]}
    for given, words in (
        ([lora, block], "E435 'bottleneck' of .* is no change of a weight: it changes a block"),
        ([lora, copy.deepcopy(lora)], "E435 nothing is left of the adapters' changes"),
    ):
        with pytest.raises(PeltError, match=words):
            peltc.combine(given, base, tmp_path / "out")
    for settings, words in (
        ({"weights": [1.0]}, "E435 1 weights are given for 2 adapters"),
        ({"how": "svd"}, "E435 `svd` cuts to a rank"),
        ({"rank": 4}, "E435 `svd` cuts to a rank"),
        ({"how": "ties"}, "E435 `ties` and `dare` keep a share"),
        ({"how": "dare", "density": 1.5}, r"E435 the density is 1\.5"),
        ({"how": "mean"}, "E435 there is no rule 'mean'"),
    ):
        with pytest.raises(PeltError, match=words):
            peltc.combine([lora, lora], base, tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_class_is_combined_on_the_class_with_the_head(
    model_folder: Folder, tmp_path: Path
) -> None:
    """One was trained for a task, and the other, as embedding models are, on the model without a head."""
    base = model_folder("bert")
    headed = {"target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["classifier"], "r": 4}
    (first,) = adapters(base, tmp_path, "bert", headed)
    inner = {"pelt": 1, "model": {"architecture": "BertModel"}, "attach": [{"method": "lora", "at": "attention.value"}]}
    made = peltc.combine([inner, first], base, tmp_path / "both")
    assert {entry.method.name for entry in made.spec.attach} == {"change", "replace"}
    peltc.compile(tmp_path / "both/spec.yaml", base, tmp_path / "out")
    lm = {"pelt": 1, "attach": [{"method": "lora", "at": "head"}]}
    tensors = {name: np.ones(t.shape, np.float32) for name, t in peltc.plan(lm, base).tensors.items()}
    save_file(tensors, tmp_path / "lm.safetensors")
    with pytest.raises(PeltError, match="E435 the BertModel has not what lm changes at head"):
        peltc.combine([inner, {**lm, "name": "lm"}], base, tmp_path / "out-2")
