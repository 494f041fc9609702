"""Every method of Hugging Face PEFT that is imported on every architecture of the table, against PEFT itself; writes
docs/import-matrix.md.

    python tests/oracles/import_matrix.py [--only METHOD ...]

The figures are of one machine; that none exceeds the tolerance is held by test_import.py on any.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tests/oracles"))
import matrix_page  # noqa: E402
import models  # noqa: E402

EFFECT = 1e-2
"""How much, at least, an adapter must move the output for the comparison to mean anything."""
MAPS = {
    "bert": ["query", "value", "output.dense"], "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"], "t5": ["q", "v", "wo"], "qwen3_moe": ["q_proj", "v_proj"],
}  # fmt: skip
"""The modules that carry the method: attention's and, where there is one, the feed-forward network's last."""
INSIDE = {"bert": ["output.dense"], "gpt2": ["mlp.c_proj"], "llama": ["down_proj"], "t5": ["wo"], "qwen3_moe": []}
TASKS = {
    "bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "qwen3_moe": "CAUSAL_LM",
}  # fmt: skip
NORMS = {
    "bert": ["LayerNorm"], "gpt2": ["ln_1", "ln_2", "ln_f"], "llama": ["input_layernorm", "norm"],
    "t5": ["layer_norm", "final_layer_norm"], "qwen3_moe": ["post_attention_layernorm", "norm"],
}  # fmt: skip
WHERE: dict[Any, dict[str, list[str] | None]] = {
    peft.LNTuningConfig: NORMS,
    peft.TrainableTokensConfig: dict.fromkeys(MAPS),  # PEFT finds the table itself
}
"""The modules of methods that other modules carry than `MAPS`."""
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    # name: PEFT's config, and its settings on every architecture
    "LoRA": (peft.LoraConfig, {"r": 4, "lora_alpha": 12}),
    "DoRA": (peft.LoraConfig, {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "(IA)³": (peft.IA3Config, {}),
    "LoHa": (peft.LoHaConfig, {"r": 3, "alpha": 7}),
    "OFT": (peft.OFTConfig, {"oft_block_size": 8}),
    "AdaLoRA": (peft.AdaLoraConfig, {"init_r": 4, "lora_alpha": 12, "total_step": 10}),
    "LoKr": (peft.LoKrConfig, {"r": 2, "alpha": 7}),
    "VeRA": (peft.VeraConfig, {"r": 6}),
    "BOFT": (peft.BOFTConfig, {"boft_block_size": 8}),
    "HRA": (peft.HRAConfig, {"r": 5}),
    "MiSS": (peft.MissConfig, {"r": 6}),
    "HiRA": (peft.HiraConfig, {"r": 4}),
    "BEFT": (peft.BeftConfig, {}),
    "norms": (peft.LNTuningConfig, {}),
    "tokens": (peft.TrainableTokensConfig, {"token_indices": [9, 3, 5]}),
    "FourierFT": (peft.FourierFTConfig, {"n_frequency": 60, "scaling": 20.0}),
    "SHiRA": (peft.ShiraConfig, {"r": 2, "random_seed": 5}),
    "RoAd": (peft.RoadConfig, {"variant": "road_2", "group_size": 8}),
    "C³A": (peft.C3AConfig, {"block_size": 8}),
    "DeLoRA": (peft.DeloraConfig, {"r": 4, "delora_lambda": 9.0}),
    "GraLoRA": (peft.GraloraConfig, {"r": 4, "gralora_k": 2, "alpha": 8, "hybrid_r": 2}),
    "VB-LoRA": (peft.VBLoRAConfig, {"r": 3, "num_vectors": 12, "vector_length": 8, "topk": 3}),
    "RandLoRA": (peft.RandLoraConfig, {"r": 5, "randlora_alpha": 3}),
    "PVeRA": (peft.PveraConfig, {"r": 6}),
    "GLoRA": (peft.GloraConfig, {"r": 3, "config_D_E": "vector"}),
    "WaveFT": (peft.WaveFTConfig, {"n_frequency": 60}),
    "prefix tuning": (peft.PrefixTuningConfig, {"num_virtual_tokens": 4}),
    "projected prefixes": (
        peft.PrefixTuningConfig,
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8},
    ),
    "prompt tuning": (peft.PromptTuningConfig, {"num_virtual_tokens": 4}),
    "P-tuning": (peft.PromptEncoderConfig, {"num_virtual_tokens": 4, "encoder_hidden_size": 16}),
    "CPT": (peft.CPTConfig, {"cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [1, 2, 3]}),
    "multitask prompt tuning": (peft.MultitaskPromptTuningConfig, {"num_virtual_tokens": 4, "num_ranks": 2}),
}
AROUND = ("magnitude", "ia3", "delora_lambda", "boft_s", "ln_tuning")
"""Parameters whose random values lie around their start values rather than around zero."""
WITHOUT: dict[tuple[str, str], str] = {
    ("LoHa", "gpt2"): "PEFT has none for `Conv1D`",
    **{
        (name, "gpt2"): "PEFT has none for `Conv1D`"
        for name in ("OFT", "SHiRA", "RoAd", "C³A", "DeLoRA", "GLoRA", "LoKr", "BOFT", "HRA", "MiSS", "BEFT")
    },
    ("CPT", "bert"): "PEFT has it for causal models alone",
    ("CPT", "t5"): "PEFT has it for causal models alone",
    ("multitask prompt tuning", "t5"): "PEFT gives its decoder no tokens but labels",
}
"""What PEFT itself has not, with the reason."""


def written(
    family: str, settings: Mapping[str, Any], base: Path, out: Path, effect: float = EFFECT
) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """Save an adapter with random weights; what PEFT's model answers once it is loaded again, and to what.

    Args:
        settings: the config's, its class as `kind`, LoRA's where absent, and as `trained` what training does to the
            model beside changing its parameters.
        effect: how much, at least, the adapter must move the output.
    """
    kind = settings.get("kind", peft.LoraConfig)
    architecture = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(base).eval()
    given = {"input_ids": torch.arange(3, 12)[None]}
    if family == "t5":
        given["decoder_input_ids"] = torch.arange(3, 8)[None]
    with torch.no_grad():
        bare = model(**given).logits.numpy()
        keys = {name: value for name, value in settings.items() if name not in ("kind", "trained")}
        live: Any = peft.get_peft_model(model, kind(**keys)).eval()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in live.named_parameters():
            if parameter.requires_grad:
                change = 0.2 * torch.randn(parameter.shape, generator=generator)
                kept = any(part in name for part in AROUND)
                parameter.copy_(parameter + change if kept else change)
        settings.get("trained", lambda live: None)(live)
        live.save_pretrained(out)  # with sorted keys: of patterns that overlap, a reload may see another first
        again = getattr(transformers, architecture).from_pretrained(base)
        tasks = {"task_ids": torch.zeros(1, dtype=torch.long)} if kind is peft.MultitaskPromptTuningConfig else {}
        answer = peft.PeftModel.from_pretrained(again, out).eval()(**given, **tasks).logits.numpy()
        if answer.ndim > 2:  # what PEFT answers at the tokens that it puts before the text
            answer = answer[:, -bare.shape[1] :]
    assert np.abs(answer - bare).max() >= effect * np.abs(answer).max()
    return answer, {name: value.numpy() for name, value in given.items()}


def cell(method: str, family: str, base: Path, folder: Path) -> dict[str, float]:
    """The worst error of the compiled artifact against PEFT's model, as a share of the largest value, by mode."""
    import peltc

    kind, settings = METHODS[method]
    inside = {"feedforward_modules": INSIDE[family]} if kind is peft.IA3Config else {}
    where = WHERE.get(kind, MAPS)[family]
    carried = {"target_modules": where} if "target_modules" in kind.__dataclass_fields__ else {}
    settings = {"kind": kind, **carried, "task_type": TASKS[family], **inside, **settings}
    expected, given = written(family, settings, base, folder / "adapter")
    errors = {}
    for mode in ("fold", "static"):
        peltc.compile(folder / "adapter", base, folder / mode, mode=mode)
        found = peltc.Session(folder / mode, ["CPUExecutionProvider"])(**given)["logits"]
        errors[mode] = float(np.abs(found - expected).max() / np.abs(expected).max())
    return errors


def _figures(method: str, family: str, base: Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return " / ".join(f"{error:.0e}" for error in cell(method, family, base, Path(folder)).values())


def main(only: Iterable[str]) -> None:
    """Measure and write the table."""
    rows = ["| method | " + " | ".join(MAPS) + " |", "|---|" + "---|" * len(MAPS)]
    with tempfile.TemporaryDirectory() as root:
        bases = {family: models.save(family, Path(root) / family) for family in MAPS}  # once: each is exported once
        for method in only or METHODS:
            cells = [WITHOUT.get((method, family)) or _figures(method, family, base) for family, base in bases.items()]
            rows.append(f"| {method} | {' | '.join(cells)} |")
            print(rows[-1], file=sys.stderr)
    told = f"Of version {peft.__version__}, with torch {torch.__version__}, by `python tests/oracles/import_matrix.py`."
    matrix_page.write("Hugging Face PEFT", told, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD")
    main(parser.parse_args().only)
