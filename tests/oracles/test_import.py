"""Folders that Hugging Face PEFT saves, imported and compiled: the artifact computes what PEFT's model does, folded and
static; and what cannot be imported is refused by name, with nothing written."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from import_matrix import MAPS, METHODS, TASKS, WITHOUT, cell, written
from safetensors.numpy import load_file, save_file

import peltc
from peltc.compiler.importers.importing import import_adapter, imports
from peltc.compiler.importers.peft.methods import FORMATS
from peltc.compiler.importers.peft.targets import targeted
from peltc.runtime.commands.cli import run
from peltc.runtime.verification.verify import TOLERANCE
from peltc.spec.diagnostics import PeltError
from peltc.spec.foreign import IMPORTED

Folder = Callable[..., Path]
QV, SEQ = ["query", "value"], "SEQ_CLS"
UP_DOWN = ["experts.gate_up_proj", "experts.down_proj"]
CAUSAL, PAIR = "CAUSAL_LM", "SEQ_2_SEQ_LM"
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def pruned(live: Any) -> None:
    """What AdaLoRA's schedule leaves: of the first module nothing, of the second the ranks 0 and 2."""
    names = [name for name, _ in live.base_model.model.named_parameters() if ".lora_E." in name]
    masks = [[False] * 4, [True, False, True, False]]
    live.peft_config["default"].rank_pattern = dict(zip(names, masks, strict=False))


