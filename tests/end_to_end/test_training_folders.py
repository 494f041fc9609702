"""Folders as training scripts leave them, compiled with one command: a `Trainer` over PEFT, an adapter that
`transformers` adds itself, TRL's trainer, and that of the `adapters` library."""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import peltc
from peltc.runtime.commands.cli import run
from peltc.runtime.verification.verify import TOLERANCE

Folder = Callable[..., Path]
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
EFFECT = 1e-3
"""How much training must move the output, as a share of it, for the comparison to mean anything."""
ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("PELTC_ADAPTERS_PYTHON") or ROOT / ".venv/adapters/bin/python")
"""An interpreter that has the `adapters` library; `make .venv/adapters/.ready` sets one up."""
PATIENCE = 300
"""Seconds that it may take."""
WORDS = ("the", "graph", "of", "a", "model", "has", "nodes", "and", "edges")


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """A few sequences of ids with labels."""

    def __init__(self, size: int, labels: int):
        draw = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1000, size, (24, 12), generator=draw)
        self.labels = torch.arange(24) % labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(12, dtype=torch.long), "labels": self.labels[i]}


def arguments(out: Path, **more: Any) -> dict[str, Any]:
    given = {"output_dir": str(out), "max_steps": 4, "save_steps": 4, "per_device_train_batch_size": 4}
    return given | {"report_to": "none", "learning_rate": 3e-3, "use_cpu": True, "disable_tqdm": True, **more}


def held(
    folder: Path, base: Path, out: Path, live: Any, bare: Any, given: Mapping[str, torch.Tensor], name: str
) -> None:
    """The artifact that one command makes of a folder answers as the trained model does, and not as the base does."""
    with torch.no_grad():
        expected = live.eval()(**given)[name].numpy()
        assert np.abs(bare.eval()(**given)[name].numpy() - expected).max() > EFFECT * np.abs(expected).max()
    assert run(["compile", str(folder), str(base), "-o", str(out), "-q"]) == 0
    session = peltc.Session(out, ["CPUExecutionProvider"])
    found = session(**{n: t.numpy() for n, t in given.items()})[name]
    assert np.abs(found - expected).max() < TOLERANCE["float32"] * np.abs(expected).max()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_a_trainer_over_peft(model_folder: Folder, tmp_path: Path) -> None:
    """On MiniLM's real weights, which have no head; the run's folder, with its checkpoint and all that lies there."""
    base = model_folder("minilm")
    model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=4, lora_dropout=0.1)
    live: Any = peft.get_peft_model(model, config)
    trainer = transformers.Trainer(live, transformers.TrainingArguments(**arguments(tmp_path / "run")),
                                   train_dataset=Texts(20000, 3))  # fmt: skip
    trainer.train()
    assert (tmp_path / "run/checkpoint-4/optimizer.pt").is_file()
    given = {"input_ids": Texts(20000, 3).ids[:2], "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    bare = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=3)
    held(tmp_path / "run", base, tmp_path / "out", live, bare, given, "logits")


def test_an_adapter_that_transformers_adds(model_folder: Folder, tmp_path: Path) -> None:
    """As sentence-transformers trains embeddings: on the model without a head, saved by the model itself."""
    base = model_folder("minilm")
    live: Any = transformers.BertModel.from_pretrained(base, add_pooling_layer=False)
    live.add_adapter(peft.LoraConfig(target_modules=["query", "dense"], r=4, exclude_modules=["pooler.dense"]))
    ids = Texts(20000, 2).ids
    trained = [p for p in live.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 5e-3)
    for step in range(4):
        first, second = (live(input_ids=ids[6 * step :][:6])["last_hidden_state"].mean(1) for _ in range(2))
        scores = torch.nn.functional.normalize(first) @ torch.nn.functional.normalize(second).T
        torch.nn.functional.cross_entropy(20 * scores, torch.arange(6)).backward()
        optimizer.step()
        optimizer.zero_grad()
    live.save_pretrained(tmp_path / "adapter")
    bare = transformers.BertModel.from_pretrained(base, add_pooling_layer=False)
    given = {"input_ids": ids[:2], "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    held(tmp_path / "adapter", base, tmp_path / "out", live, bare, given, "last_hidden_state")


def test_trls_trainer(model_folder: Folder, tmp_path: Path) -> None:
    """With a tokenizer and a chat's files in the folder."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers

    base = model_folder("llama")
    vocabulary = {"<unk>": 0, "<pad>": 1, "<eos>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
    rows = datasets.Dataset.from_list([{"text": " ".join(WORDS[i % 3 :])} for i in range(16)])
    settings = trl.SFTConfig(**arguments(tmp_path / "run", max_length=16, bf16=False, dataset_num_proc=None))
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.SFTTrainer(transformers.LlamaForCausalLM.from_pretrained(base), args=settings, train_dataset=rows,
                                 processing_class=tokenizer, peft_config=config)  # fmt: skip
        trainer.train()
        trainer.save_model()
    assert (tmp_path / "run/tokenizer.json").is_file()
    bare = transformers.LlamaForCausalLM.from_pretrained(base)
    held(
        tmp_path / "run",
        base,
        tmp_path / "out",
        trainer.model,
        bare,
        {"input_ids": torch.arange(3, 12)[None]},
        "logits",
    )


def test_the_trainer_of_adapters(model_folder: Folder, tmp_path: Path) -> None:
    """On MiniLM's real weights, by a program of its own: the adapter that was saved, and the run's folder with its
    checkpoint, in torch's own format, both with a head of the library's own."""
    if not PYTHON.is_file():
        pytest.skip(f"no interpreter with the adapters library at {PYTHON}: make .venv/adapters/.ready")
    base, request = model_folder("minilm"), tmp_path / "request"
    request.write_text(json.dumps({"base": str(base), "out": str(tmp_path)}))
    program = [str(PYTHON), "-I", str(ROOT / "tests/oracles/adapters_training.py")]
    with request.open() as given:
        done = subprocess.run(program, stdin=given, capture_output=True, text=True, timeout=PATIENCE,
                              env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = load_file(tmp_path / "answer.safetensors")
    before, after = answer.pop("before"), answer.pop("after")
    assert np.abs(after - before).max() > EFFECT * np.abs(after).max()
    for folder in ("adapter", "run"):
        assert run(["compile", str(tmp_path / folder), str(base), "-o", str(tmp_path / "out"), "-q"]) == 0
        found = peltc.Session(tmp_path / "out", ["CPUExecutionProvider"])(**answer)["logits"]
        assert np.abs(found - after).max() < TOLERANCE["float32"] * np.abs(after).max()
