"""What the `adapters` library answers: a program of its own, since the library needs another version of transformers.

It reads a request from standard input and writes into the folder that it is given:

    models/NAME.safetensors           state/PARAMETER of a random model, input/NAME of a padded batch, and its output
    cases/MODEL/NAME.safetensors      adapter/PARAMETER, gate/LAYER/LOCATION, and the output
    counts.json                       how many values each configuration trains on the shape of RoBERTa-base
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

Said = Mapping[str, Any]
ADAPTER = "one"
LENGTH, PADDING = 9, 3


def config_of(said: Said) -> Any:
    """A configuration of the library, from the name of its class and its arguments."""
    options = {k: config_of(v) if isinstance(v, dict) else v for k, v in said["options"].items()}
    return getattr(adapters, said["class"])(*map(config_of, said["parts"]), **options)


def model_of(said: Said) -> Any:
    """A model without modules; no parameter has its start value, biases and norms least of all.

    With `sdpa` attention the library hides a decoder's prefix: it inverts the prefix's part of a mask of booleans,
    which is true where there is something to see.
    """
    config = getattr(transformers, said["config"])(**said["sizes"])
    model = getattr(transformers, said["model"])._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.normal_(1.0 if gain else 0.0, 0.2)
    return model


def inputs_of(said: Said) -> dict[str, torch.Tensor]:
    """A batch of three, of which the last is padded."""
    ids = torch.randint(5, said["sizes"]["vocab_size"], (3, LENGTH))
    mask = torch.ones_like(ids)
    ids[-1, -PADDING:], mask[-1, -PADDING:] = said["sizes"]["pad_token_id"], 0
    return {"input_ids": ids, "attention_mask": mask}


def answer(model: Any, inputs: Mapping[str, torch.Tensor], **more: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **more)


def add(model: Any, config: Any) -> dict[str, torch.nn.Parameter]:
    """Add an adapter and make it active; returns its parameters."""
    base = {name for name, _ in model.named_parameters()}
    model.add_adapter(ADAPTER, config=config)
    model.set_active_adapters(ADAPTER)
    return {name: parameter for name, parameter in model.named_parameters() if name not in base}


def run_case(model: Any, config: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A configuration's random parameters, its gates, and what the model answers; the model is left as it was."""
    parameters = add(model, config)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.25)
    gated = any("gate" in name for name in parameters)
    output = answer(model, inputs, **({"output_adapter_gating_scores": True} if gated else {}))
    found = {f"adapter/{name}": parameter.detach().clone() for name, parameter in parameters.items()}
    if gated:
        for layer, places in output["adapter_gating_scores"][ADAPTER].items():
            found |= {f"gate/{layer}/{place}": torch.from_numpy(scores).clone() for place, scores in places.items()}
    model.delete_adapter(ADAPTER)
    return found | {"output": output[0][:, -LENGTH:]}  # the text's positions; those of a prompt come before


def count(config: Any) -> int:
    """How many values a configuration trains on the shape of RoBERTa-base."""
    base = transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    with torch.device("meta"):
        model = transformers.RobertaModel(base)
        adapters.init(model)
        return sum(parameter.numel() for parameter in add(model, config).values())


def write(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def main(request: Mapping[str, Any], folder: Path) -> None:
    for number, (name, said) in enumerate(request["models"].items()):
        torch.manual_seed(number)
        model, inputs = model_of(said), inputs_of(said)
        state = {f"state/{key}": tensor.clone() for key, tensor in model.state_dict().items()}
        plain = {"output": answer(model, inputs)[0]}
        write(folder / "models" / f"{name}.safetensors", state | {f"input/{k}": v for k, v in inputs.items()} | plain)
        adapters.init(model)
        for case in said["cases"]:
            found = run_case(model, config_of(request["cases"][case]), inputs)
            write(folder / "cases" / name / f"{case}.safetensors", found)
    counts = {name: count(config_of(said)) for name, said in request["counts"].items()}
    (folder / "counts.json").write_text(json.dumps(counts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.load(sys.stdin), Path(sys.argv[1]))
