"""What the `adapters` library saves, and what it computes then: a program of its own, since the library needs another
version of transformers.

It reads a request from standard input, a list of cases, and writes for each a folder with the adapter that it saved,
`adapter/`, and what the model answers to a padded batch, `answer.safetensors`.
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
from adapters import composition
from safetensors.torch import save_file

Said = Mapping[str, Any]
ADAPTER = "one"
LENGTH, PADDING = 9, 3


def config_of(said: Said) -> Any:
    """A configuration of the library, from the name of its class and its arguments."""
    options = {k: config_of(v) if isinstance(v, dict) and "class" in v else v for k, v in said["options"].items()}
    return getattr(adapters, said["class"])(*map(config_of, said["parts"]), **options)


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """A batch of two, of which the last is padded; of a model with two stacks, the decoder's ids as well."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, model.config.vocab_size, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    ids[-1, -PADDING:], mask[-1, -PADDING:] = model.config.pad_token_id or 0, 0
    more = {"decoder_input_ids": ids[:, 2:7].flip(0).contiguous()} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs_of(model))
    if "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]])
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def randomise(model: Any, name: str, seed: int, head: bool) -> None:
    """Random values for all that an adapter has; the head, where there is one, counts as part of it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if (
                f".{name}." in key
                or (f".{name}" in key and "fusion" in key)
                or (head and key.startswith(("classifier.", "score.")))
            ):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.25)


def composed(model: Any, said: Said, out: Path) -> torch.Tensor:
    """What several adapters answer in a setup, which is saved."""
    names = [f"{ADAPTER}{number}" for number in range(len(said["setup"]["configs"]))]
    setup = getattr(composition, said["setup"]["kind"])(*names, **said["setup"].get("options", {}))
    for number, (name, config) in enumerate(zip(names, said["setup"]["configs"], strict=True)):
        model.add_adapter(name, config=config_of(config))
        randomise(model, name, said["seed"] + number, False)
    if said["setup"]["kind"] == "Fuse":
        model.add_adapter_fusion(setup, config=config_of(said["config"]))
        randomise(model, setup.name, said["seed"], False)
    model.set_active_adapters(setup)
    found = answer(model.eval())
    model.save_adapter_setup(str(out / "adapter"), setup, use_safetensors=said["safe"])
    return found


def run(said: Said) -> None:
    """One case, written to its folder."""
    architecture = (
        said.get("architecture") or json.loads((Path(said["base"]) / "config.json").read_text())["architectures"][0]
    )
    library = adapters if hasattr(adapters, architecture) else transformers
    model: Any = getattr(library, architecture).from_pretrained(said["base"], attn_implementation="eager").eval()
    if flexible := said["head"] if isinstance(said["head"], dict) else None:
        getattr(model, f"add_{flexible['kind']}_head")(ADAPTER, **flexible["options"])
    else:
        adapters.init(model)
    bare = answer(model)
    out = Path(said["out"])
    if said.get("setup"):
        found = composed(model, said, out)
    else:
        model.add_adapter(ADAPTER, config=config_of(said["config"]))
        model.set_active_adapters(ADAPTER)
        randomise(model, ADAPTER, said["seed"], bool(said["head"]))
        found = answer(model.eval())
        model.save_adapter(str(out / "adapter"), ADAPTER, with_head=bool(said["head"]), use_safetensors=said["safe"])
    given = inputs_of(model)
    save_file({"bare": bare, "answer": found[:, -bare.shape[1] :].contiguous(), **given}, out / "answer.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in json.load(sys.stdin):
        Path(case["out"]).mkdir(parents=True, exist_ok=True)
        run(case)
