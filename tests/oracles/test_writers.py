"""Adapters as other programs than PEFT's own `save_pretrained` leave them: each habit is read, or refused by name."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from import_matrix import written
from safetensors.torch import load_file, save_file

import peltc
from peltc.compiler.importers.importing import import_adapter, imports
from peltc.runtime.commands.cli import run
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.diagnostics import PeltError

Folder = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SETTINGS = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"}
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]


@pytest.fixture
def adapter(model_folder: Folder, tmp_path: Path) -> Path:
    written("llama", SETTINGS, model_folder("llama"), tmp_path / "adapter")
    return tmp_path / "adapter"


def configured(folder: Path, change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    save_file({change(name): t for name, t in load_file(folder / TENSORS).items()}, folder / TENSORS)


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / TENSORS), folder / PICKLE)
    (folder / TENSORS).unlink()


def narrow(folder: Path, dtype: torch.dtype) -> None:
    save_file({name: t.to(dtype) for name, t in load_file(folder / TENSORS).items()}, folder / TENSORS)


def checkpoint(folder: Path) -> None:
    """What a Trainer leaves beside."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps({"x": 1}))
    (folder / "trainer_state.json").write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")


def below(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    for file in (CONFIG, TENSORS):
        (folder / file).rename(folder / name / file)


def sentence_transformers(folder: Path) -> None:
    """Its modules' folders; the first module is in the folder itself."""
    (folder / "modules.json").write_text(json.dumps([
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]))  # fmt: skip
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text("{}")
    (folder / "sentence_bert_config.json").write_text("{}")
    configured(folder, lambda c: c | {"task_type": "FEATURE_EXTRACTION"})


def early_peft(folder: Path) -> None:
    """Keys of the first releases, and tensors in a pickle."""
    keep = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout",
            "modules_to_save", "peft_type", "r", "target_modules", "task_type")  # fmt: skip
    configured(folder, lambda c: {k: c[k] for k in keep} | {"enable_lora": None, "merge_weights": False})
    as_pickle(folder)


def torchtune(folder: Path) -> None:
    configured(folder, lambda c: {k: c[k] for k in ("r", "lora_alpha", "target_modules", "peft_type")})
    as_pickle(folder)


def unsloth(folder: Path) -> None:
    auto = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers", "unsloth_fixed": True}
    configured(
        folder, lambda c: c | {"auto_mapping": auto, "target_modules": r"(?:.*?(?:self_attn).*?(?:q_proj|v_proj))"}
    )


def axolotl(folder: Path) -> None:
    """The model's config lies beside the adapter."""
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    checkpoint(folder)


WRITERS: dict[str, Callable[[Path], None]] = {
    "a Trainer's checkpoint": checkpoint,
    "LLaMA-Factory": lambda f: (checkpoint(f), (f / "trainer_log.jsonl").write_text("{}\n"), None)[-1],
    "axolotl": axolotl,
    "unsloth": unsloth,
    "torchtune": torchtune,
    "sentence-transformers": sentence_transformers,
    "sentence-transformers, a module's folder": lambda f: below(f, "0_Transformer"),
    "the first releases of PEFT": early_peft,
    "a name that is not default": lambda f: below(f, "support"),
    "a checkpoint in a run's folder": lambda f: below(f, "checkpoint-500"),
    "names twice as long": lambda f: renamed(f, lambda name: f"base_model.model.{name}"),
    "names without what PEFT puts before": lambda f: renamed(f, lambda name: name.removeprefix("base_model.model.")),
    "bfloat16": lambda f: narrow(f, torch.bfloat16),
    "float16": lambda f: narrow(f, torch.float16),
    "bfloat16 in a pickle": lambda f: (narrow(f, torch.bfloat16), as_pickle(f))[-1],
}


@pytest.mark.parametrize("writer", WRITERS)
def test_folders_of_other_writers_are_read(writer: str, adapter: Path, model_folder: Folder) -> None:
    """To the same spec, and the very values that are in the file."""
    base = model_folder("llama")
    plain = import_adapter(adapter, base)
    WRITERS[writer](adapter)
    assert imports(adapter)
    found = import_adapter(adapter, base)
    assert [{**entry, "name": ""} for entry in found.content["attach"]] == [
        {**entry, "name": ""} for entry in plain.content["attach"]]  # fmt: skip
    kind = torch.bfloat16 if "bfloat16" in writer else torch.float16 if "float16" in writer else torch.float32
    for name, array in plain.tensors.items():
        assert np.array_equal(torch.tensor(array).to(kind).float().numpy(), found.tensors[name])


