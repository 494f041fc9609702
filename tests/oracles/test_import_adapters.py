"""Folders that the `adapters` library saves, imported and compiled: the artifact computes what its model does,
folded and static; and what cannot be imported is refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adapters_cases as cases
import models
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_import import mutations

import peltc
from peltc.compiler.importers.importing import import_adapter, imports
from peltc.runtime.commands.cli import run
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.diagnostics import PeltError

pytestmark = pytest.mark.xdist_group("adapters")
ALL = {f"{method}/{family}": (family, cases.METHODS[method], {}) for method, family in cases.CELLS} | cases.OTHERS
REFUSED = {f"{m}/{f}": (f, cases.METHODS[m], {}) for (m, f), why in cases.WITHOUT.items() if why.startswith("refused")}


class Library:
    """What the library saved, by the name of the case."""

    def __init__(self, root: Path, bases: Callable[[str], Path]):
        every = ALL | REFUSED
        cases.write(every, bases, root)
        self.places = {name: root / str(number) for number, name in enumerate(every)}
        self.bases = {name: bases(family) for name, (family, _, _) in every.items()}

    def __getitem__(self, name: str) -> Path:
        return self.places[name]


@pytest.fixture(scope="session")
def library(fresh_cache: None, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """All cases, from one run of the library."""
    if not cases.PYTHON.is_file():
        pytest.skip(f"no interpreter with the adapters library at {cases.PYTHON}: make .venv/adapters/.ready")
    root = tmp_path_factory.mktemp("adapters")
    return Library(root / "cases", lambda family: models.save(family, root / family))


@pytest.fixture
def adapter(library: Library, tmp_path: Path) -> Path:
    """A copy of one folder: a LoRA on BERT's queries and values, with its head."""
    return shutil.copytree(library["a head beside"] / "adapter", tmp_path / "adapter")


@pytest.fixture
def bert(library: Library) -> Path:
    return library.bases["a head beside"]


@pytest.mark.parametrize("name", ALL)
def test_what_is_compiled_is_what_the_library_computes(name: str, library: Library) -> None:
    assert imports(library[name] / "adapter")  # a setup's folder as well
    assert max(cases.errors(library[name], library.bases[name]).values()) < TOLERANCE["float32"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_library_computes_or_saves_otherwise_is_refused(name: str, library: Library) -> None:
    shifted, unsaved = "E431 a prefix in the T5.*relative bias", "(?s)E433 the tensors of .*not saved by the library"
    with pytest.raises(PeltError, match=unsaved if cases.UNSAVED in cases.WITHOUT[tuple(name.split("/"))] else shifted):
        import_adapter(library[name] / "adapter", library.bases[name])


def test_from_the_folder_to_a_spec_and_from_there_to_the_artifact(library: Library, tmp_path: Path) -> None:
    name = "UniPELT/bert"
    folder, base = library[name] / "adapter", str(library.bases[name])
    assert run(["import", str(folder), base, "-o", str(tmp_path / "spec"), "-q"]) == 0
    text = (tmp_path / "spec/spec.yaml").read_text()
    assert text.startswith("# Imported from 'adapter', an adapter of the adapters library 1.3.0 (prefix_tuning,")
    assert [entry.method.name for entry in peltc.load_spec(tmp_path / "spec/spec.yaml").attach] == [
        "prefix", "bottleneck", "lora"]  # fmt: skip
    assert run(["compile", str(tmp_path / "spec/spec.yaml"), base, "-o", str(tmp_path / "out"), "-q"]) == 0
    expected, given = cases.answers(library[name])
    found = peltc.Session(tmp_path / "out", ["CPUExecutionProvider"])(**given)["logits"]
    assert np.abs(found - expected).max() < TOLERANCE["float32"] * np.abs(expected).max()


def test_a_head_that_nobody_trained_is_the_bases(library: Library) -> None:
    found = import_adapter(
        library["a head that nobody trained"] / "adapter", library.bases["a head that nobody trained"]
    )
    assert [entry["method"] for entry in found.content["attach"]] == ["lora"]


def test_every_tensor_is_in_the_spec_bit_by_bit(adapter: Path, bert: Path) -> None:
    theirs = load_file(adapter / "adapter.safetensors") | load_file(adapter / "model_head.safetensors")
    ours = import_adapter(adapter, bert).tensors
    assert sorted(array.tobytes() for array in theirs.values()) == sorted(array.tobytes() for array in ours.values())


def test_an_old_lora_has_the_scale_that_it_was_trained_with(adapter: Path, bert: Path) -> None:
    """Before 1.1.0 the library did not scale; it reads such an adapter with alpha = r."""
    change(adapter, version="adapters.1.0.1")
    assert import_adapter(adapter, bert).content["attach"][0]["alpha"] == 2


def change(folder: Path, file: str = "adapter_config.json", **keys: Any) -> None:
    said = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(said | keys))