@pytest.fixture(autouse=True)
def butterflies(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT takes one factor where it cannot compile its kernel for CUDA, which puts blocks on diagonals: so does
    torch."""
    layer = peft.tuners.boft.layer
    monkeypatch.setattr(layer, "_FBD_CUDA", True)
    stacked = SimpleNamespace(apply=lambda x: torch.stack([torch.block_diag(*blocks) for blocks in x]))
    monkeypatch.setattr(layer, "FastBlockDiag", stacked)


CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    # name: the model, the config, and how many attachments the spec has
    "a list of endings": ("bert", {"target_modules": QV, "r": 4, "lora_alpha": 12, "lora_dropout": 0.1}, 1),
    "a head beside": ("bert", {"target_modules": QV, "task_type": SEQ, "modules_to_save": ["classifier"]}, 2),
    "all linear maps": ("bert", {"target_modules": "all-linear", "task_type": SEQ, "use_rslora": True}, 2),
    "a fused map": ("gpt2", {"target_modules": ["c_attn"], "task_type": CAUSAL, "fan_in_fan_out": True}, 1),
    "a fused map with DoRA": (
        "gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}, 1),
    "patterns that overlap": (
        "llama", {"target_modules": ["q_proj", "k_proj", "down_proj"], "task_type": CAUSAL,
                  "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 2},
                  "alpha_pattern": {"self_attn.k_proj": 5, "k_proj": 64}}, 4),
    "DoRA with patterns": (
        "llama", {"target_modules": "all-linear", "use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 3},
                  "task_type": CAUSAL}, 2),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, 1),
    "what is left out": ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*0.*k_proj"}, 2),
    "an expression": ("t5", {"target_modules": r".*decoder.*EncDec.*\.(q|k)", "task_type": PAIR}, 1),
    "vectors": ("bert", {"kind": peft.IA3Config, "target_modules": ["key", "value", "output.dense"],
                         "feedforward_modules": ["output.dense"]}, 2),
    "vectors on a fused map": ("gpt2", {"kind": peft.IA3Config, "target_modules": ["c_attn", "mlp.c_proj"],
                                        "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True}, 2),
    "vectors of two stacks": ("t5", {"kind": peft.IA3Config, "target_modules": ["k", "v", "wo"],
                                     "feedforward_modules": ["wo"], "task_type": PAIR}, 2),
    "products of products": ("bert", {"kind": peft.LoHaConfig, "target_modules": QV, "r": 3, "alpha": 7}, 1),
    "products with patterns": ("llama", {"kind": peft.LoHaConfig, "target_modules": ["q_proj", "up_proj"],
                                         "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 5}}, 2),
    "rotations": ("llama", {"kind": peft.OFTConfig, "target_modules": ["q_proj", "down_proj"], "oft_block_size": 8}, 1),
    "exact rotations": ("bert", {"kind": peft.OFTConfig, "target_modules": QV, "oft_block_size": 4,
                                 "use_cayley_neumann": False}, 1),
    "experts": ("qwen3_moe", {"target_modules": [], "target_parameters": UP_DOWN, "r": 3, "lora_alpha": 5}, 1),
    "experts and attention": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": UP_DOWN, "r": 4,
                                          "rank_pattern": {"experts.down_proj": 2}, "use_rslora": False,
                                          "alpha_pattern": {"gate_up_proj": 3}}, 3),
    "experts stored the other way round": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": UP_DOWN,
                                                       "use_rslora": True}, 1),
    "one of the experts' parameters": ("mixtral", {"target_modules": [], "target_parameters": ["down_proj"]}, 1),
    "experts of one layer": ("gpt_oss", {"target_modules": [], "target_parameters": [
        "layers.1.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"]}, 2),
    "a router": ("mixtral", {"target_modules": ["v_proj"], "target_parameters": ["mlp.gate.weight"]}, 1),
    "singular values": ("bert", {"kind": peft.AdaLoraConfig, "target_modules": QV, "init_r": 4,
                                 "lora_alpha": 12, "r": 2, "total_step": 9, "lora_dropout": 0.1,
                                 "use_rslora": True}, 1),
    "ranks that were pruned": ("llama", {"kind": peft.AdaLoraConfig, "target_modules": ["q_proj", "k_proj"],
                                         "init_r": 4, "lora_alpha": 12, "total_step": 9, "trained": pruned}, 3),
    "an alpha of its ranks": ("gpt2", {"kind": peft.AdaLoraConfig, "target_modules": ["c_attn"], "init_r": 4,
                                           "lora_alpha": 0, "total_step": 9, "fan_in_fan_out": True,
                                           "trained": pruned}, 2),
    "Kronecker products": ("bert", {"kind": peft.LoKrConfig, "target_modules": [*QV, "output.dense"], "r": 2,
                                    "alpha": 7, "rank_dropout": 0.1, "rank_dropout_scale": True,
                                    "module_dropout": 0.1}, 2),
    "both factors of low rank": ("llama", {"kind": peft.LoKrConfig, "target_modules": ["q_proj", "up_proj"], "r": 1,
                                           "alpha": 3, "decompose_both": True}, 2),
    "a full large factor": ("bert", {"kind": peft.LoKrConfig, "target_modules": QV, "r": 8, "alpha": 4,
                                     "rank_pattern": {"value": 5}, "alpha_pattern": {"value": 9}}, 2),
    "uneven factors": ("t5", {"kind": peft.LoKrConfig, "target_modules": ["q", "wi"], "r": 3, "alpha": 5,
                              "decompose_factor": 2, "task_type": PAIR}, 1),
    "Kronecker products on fused maps": ("phi3", {"kind": peft.LoKrConfig, "r": 2, "alpha": 7,
                                                  "target_modules": ["qkv_proj", "gate_up_proj"]}, 2),
    "random matrices": ("llama", {"kind": peft.VeraConfig, "target_modules": ["q_proj", "v_proj", "down_proj"], "r": 6,
                                  "vera_dropout": 0.1}, 1),
    "random matrices on fused maps": ("phi3", {"kind": peft.VeraConfig, "target_modules": ["qkv_proj", "down_proj"],
                                               "r": 6}, 4),
    "random matrices in some layers": ("gpt2", {"kind": peft.VeraConfig, "target_modules": ["c_attn", "c_fc"], "r": 6,
                                                "layers_to_transform": [1], "fan_in_fan_out": True}, 4),
    "so many blocks": ("bert", {"kind": peft.BOFTConfig, "target_modules": QV, "boft_block_size": 0,
                                "boft_block_num": 2, "boft_dropout": 0.1}, 1),
    "blocks that differ": ("llama", {"kind": peft.BOFTConfig, "target_modules": ["q_proj", "down_proj"],
                                     "boft_block_size": 0, "boft_block_num": 4}, 2),
    "butterflies": ("llama", {"kind": peft.BOFTConfig, "target_modules": ["q_proj", "down_proj"], "boft_block_size": 4,
                              "boft_n_butterfly_factor": 2}, 1),
    "butterflies of three factors": ("phi3", {"kind": peft.BOFTConfig, "target_modules": ["qkv_proj", "down_proj"],
                                              "boft_block_size": 2, "boft_n_butterfly_factor": 4}, 1),
    "reflections": ("bert", {"kind": peft.HRAConfig, "target_modules": [*QV, "output.dense"], "r": 7}, 1),
    "orthogonal directions": ("phi3", {"kind": peft.HRAConfig, "target_modules": ["qkv_proj", "down_proj"], "r": 6,
                                       "apply_GS": True}, 1),
    "reflections on fused maps": ("phi3", {"kind": peft.HRAConfig, "target_modules": ["gate_up_proj"], "r": 1}, 1),
    "shards": ("bert", {"kind": peft.MissConfig, "target_modules": QV, "r": 8, "miss_dropout": 0.1}, 1),
    "uneven shards on fused maps": ("phi3", {"kind": peft.MissConfig, "target_modules": ["qkv_proj", "down_proj"],
                                             "r": 7}, 1),
    "blocks of the weight": ("llama", {"kind": peft.MissConfig, "target_modules": ["q_proj", "v_proj", "down_proj"],
                                       "r": 8, "init_weights": "bat"}, 1),
    "blocks of a fused weight": ("phi3", {"kind": peft.MissConfig, "target_modules": ["qkv_proj"], "r": 4,
                                          "init_weights": "bat"}, 1),
    "columns that repeat": ("t5", {"kind": peft.MissConfig, "target_modules": ["q", "wo"], "r": 5, "mini_r": 8,
                                   "init_weights": "mini", "task_type": PAIR}, 1),
    "columns that repeat on a fused map": ("phi3", {"kind": peft.MissConfig, "target_modules": ["qkv_proj"], "r": 5,
                                                    "mini_r": 8, "init_weights": "mini"}, 1),
    "products with the weight": ("gpt2", {"kind": peft.HiraConfig, "target_modules": ["c_attn", "mlp.c_proj"], "r": 4,
                                          "hira_dropout": 0.1, "fan_in_fan_out": True,
                                          "rank_pattern": {"c_proj": 2}}, 1),
    "biases": ("phi3", {"kind": peft.BeftConfig, "target_modules": ["qkv_proj", "o_proj"]}, 1),
    "all norms": ("bert", {"kind": peft.LNTuningConfig, "target_modules": ["LayerNorm"], "task_type": SEQ,
                           "modules_to_save": ["classifier"]}, 2),
    "the norms of one layer": ("llama", {"kind": peft.LNTuningConfig, "target_modules": r".*1\.input_layernorm"}, 1),
    "one of two last norms": ("t5", {"kind": peft.LNTuningConfig, "target_modules": r"encoder\.final.*",
                                     "task_type": PAIR}, 1),
    "tokens of a tied table": ("llama-tied", {"kind": peft.TrainableTokensConfig, "token_indices": [7, 3, 4, 5]}, 1),
    "outputs of a tied head": ("llama-tied", {"kind": peft.TrainableTokensConfig, "token_indices": [50, 4],
                                              "target_modules": ["lm_head"]}, 1),
    "tokens and outputs": ("llama", {"kind": peft.TrainableTokensConfig, "token_indices": [5, 4],
                                     "target_modules": ["embed_tokens", "lm_head"]}, 1),
    "positions": ("gpt2", {"kind": peft.TrainableTokensConfig, "token_indices": [1, 0], "target_modules": ["wpe"]}, 1),
    "random matrices and all biases": ("bert", {"kind": peft.VeraConfig, "target_modules": QV, "r": 4, "bias": "all",
                                                "task_type": SEQ}, 5),
    "blocks and their biases": ("bert", {"kind": peft.BOFTConfig, "target_modules": QV, "boft_block_size": 8,
                                         "bias": "boft_only"}, 2),
    "shards and their biases": ("bert", {"kind": peft.MissConfig, "target_modules": QV, "r": 8,
                                         "bias": "MiSS_only"}, 2),
    "singular values and rows of a table": (
        "llama", {"kind": peft.AdaLoraConfig, "target_modules": ["q_proj"], "init_r": 4, "total_step": 9,
                  "trainable_token_indices": [3, 5, 7]}, 2),
    "products with a table": ("llama", {"kind": peft.HiraConfig, "target_modules": ["embed_tokens", "q_proj"],
                                        "r": 3}, 1),
    "frequencies by a pattern": (
        "llama", {"kind": peft.FourierFTConfig, "target_modules": ["q_proj", "up_proj"], "n_frequency": 30,
                  "n_frequency_pattern": {"up_proj": 50}, "random_loc_seed": 2**33 + 1, "scaling": 20.0}, 2),
    "frequencies of a fused map": ("gpt2", {"kind": peft.FourierFTConfig, "target_modules": ["c_attn"],
                                            "n_frequency": 90, "fan_in_fan_out": True}, 3),
    "an angle for each pair": ("bert", {"kind": peft.RoadConfig, "target_modules": QV, "group_size": 4}, 1),
    "four angles for each pair": ("llama", {"kind": peft.RoadConfig, "target_modules": ["v_proj", "up_proj"],
                                            "variant": "road_4", "group_size": 16}, 1),
    "circulant blocks by a pattern": ("bert", {"kind": peft.C3AConfig, "target_modules": ["query", "output.dense"],
                                               "block_size": 16, "block_size_pattern": {"query": 4}}, 2),
    "strengths by a pattern": ("llama", {"kind": peft.DeloraConfig, "target_modules": ["q_proj", "up_proj"], "r": 3,
                                         "lambda_pattern": {"up_proj": 4}, "rank_pattern": {"q_proj": 2}}, 2),
    "a fine grid": ("t5", {"kind": peft.GraloraConfig, "target_modules": ["q", "wi"], "r": 8, "gralora_k": 4,
                           "task_type": PAIR}, 1),
    "a grid on a fused map": ("gpt2", {"kind": peft.GraloraConfig, "target_modules": ["c_attn", "c_fc"], "r": 4,
                                       "gralora_k": 4, "fan_in_fan_out": True}, 4),
    "the largest few of a bank": (
        "bert", {"kind": peft.VBLoRAConfig, "target_modules": QV, "num_vectors": 20, "vector_length": 8, "topk": 3,
                 "save_only_topk_weights": True}, 1),
    "sparse bases": ("bert", {"kind": peft.RandLoraConfig, "target_modules": ["query", "intermediate.dense"],
                              "r": 7, "sparse": True, "randlora_alpha": 3}, 1),
    "very sparse bases": ("llama", {"kind": peft.RandLoraConfig, "target_modules": ["k_proj", "down_proj"], "r": 4,
                                    "very_sparse": True, "randlora_alpha": 3}, 1),
    "paths that are vectors": ("bert", {"kind": peft.GloraConfig, "target_modules": QV, "config_A_B": "vector",
                                        "config_C": "vector", "config_D_E": "vector"}, 1),
    "paths that are constants": ("bert", {"kind": peft.GloraConfig, "target_modules": QV, "config_A_B": "constant",
                                          "config_C": "none", "config_D_E": "constant"}, 1),
    "paths of the bias alone": ("bert", {"kind": peft.GloraConfig, "target_modules": QV, "config_A_B": "none",
                                         "config_D_E": "none"}, 1),
    "coefficients without a wavelet": (
        "llama", {"kind": peft.WaveFTConfig, "target_modules": ["q_proj", "up_proj"], "n_frequency": 40,
                  "n_frequency_pattern": {"q_proj": 9}, "use_idwt": False, "random_loc_seed": 0}, 2),
    "a bias of B": ("bert", {"target_modules": [*QV, "output.dense"], "lora_bias": True, "r": 4}, 1),
    "a fused map with a bias of B": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}, 1),
    "all biases": ("bert", {"target_modules": QV, "bias": "all", "task_type": SEQ}, 5),
    "biases of its modules": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only", "task_type": CAUSAL}, 2),
    "vectors and norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, 2),
    "a table": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 3, "task_type": CAUSAL}, 1),
    "a table that is a head as well": ("gpt2", {"target_modules": ["wte", "c_fc"], "task_type": CAUSAL}, 1),
    "a table and a head as wholes": (
        "llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"],
                  "task_type": CAUSAL}, 2),
    "a table as a whole": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "task_type": CAUSAL}, 2),
    "rows of a table": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 7]}, 2),
    "rows of a table that is a head as well": (
        "gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [4, 6]}, "task_type": CAUSAL}, 2),
    "both stacks": ("t5", {"target_modules": ["q", "wo"], "task_type": PAIR, "layers_to_transform": 1}, 1),
}  # fmt: skip


@pytest.fixture
def adapter(model_folder: Folder, tmp_path: Path) -> Path:
    written("bert", {"target_modules": QV, "task_type": SEQ, "modules_to_save": ["classifier"]}, model_folder("bert"),
            tmp_path / "adapter")  # fmt: skip
    return tmp_path / "adapter"


@pytest.mark.parametrize("case", CASES)
def test_what_is_compiled_is_what_peft_computes(case: str, model_folder: Folder, tmp_path: Path) -> None:
    family, settings, attachments = CASES[case]
    base = model_folder(family)
    expected, given = written(family, settings, base, tmp_path / "adapter")
    assert imports(tmp_path / "adapter")
    assert run(["import", str(tmp_path / "adapter"), str(base), "-o", str(tmp_path / "spec"), "-q"]) == 0
    assert len(peltc.load_spec(tmp_path / "spec/spec.yaml").attach) == attachments
    for mode in ("fold", "static"):
        out = tmp_path / mode
        peltc.compile(tmp_path / "spec/spec.yaml", base, out, mode=mode)
        found = peltc.Session(out, ["CPUExecutionProvider"])(**given)["logits"]
        assert np.abs(found - expected).max() < TOLERANCE["float32"] * np.abs(expected).max()


@pytest.mark.parametrize(("method", "family"), [(m, f) for m in METHODS for f in MAPS if (m, f) not in WITHOUT])
def test_the_matrix(method: str, family: str, model_folder: Folder, tmp_path: Path) -> None:
    """Every imported method on every architecture; what PEFT itself has not is listed with the reason."""
    assert max(cell(method, family, model_folder(family), tmp_path).values()) < TOLERANCE["float32"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3_moe", "t5"])
@pytest.mark.parametrize("method", ["prefix tuning", "prompt tuning"])
def test_what_is_generated_is_what_peft_generates(
    method: str, family: str, model_folder: Folder, tmp_path: Path
) -> None:
    """Greedily, behind texts without padding: PEFT counts padding as positions when it generates behind a prompt."""
    kind, settings = METHODS[method]
    written(family, {"kind": kind, "task_type": TASKS[family], **settings}, model_folder(family), tmp_path / "adapter")
    peltc.compile(tmp_path / "adapter", model_folder(family), tmp_path / "out", generation=True)
    base = peft.AutoPeftModelForSeq2SeqLM if family == "t5" else peft.AutoPeftModelForCausalLM
    live: Any = base.from_pretrained(tmp_path / "adapter").eval()
    live.generation_config.eos_token_id = live.base_model.generation_config.eos_token_id = None
    texts = torch.randint(3, 90, (3, 6), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": texts, "attention_mask": torch.ones_like(texts), "max_new_tokens": 10, "do_sample": False,
             "output_logits": True, "return_dict_in_generate": True}  # fmt: skip
    given |= {"decoder_start_token_id": 1} if family == "t5" else {}
    expected = live.generate(**given)
    found = peltc.Session(tmp_path / "out", ["CPUExecutionProvider"]).generate(**given, eos_token_id=None)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert (ours - theirs).abs().max() < TOLERANCE["float32"] * theirs.abs().max()


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("multitask prompt tuning", {"num_tasks": 2}, "E431 'num_tasks' is 2: which of its tasks"),
        (
            "multitask prompt tuning",
            {"num_transformer_submodules": 2},
            "E431 'num_transformer_submodules' is 2: PEFT puts",
        ),
        ("multitask prompt tuning", {"peft_type": "PROMPT_TUNING"}, "E4.. "),
        ("prompt tuning", {"num_virtual_tokens": 5}, r"E433 'P' of 'PROMPT_TUNING' has the shape \[4, 32\]"),
        ("prompt tuning", {"num_virtual_tokens": 0}, "E430 'num_virtual_tokens' is 0"),
        ("prompt tuning", {"peft_type": "MULTITASK_PROMPT_TUNING"}, "E433 the file has no tensor 'prefix_task_"),
        ("prefix tuning", {"num_layers": 1}, "E433 'K' of 'PREFIX_TUNING' "),
        ("prefix tuning", {"num_layers": 3}, "E433 'K' of 'PREFIX_TUNING' is missing"),
        ("prefix tuning", {"num_virtual_tokens": 3}, r"E433 'K' of 'PREFIX_TUNING' has the shape \[2, 4, 8\]"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(
    method: str, change: dict[str, Any], words: str, model_folder: Folder, tmp_path: Path
) -> None:
    kind, settings = METHODS[method]
    written("llama", {"kind": kind, "task_type": CAUSAL, **settings}, model_folder("llama"), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(PeltError, match=words):
        import_adapter(tmp_path / "adapter", model_folder("llama"))


@pytest.mark.parametrize("method", ["prefix tuning", "multitask prompt tuning"])
def test_prompts_that_are_broken_raise_nothing_else(method: str, model_folder: Folder, tmp_path: Path) -> None:
    kind, settings = METHODS[method]
    base, refused = model_folder("llama"), 0
    written("llama", {"kind": kind, "task_type": CAUSAL, **settings}, base, tmp_path / "adapter")
    for folder in mutations(tmp_path / "adapter", tmp_path / "mutant", 150):
        try:
            import_adapter(folder, base)
        except PeltError:
            refused += 1
    assert refused > 30


def test_one_command_from_the_folder_to_the_artifact(adapter: Path, model_folder: Folder, tmp_path: Path) -> None:
    """The base is the one that the adapter names, where none is given."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(model_folder("bert"))})
    )
    assert run(["compile", str(adapter), "-o", str(tmp_path / "named"), "-q"]) == 0
    assert run(["compile", str(adapter), str(model_folder("bert")), "-o", str(tmp_path / "given"), "-q"]) == 0
    given = {"input_ids": [[5, 6, 7]]}
    first, second = (
        peltc.Session(tmp_path / n, ["CPUExecutionProvider"])(**given)["logits"] for n in ("named", "given")
    )
    assert np.array_equal(first, second)