@pytest.mark.parametrize("writer", ["torchtune", "a checkpoint in a run's folder"])
def test_and_compiled_with_one_command(writer: str, adapter: Path, model_folder: Folder, tmp_path: Path) -> None:
    base = model_folder("llama")
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        live: Any = peft.PeftModel.from_pretrained(model, adapter).eval()
        expected = live(input_ids=ids).logits.numpy()
    WRITERS[writer](adapter)
    assert run(["compile", str(adapter), str(base), "-o", str(tmp_path / "out"), "-q"]) == 0
    found = peltc.Session(tmp_path / "out", ["CPUExecutionProvider"])(input_ids=ids.numpy())["logits"]
    assert np.abs(found - expected).max() < TOLERANCE["float32"] * np.abs(expected).max()


class Hostile:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return print, ("this must not be run",)


def hostile(folder: Path) -> None:
    torch.save({"x": Hostile()}, folder / PICKLE)
    (folder / TENSORS).unlink()


def compressed(folder: Path) -> None:
    as_pickle(folder)
    with zipfile.ZipFile(folder / PICKLE) as parts:
        held = {part.filename: parts.read(part) for part in parts.infolist()}
    with zipfile.ZipFile(folder / PICKLE, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in held.items():
            out.writestr(name, data)


def expanded(folder: Path) -> None:
    name = next(iter(load_file(folder / TENSORS)))
    torch.save({name: torch.zeros(1).expand(2**20, 2**20)}, folder / PICKLE)
    (folder / TENSORS).unlink()


def held(folder: Path, content: Any) -> None:
    torch.save(content, folder / PICKLE)
    (folder / TENSORS).unlink()


def cut(folder: Path) -> None:
    as_pickle(folder)
    (folder / PICKLE).write_bytes((folder / PICKLE).read_bytes()[:-100])


def twice(folder: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-20"):
        (folder / name).mkdir()
        for file in (CONFIG, TENSORS):
            shutil.copy(folder / file, folder / name / file)
    (folder / CONFIG).unlink()
    (folder / TENSORS).unlink()


def mlx(folder: Path) -> None:
    (folder / CONFIG).write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}, "num_layers": 2})
    )


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code in a pickle": (hostile, "E430 torch does not open the file without running code from it"),
    "a compressed pickle": (compressed, "E430 the file is compressed"),
    "a tensor larger than its file": (expanded, "E430 the file says that its tensors are larger than it is"),
    "a pickle of something else": (lambda f: held(f, [1]), "E430 the file holds something else than tensors by name"),
    "a sparse tensor": (lambda f: held(f, {"a": torch.eye(2).to_sparse()}), "E430 "),
    "whole numbers": (lambda f: held(f, {"a": torch.arange(3)}), "E430 the tensor 'a' is of the type int64"),
    "a pickle that is cut off": (cut, "E430 the file of tensors cannot be read: it is cut off"),
    "several checkpoints": (twice, "E430 2 folders below hold adapters: 'checkpoint-10', 'checkpoint-20'"),
    "rows of added tokens apart": (
        lambda f: (f / "new_embeddings.safetensors").write_bytes(b""), "E431 the adapter has rows of added tokens"),
    "another library's config": (mlx, "E430 the adapter's config names no method"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(case: str, adapter: Path, model_folder: Folder, capfd: Any) -> None:
    change, words = REFUSED[case]
    change(adapter)
    with pytest.raises(PeltError, match=words):
        import_adapter(adapter, model_folder("llama"))
    assert "must not be run" not in capfd.readouterr().out


def test_a_folder_that_leads_elsewhere_is_not_followed(adapter: Path, model_folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/linked").symlink_to(adapter, target_is_directory=True)
    assert not imports(tmp_path / "run")


def test_a_whole_model_with_an_adapter_beside_is_a_model(adapter: Path, model_folder: Folder) -> None:
    for file in model_folder("llama").iterdir():
        shutil.copy(file, adapter / file.name)
    assert not imports(adapter)


def test_a_tokenizer_with_more_tokens_is_told(adapter: Path, model_folder: Folder) -> None:
    said: list[str] = []
    (adapter / "added_tokens.json").write_text(json.dumps({"<extra>": 100, "<more>": 101}))
    import_adapter(adapter, model_folder("llama"), talk=said.append)
    assert any(
        line.startswith("warning: the adapter's tokenizer has 102 tokens, and the model's table 100") for line in said
    )
    said.clear()
    (adapter / "added_tokens.json").unlink()
    (adapter / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 5, "content": "<new>"}]}))
    import_adapter(adapter, model_folder("llama"), talk=said.append)
    assert any("the model's none: the artifact will have none" in line for line in said)
    for broken in ("[]", "{", '{"added_tokens": 3}', '{"added_tokens": [3, {"id": "x"}]}', "null"):
        (adapter / "tokenizer.json").write_text(broken)
        import_adapter(adapter, model_folder("llama"))