def configured(folder: Path, **keys: Any) -> None:
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(said | {"config": said["config"] | keys}))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"a_key_of_tomorrow": 3}, "E431 'a_key_of_tomorrow' is 3: the key is not known here"),
        ({"dtype": "bfloat16"}, "E431 'dtype' is 'bfloat16'"),
        ({"r": "x"}, "E430 'r' is 'x', as the adapters library never writes it"),
        ({"architecture": "mtl_lora"}, "E431 adapters of the method 'mtl_lora' are not imported yet"),
        ({"attn_matrices": ["q"]}, "E432 the adapter has, and its config does not mean, 2 sites"),
        ({"attn_matrices": ["q", "k", "v"]}, "E432 the adapter has no tensors at 2 sites: '.*attention.key'"),
        ({"intermediate_lora": True}, "(?s)E432 the adapter has tensors at 0 maps of a feed-forward network.*1, as"),
        ({"leave_out": [0]}, "E432 the adapter has, and its config does not mean"),
        ({"use_gating": True}, r"E433 'gate_weight' of '.*' is missing"),
        ({"use_dora": True}, "E433 '.*' has no magnitudes"),
        ({"r": 3}, r"E433 'A' of '.*' has the shape \[2, 32\]"),
    ],
)
def test_what_does_not_fit_is_refused(keys: dict[str, Any], words: str, adapter: Path, bert: Path) -> None:
    configured(adapter, **keys)
    with pytest.raises(PeltError, match=words):
        import_adapter(adapter, bert)


def test_a_union_has_one_of_each_at_most(adapter: Path, bert: Path) -> None:
    """As the library says itself; bottlenecks alone may be several, after different sub-layers."""
    said = json.loads((adapter / "adapter_config.json").read_text())["config"]
    change(adapter, config={"architecture": "union", "configs": [said, said]})
    with pytest.raises(PeltError, match="E431 the union has several configs of 'lora'"):
        import_adapter(adapter, bert)
    change(adapter, config={"architecture": "union", "configs": []})
    with pytest.raises(PeltError, match="E430 the union names no methods"):
        import_adapter(adapter, bert)


BOTTLENECKS: list[tuple[dict[str, Any], str]] = [
    ({"inv_adapter": "nice"}, "E431 'inv_adapter' is 'nice': invertible"),
    ({"non_linearity": "leakyrelu"}, "E431 'non_linearity' is 'leakyrelu'"),
    ({"original_ln_after": False}, "E431 'original_ln_after' is False"),
    ({"residual_before_ln": False, "use_gating": True}, "E431 'use_gating' is True"),
    ({"reduction_factor": {"0": 4}}, "E431 'reduction_factor' is .*: it says nothing for layer 1"),
    ({"scaling": "channel"}, "E433 'factor' of '.*' is missing"),
    ({"mh_adapter": True}, "E432 the adapter has no tensors at 2 sites: '.*attention.block'"),
    ({"phm_layer": True}, "E433 "),
]