def test_a_checkpoint_without_the_head(adapter: Path, tmp_path: Path, model_folder: Folder) -> None:
    """As bases are published: the class follows from the task, the labels from the head in the file."""
    whole = transformers.BertForSequenceClassification.from_pretrained(model_folder("bert"))
    whole.bert.save_pretrained(tmp_path / "headless")
    found = import_adapter(adapter, tmp_path / "headless")
    assert found.content["model"] == {"architecture": "BertForSequenceClassification", "labels": 2}
    peltc.compile(adapter, tmp_path / "headless", tmp_path / "out")


def test_an_adapter_that_was_saved_on_an_inner_model(tmp_path: Path, model_folder: Folder) -> None:
    """Its names lack the model's own first name; exactly one reading fits."""
    whole = transformers.BertForSequenceClassification.from_pretrained(model_folder("bert"))
    live = peft.get_peft_model(whole.bert, peft.LoraConfig(target_modules=QV))
    live.save_pretrained(tmp_path / "inner")
    assert any(
        name.startswith("base_model.model.encoder.") for name in load_file(tmp_path / "inner/adapter_model.safetensors")
    )
    found = import_adapter(tmp_path / "inner", model_folder("bert"))
    assert found.content["attach"][0]["at"] == ["attention.query", "attention.value"]


