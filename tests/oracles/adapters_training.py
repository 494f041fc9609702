"""A training run with the `adapters` library and its own trainer: a program of its own, since the library needs another
version of transformers.

It reads a request from standard input: `base`, a model's folder; `out`, the folder to write. It leaves there what a
script leaves, the trainer's checkpoints in `run/` and the adapter with its head in `adapter/`; and what the trained
model answers to a padded batch beside what it answered before, in `answer.safetensors`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from safetensors.torch import save_file

LABELS, STEPS = 3, 8


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """A few sequences of ids with labels."""

    def __init__(self, size: int):
        self.ids = torch.randint(1000, size, (24, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(12, dtype=torch.long), "labels": i % LABELS}


def main(said: Mapping[str, Any]) -> None:
    torch.manual_seed(0)
    out = Path(said["out"])
    model: Any = adapters.BertAdapterModel.from_pretrained(said["base"])
    model.add_adapter("task", config=adapters.SeqBnConfig(reduction_factor=16))
    model.add_classification_head("task", num_labels=LABELS)
    model.train_adapter("task")
    texts = Texts(model.config.vocab_size)
    given = {"input_ids": texts.ids[:2].clone(), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    given["attention_mask"][1, -4:] = 0
    with torch.no_grad():
        before = model.eval()(**given).logits
    settings = transformers.TrainingArguments(
        str(out / "run"), max_steps=STEPS, save_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    adapters.AdapterTrainer(model, settings, train_dataset=texts).train()
    with torch.no_grad():
        after = model.eval()(**given).logits
    model.save_adapter(str(out / "adapter"), "task", use_safetensors=True)
    save_file({**given, "before": before, "after": after}, out / "answer.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.load(sys.stdin))