@pytest.mark.parametrize(("keys", "words"), BOTTLENECKS)
def test_bottlenecks_that_do_not_fit_are_refused(
    keys: dict[str, Any], words: str, library: Library, tmp_path: Path
) -> None:
    folder = shutil.copytree(library["Pfeiffer/bert"] / "adapter", tmp_path / "adapter")
    configured(folder, **keys)
    with pytest.raises(PeltError, match=words):
        import_adapter(folder, library.bases["Pfeiffer/bert"])


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("prefix/bert", {"shared_gating": False}, "E431 'shared_gating' is False"),
        ("prefix/bert", {"leave_out": [0]}, r"E433 'up' of '.*' has the shape \[128, 8\]"),
        ("prefix/bert", {"flat": True}, "E433 'wte.weight' of '.*' is no part of what the config says"),
        (
            "LoReFT/t5",
            {"suffix_positions": 1},
            "E431 'suffix_positions' is 1: the library finds a decoder's last tokens",
        ),
        ("LoReFT/bert", {"prefix_positions": 0}, "E431 'prefix_positions' is 0: it changes no token"),
        ("LoReFT/bert", {"layers": [0]}, "E432 the adapter has, and its config does not mean, 1 sites"),
        ("LoReFT/bert", {"orthogonality": False}, "E433 'units.0.projection.weight' of '.*' is missing"),
        ("LoReFT/bert", {"tied_weights": True}, "E433 'units.1.*' of '.*' is no part of what the config says"),
        ("LoReFT/bert", {"output_reft": False}, "E431 'output_reft' is False"),
        ("shared weights", {"shared_W_phm": False}, "E433 4 shared tensors are none of what the config says: 'W_down"),
        (
            "VeRA/bert",
            {"vera_d": None, "vera_b": None},
            "E433 2 shared tensors are none of what the config says: 'lora",
        ),
        ("(IA)³/bert", {"alpha": 2}, "E431 'alpha' is 2: a vector's own factor"),
        ("prompt/bert", {"combine": "prefix_after_bos"}, "E431 'combine' is 'prefix_after_bos'"),
    ],
)
def test_prefixes_and_prompts_that_do_not_fit_are_refused(
    name: str, keys: dict[str, Any], words: str, library: Library, tmp_path: Path
) -> None:
    folder = shutil.copytree(library[name] / "adapter", tmp_path / "adapter")
    configured(folder, **keys)
    with pytest.raises(PeltError, match=words):
        import_adapter(folder, library.bases[name])


def test_a_direft_is_told_to_say_so(library: Library) -> None:
    """Its folder is that of a NoReFT, and a reload computes one."""
    text = import_adapter(library["NoReFT/bert"] / "adapter", library.bases["NoReFT/bert"]).text()
    assert "; of a DiReFT, which its folder does not tell from a NoReFT, say `subtract: false`\n" in text


def rewritten(folder: Path, changed: Callable[[dict[str, Any]], None], file: str = "adapter.safetensors") -> None:
    tensors = dict(load_file(folder / file))
    changed(tensors)
    save_file(tensors, folder / file)


def test_tensors_that_are_left_or_missing_are_refused(adapter: Path, bert: Path) -> None:
    rewritten(adapter, lambda tensors: tensors.update({"bert.pooler.dense.weight": np.ones((2, 2), np.float32)}))
    with pytest.raises(PeltError, match=r"E433 1 of the 9 tensors are no part of 'one': 'bert.pooler.dense.weight'"):
        import_adapter(adapter, bert)
    rewritten(adapter, lambda tensors: tensors.pop("bert.pooler.dense.weight"))
    rewritten(adapter, lambda tensors: tensors.pop("bert.encoder.layer.1.attention.self.query.loras.one.lora_B"))
    with pytest.raises(PeltError, match=r"E433 the tensors of 'bert.encoder.layer.1.*query.loras' are not all there"):
        import_adapter(adapter, bert)


def a_setup(library: Library, name: str, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of a setup's folder, and the model that it is for."""
    return shutil.copytree(library[name] / "adapter", tmp_path / "adapter"), library.bases[name]


def test_a_stack_is_one_attachment_after_another(library: Library, tmp_path: Path) -> None:
    folder, base = a_setup(library, "a stack", tmp_path)
    found = import_adapter(folder, base).content["attach"]
    assert [entry.get("after") for entry in found] == [
        None, ["bottleneck"], ["bottleneck", "bottleneck_2"]]  # fmt: skip


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        ({"type": "Split", "children": []}, "E431 a setup of the kind 'Split' is not imported"),
        ({"type": "Parallel", "children": []}, "(?s)E431 a setup of the kind 'Parallel' is.*`mode: bank`"),
        ({"type": "Average", "children": []}, "E430 the setup has 0 adapters"),
        ({"type": "Stack", "children": [{"type": "Fuse", "children": []}]}, "E431 a setup within a setup"),
        (
            {"type": "Stack", "children": [{"type": "single", "children": ["../one0"]}]},
            "E430 '../one0' is no name of a",
        ),
        ({"type": "Stack", "children": [{"type": "single", "children": [3]}]}, "E431 a setup within a setup"),
        ({"type": "Stack", "children": []}, "E430 the setup has 0 adapters"),
        ({"type": "Stack", "children": [{"type": "single", "children": ["two"]}]}, "E430 cannot read the adapter's"),
        (None, "E430 3 folders below hold adapters"),
    ],
)
def test_setups_that_cannot_be_said_are_refused(setup: Any, words: str, library: Library, tmp_path: Path) -> None:
    folder, base = a_setup(library, "a stack", tmp_path)
    change(folder, "adapter_setup.json", adapter_setup=setup)
    with pytest.raises(PeltError, match=words):
        import_adapter(folder, base)


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("a stack", {"is_parallel": True}, "E431 'is_parallel' is True: in a setup of several"),
        ("a stack", {"original_ln_after": False, "residual_before_ln": False}, "E431 'original_ln_after' is False"),
        (
            "a fusion",
            {"use_gating": True},
            "E431 the adapters at .* differ in what they read, or are more than two maps",
        ),
        ("a fusion", {"non_linearity": "gelu"}, "E431 the adapters at .* differ in what they read"),
        ("a fusion", {"leave_out": [0]}, "E432 the adapter has, and its config does not mean"),
    ],
)
def test_adapters_that_do_something_else_in_a_setup_are_refused(
    name: str, keys: dict[str, Any], words: str, library: Library, tmp_path: Path
) -> None:
    folder, base = a_setup(library, name, tmp_path)
    configured(folder / "one0", **keys)
    with pytest.raises(PeltError, match=words):
        import_adapter(folder, base)