def test_every_tensor_is_in_the_spec_bit_by_bit(adapter: Path, model_folder: Folder) -> None:
    theirs = load_file(adapter / "adapter_model.safetensors")
    ours = import_adapter(adapter, model_folder("bert")).tensors
    assert sorted(array.tobytes() for array in theirs.values()) == sorted(array.tobytes() for array in ours.values())


KEYS = {
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 1]], "alora_invocation_tokens": [1], "kasa_config": {"a": 1}, "a_key_of_tomorrow": 3,
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_keys_that_change_the_function_are_refused_by_name(key: str, adapter: Path, model_folder: Folder) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: KEYS[key]}))
    with pytest.raises(PeltError, match=f"E431 '{key}' is "):
        import_adapter(adapter, model_folder("bert"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_modules": [*QV, "dense"]}, "E432 the adapter has no tensors of 7 modules"),
        ({"target_modules": ["query"]}, "E432 the adapter has tensors of, and its config does not mean, 2 modules"),
        ({"modules_to_save": ["classifier", "pooler"]}, "E432 the adapter has no tensors of 'pooler'"),
        ({"r": 2}, r"E433 'A' of '.*' has the shape \[8, 32\]"),
        ({"target_parameters": ["experts.up"]}, "E432 the adapter's config means parameters that the model does not"),
        ({"target_parameters": ["value.bias"]}, "E432 the adapter has no tensors of 2 modules"),
        ({"peft_type": "POLY"}, "E431 adapters of PEFT's method POLY are not imported yet"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], words: str, adapter: Path, model_folder: Folder) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(PeltError, match=words):
        import_adapter(adapter, model_folder("bert"))


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    # name: the model, the settings, what is changed in the config, and what is said
    "random matrices that were not saved": (
        "bert", {"kind": peft.VeraConfig, "target_modules": QV, "r": 4, "save_projection": False}, {},
        "E431 'save_projection' is False(.|\n)*save it again with `save_projection=True`"),
    "random matrices of another rank": (
        "bert", {"kind": peft.VeraConfig, "target_modules": QV, "r": 4}, {"r": 3}, r"E433 '.*' of '.*' has the shape"),
    "blocks that a fused map's parts cut": (
        "phi3", {"kind": peft.LoKrConfig, "target_modules": ["qkv_proj"], "r": 4, "decompose_factor": 2}, {},
        "E431 decoder.layers.0.attention.key is a part of a fused map, and the Kronecker product"),
    "blocks of rows that a fused map's parts cut": (
        "phi3", {"kind": peft.MissConfig, "target_modules": ["qkv_proj"], "r": 32, "init_weights": "bat"}, {},
        "E431 decoder.layers.0.attention.key is a part of a fused map, and the blocks of 32 rows"),
    "columns that a fused map's parts cut": (
        "phi3", {"kind": peft.MissConfig, "target_modules": ["qkv_proj"], "r": 4, "mini_r": 32, "init_weights": "mini"},
        {}, "E431 decoder.layers.0.attention.key is a part of a fused map, and the blocks of 32 rows"),
    "ranks that are not left": (
        "bert", {"kind": peft.AdaLoraConfig, "target_modules": QV, "init_r": 4, "total_step": 9},
        {"rank_pattern": {"bert.encoder.layer.0.attention.self.query.lora_E": [True, False, True, True]}},
        r"E433 'A' of 'bert.encoder.layer.0.attention.self.query' has the shape \[4, 32\]"),
    "other rows": ("bert", {"kind": peft.TrainableTokensConfig, "token_indices": [3, 4]}, {"token_indices": [3, 4, 5]},
                   r"E433 'values' of '.*' has the shape \[2, 32\]"),
    "rows that the table lacks": (
        "bert", {"kind": peft.TrainableTokensConfig, "token_indices": [3, 4]}, {"token_indices": [3, 100]},
        "no index 100"),
    "a row twice": ("bert", {"kind": peft.TrainableTokensConfig, "token_indices": [3, 4]}, {"token_indices": [3, 3]},
                    "E430 'token_indices'"),
    "a tied head with a bias": ("bert-lm", {"kind": peft.TrainableTokensConfig, "token_indices": [3, 4]}, {},
                                "E431 PEFT leaves out the bias 'cls.predictions.decoder.bias'"),
    "maps among the norms": ("bert", {"kind": peft.LNTuningConfig, "target_modules": ["query"]}, {},
                             "E432 .*'bert.encoder.layer.0.attention.self.query'"),
    "norms that are not there": ("bert", {"kind": peft.LNTuningConfig, "target_modules": ["output.LayerNorm"]},
                                 {"target_modules": ["LayerNorm"]}, "E432 the adapter has no tensors of 1 modules"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_method_cannot_say_is_refused(case: str, model_folder: Folder, tmp_path: Path) -> None:
    family, settings, change, words = REFUSED[case]
    written(family, settings, model_folder(family), tmp_path / "adapter", effect=0)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(PeltError, match=words):
        import_adapter(tmp_path / "adapter", model_folder(family))


def test_copies_of_what_is_tied_must_agree(model_folder: Folder, tmp_path: Path) -> None:
    """PEFT writes the rows of a table once more for the head, and reads whichever comes last."""
    settings = {"kind": peft.TrainableTokensConfig, "token_indices": [3, 4]}
    written("llama-tied", settings, model_folder("llama-tied"), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    assert len(tensors) == 2
    save_file({name: array + ("lm_head" in name) for name, array in tensors.items()}, file)
    with pytest.raises(PeltError, match=r"E433 'lm_head' and 'model.embed_tokens' are one tensor in the model"):
        import_adapter(tmp_path / "adapter", model_folder("llama-tied"))
    save_file({name: array for name, array in tensors.items() if "lm_head" not in name}, file)
    assert import_adapter(tmp_path / "adapter", model_folder("llama-tied")).content["attach"][0]["tied"] == "together"


@pytest.mark.parametrize(("method", "family"), WITHOUT)
def test_what_peft_has_not(method: str, family: str, model_folder: Folder, tmp_path: Path) -> None:
    """The gaps in the matrix are PEFT's own."""
    words = "Conv1D" if "Conv1D" in WITHOUT[method, family] else ""
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        cell(method, family, model_folder(family), tmp_path)
    assert not isinstance(caught.value, PeltError)


@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"]])
def test_a_vocabulary_that_has_grown(saved: list[str] | None, model_folder: Folder, tmp_path: Path) -> None:
    """Tokens were added before training: the file holds table and head, with more rows than the base has."""
    base = model_folder("llama")

    def grown() -> Any:
        model = transformers.LlamaForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(107, mean_resizing=False)
        return model

    settings = {"target_modules": ["q_proj"], "modules_to_save": saved, "task_type": CAUSAL}
    live = peft.get_peft_model(grown(), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    live.save_pretrained(tmp_path / "adapter")
    given = {"input_ids": torch.arange(97, 106)[None]}
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(grown(), tmp_path / "adapter").eval()(**given).logits.numpy()
    found = import_adapter(tmp_path / "adapter", base)
    assert found.content["model"]["vocabulary"] == 107
    for mode in ("fold", "static"):
        peltc.compile(tmp_path / "adapter", base, tmp_path / mode, mode=mode)
        ours = peltc.Session(tmp_path / mode, ["CPUExecutionProvider"])(input_ids=given["input_ids"].numpy())["logits"]
        assert np.abs(ours - expected).max() < TOLERANCE["float32"] * np.abs(expected).max()


def test_a_head_that_follows_in_training_alone_is_refused(model_folder: Folder, tmp_path: Path) -> None:
    settings = {"target_modules": ["wte"], "task_type": CAUSAL, "ensure_weight_tying": True}
    written("gpt2", settings, model_folder("gpt2"), tmp_path / "tied")
    with pytest.raises(PeltError, match="E431 'ensure_weight_tying' is True"):
        import_adapter(tmp_path / "tied", model_folder("gpt2"))


def test_another_model_is_refused(adapter: Path, model_folder: Folder) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": None}))
    with pytest.raises(PeltError, match="E432 5 of the adapter's 5 modules are not in the GPT2"):
        import_adapter(adapter, model_folder("gpt2"))


def mutations(
    folder: Path, out: Path, count: int, file: str = "adapter_model.safetensors", within: tuple[str, ...] = ()
) -> Iterator[Path]:
    """Copies of a folder with bytes, keys or tensors changed.

    Args:
        file: the tensors' file.
        within: keys of the config that are configs themselves, whose keys are changed as well.
    """
    draw = random.Random(0)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / file)
    values = [None, True, -1, 2**70, "x", "../../etc", [], {}, [1], {"a": 1}, [[[]]], "(((", 1.5, "\0"]
    for _ in range(count):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder, out)
        kind = draw.choice(["config", "bytes", "cut", "tensors", "json"])
        if kind == "config":
            changed = json.loads(json.dumps(config))
            for where in [changed, *(changed[key] for key in within)]:
                for key in draw.sample(sorted(where), 2):
                    where[key] = draw.choice(values)
            (out / "adapter_config.json").write_text(json.dumps(changed))
        elif kind == "json":
            text = (folder / "adapter_config.json").read_bytes()
            place = draw.randrange(len(text))
            (out / "adapter_config.json").write_bytes(text[:place] + bytes([draw.randrange(256)]) + text[place + 1 :])
        elif kind == "tensors":
            changed = dict(tensors)
            name = draw.choice(sorted(changed))
            array = changed.pop(name)
            if draw.random() < 0.7:
                changed[draw.choice([name, name + "/../x", "", name.replace("query", "key")])] = draw.choice(
                    [array, array.T, array[:1], array.astype(np.int64), np.full_like(array, np.nan)])  # fmt: skip
            save_file({n: np.ascontiguousarray(a) for n, a in changed.items()}, out / file)
        else:
            data = bytearray((folder / file).read_bytes())
            if kind == "cut":
                data = data[: draw.randrange(len(data))]
            for _ in range(draw.randrange(1, 4) if kind == "bytes" else 0):
                data[draw.randrange(min(len(data), 2000))] = draw.randrange(256)
            (out / file).write_bytes(data)
        yield out


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_folders_that_are_broken_raise_nothing_else(
    count: int, adapter: Path, model_folder: Folder, tmp_path: Path
) -> None:
    base, refused = model_folder("bert"), 0
    for folder in mutations(adapter, tmp_path / "mutant", count):
        try:
            import_adapter(folder, base)
        except PeltError:
            refused += 1
    assert refused > count / 3


def test_weights_beside_an_adapter_are_refused(adapter: Path, model_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(PeltError, match="E410 an adapter's folder is given as the spec, and weights beside"):
        peltc.compile(adapter, model_folder("bert"), tmp_path / "out", {})


def test_importing_on_a_known_base_imports_no_torch(adapter: Path, model_folder: Folder, tmp_path: Path) -> None:
    import_adapter(adapter, model_folder("bert"))
    program = (
        "import sys; from peltc.runtime.commands.cli import run;"
        f"code = run(['import', {str(adapter)!r}, {str(model_folder('bert'))!r}, '-o', {str(tmp_path / 'spec')!r}]);"
        "print(code, sorted({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 []\n"), done.stdout + done.stderr


def test_what_hints_say_is_imported_is() -> None:
    assert set(FORMATS) <= set(IMPORTED) <= {*FORMATS, "DORA"}


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "layers.0.mlp.up_proj"]},
        {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"], "layers_to_transform": [0]},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
        {"target_modules": r".*\.1\..*_proj", "exclude_modules": r".*down.*"},
        {"target_modules": ["up_proj"], "layers_to_transform": 1, "layers_pattern": ["layers"]},
    ],
)
def test_the_matcher_is_pefts(settings: dict[str, Any], model_folder: Folder) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(model_folder("llama"))
    maps = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    live: Any = peft.get_peft_model(model, peft.LoraConfig(task_type=CAUSAL, **settings))
    assert sorted(targeted(settings, maps, ["lm_head"])) == sorted(live.base_model.targeted_module_names)