def test_fusions_that_do_not_fit_are_refused(library: Library, tmp_path: Path) -> None:
    folder, base = a_setup(library, "a fusion", tmp_path)
    within = folder / "one0,one1,one2"
    said = json.loads((within / "adapter_fusion_config.json").read_text())
    for keys, words in (({"temperature": True}, "E431 'temperature' is True: the library lowers it"),
                        ({"query": False}, "E431 'query' is False"),
                        ({"value": False}, "E433 'answer' of '.*' has no counterpart")):  # fmt: skip
        change(within, "adapter_fusion_config.json", config=said["config"] | keys)
        with pytest.raises(PeltError, match=words):
            import_adapter(folder, base)
    change(within, "adapter_fusion_config.json", config=said["config"])
    key = "bert.encoder.layer.1.output.adapter_fusion_layer.one0,one1,one2.query.weight"
    rewritten(within, lambda tensors: tensors.pop(key), "model_adapter_fusion.safetensors")
    with pytest.raises(PeltError, match=r"E433 'ask' of '.*' is missing"):
        import_adapter(folder, base)
    (within / "model_adapter_fusion.safetensors").unlink()
    with pytest.raises(PeltError, match="E401"):
        import_adapter(folder, base)


@pytest.mark.parametrize(("before", "after"), [("bert.", ""), ("bert.", "model.bert.")])
def test_an_adapter_of_an_inner_or_an_outer_model(before: str, after: str, adapter: Path, bert: Path) -> None:
    """Its names are one prefix shorter or longer."""
    expected = import_adapter(adapter, bert)

    def renamed(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[after + name.removeprefix(before)] = tensors.pop(name)

    rewritten(adapter, renamed)
    found = import_adapter(adapter, bert)
    assert found.content == expected.content
    assert all(np.array_equal(found.tensors[name], array) for name, array in expected.tensors.items())


def test_another_model_is_refused(adapter: Path, library: Library) -> None:
    (adapter / "head_config.json").unlink()
    (adapter / "model_head.safetensors").unlink()
    with pytest.raises(PeltError, match="E432 4 of the adapter's 4 modules are not in the GPT2"):
        import_adapter(adapter, library.bases["Pfeiffer/gpt2"])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"head_type": "dependency_parsing"}, "E431 a head of the kind 'dependency_parsing'"),
        ({"activation_function": "relu"}, "E431 the BertFor.* does not compute what the head does: no 'relu' stands"),
        ({"use_pooler": True}, "E431 the BertFor.* its head is not one map behind the model's own pooler"),
        ({"layers": 3}, "E431 the BertFor.* its head is not 3 maps of the first token"),
        ({"layers": 1}, "E431 the BertFor.* its head is not 1 maps of the first token"),
    ],
)
def test_heads_of_the_librarys_own_that_no_class_computes(
    config: dict[str, Any], words: str, library: Library, tmp_path: Path
) -> None:
    name = "a head of the library's own"
    folder = shutil.copytree(library[name] / "adapter", tmp_path / "adapter")
    said = json.loads((folder / "head_config.json").read_text())
    change(folder, "head_config.json", config=said["config"] | config)
    with pytest.raises(PeltError, match=words):
        import_adapter(folder, library.bases[name])