def test_a_spec_of_ones_own_is_not_overwritten(
    adapter: Path, model_folder: Folder, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "spec").mkdir()
    (tmp_path / "spec/spec.yaml").write_text("pelt: 1\n")
    arguments = ["import", str(adapter), str(model_folder("bert")), "-o", str(tmp_path / "spec"), "-q"]
    assert run(arguments) == 1 and "E601 the folder holds a spec that was not imported" in capsys.readouterr().err
    (tmp_path / "spec/spec.yaml").unlink()
    assert run(arguments) == 0 and run(arguments) == 0


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)+b", ".*.*.*.*.*.*.*x", r"(a*)\1", "(((", "a{1,9999999999999}"])
def test_expressions_that_take_forever_are_refused(pattern: str, adapter: Path, model_folder: Folder) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": pattern}))
    with pytest.raises(PeltError, match="E430 the expression"):
        import_adapter(adapter, model_folder("bert"))


def test_expressions_of_other_trainers_are_read() -> None:
    """As Unsloth writes them for towers and layers, and LLaMA-Factory for all modules of a tower."""
    unsloth = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|k_proj|v_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
    )
    assert targeted({"target_modules": unsloth}, ["model.layers.10.self_attn.q_proj", "model.layers.0.mlp.up"], []) == [
        "model.layers.10.self_attn.q_proj"]  # fmt: skip