def test_a_wrong_number_shows(adapter: Path, bert: Path, library: Library, tmp_path: Path) -> None:
    """The comparison can fail: another alpha is another function."""
    configured(adapter, alpha=3.01)
    shutil.copy(library["a head beside"] / "answer.safetensors", tmp_path)
    assert min(cases.errors(tmp_path, bert).values()) > TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"layer_ln_2": "post_feedforward_layernorm"},
            "E431 at .*feed_forward.block the library reads the norm of the",
        ),
        ({"layer_pre_self_attn": "self_attn"}, "E431 at .*attention.block the library takes something else for the"),
        ({"layer_pre_ffn": None}, "E431 at .*feed_forward.block the library takes something else for the residual"),
        (
            {"layer_output_proj": "mlp.up_proj"},
            "E431 the library's adapter is not behind the last map of .*feed_forward",
        ),
    ],
)
def test_hooks_elsewhere_are_refused(keys: dict[str, Any], words: str, library: Library, tmp_path: Path) -> None:
    folder, base = a_setup(library, "bottlenecks on hooks", tmp_path)
    said = json.loads((folder / "adapter_interface.json").read_text())["interface"]
    change(folder, "adapter_interface.json", interface=said | keys)
    with pytest.raises(PeltError, match=words):
        import_adapter(folder, base)
    (folder / "adapter_interface.json").write_text("{}")
    with pytest.raises(PeltError, match="E430 the interface names no modules"):
        import_adapter(folder, base)


def pickled(folder: Path, content: Any) -> None:
    (folder / "adapter.safetensors").unlink(missing_ok=True)
    torch.save(content, folder / "pytorch_adapter.bin")


class Loud:
    """What would act, were it opened as a pickle."""

    def __reduce__(self) -> Any:
        return (print, ("opened",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "E430 the file holds a list"),
        ({"a": 1}, "E430 \"'a'\" is no tensor whose values the file holds|E430 'a' is no tensor"),
        ({"a": torch.ones(1).expand(100_000, 100_000)}, "E430 'a' is no tensor whose values the file holds"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "E430 the tensor 'a' is of the type torch.int64"),
        ({"a": torch.eye(3).to_sparse()}, "E430 'a' is no tensor whose values the file holds"),
        ({"a": Loud()}, "(?s)E430 the file cannot be loaded.*use_safetensors"),
    ],
)
def test_torch_files_hold_plain_tensors(content: Any, words: str, adapter: Path, bert: Path, capsys: Any) -> None:
    pickled(adapter, content)
    with pytest.raises(PeltError, match=words):
        import_adapter(adapter, bert)
    assert "opened" not in capsys.readouterr().out


def test_importing_safetensors_on_a_known_base_imports_no_torch(adapter: Path, bert: Path, tmp_path: Path) -> None:
    import_adapter(adapter, bert)
    program = (
        "import sys; from peltc.runtime.commands.cli import run;"
        f"code = run(['import', {str(adapter)!r}, {str(bert)!r}, '-o', {str(tmp_path / 'spec')!r}]);"
        "print(code, sorted({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 []\n"), done.stdout + done.stderr


@pytest.mark.parametrize("name", ["a head beside", "Compacter/bert", "prefix, flat/bert", "Pfeiffer/bert"])
@pytest.mark.parametrize("count", [60, pytest.param(2_000, marks=pytest.mark.slow)])
def test_folders_that_are_broken_raise_nothing_else(count: int, name: str, library: Library, tmp_path: Path) -> None:
    refused = 0
    for folder in broken(library[name] / "adapter", tmp_path, count):
        try:
            import_adapter(folder, library.bases[name])
        except PeltError:
            refused += 1
    assert refused > count / 4


def broken(folder: Path, out: Path, count: int) -> Iterator[Path]:
    """Copies of a folder with bytes, keys or tensors changed, the method's own keys among them."""
    plain = shutil.copytree(folder, out / "plain")
    if not (plain / "adapter.safetensors").exists():
        tensors = torch.load(plain / "pytorch_adapter.bin", weights_only=True)
        save_file({name: np.ascontiguousarray(t.numpy()) for name, t in tensors.items()}, plain / "adapter.safetensors")
        (plain / "pytorch_adapter.bin").unlink()
    yield from mutations(plain, out / "mutant", count, "adapter.safetensors", ("config",))
