"""Folders of the `adapters` library, each with what the library computes, and how far the artifact is from that;
`python tests/oracles/adapters_cases.py [--only METHOD ...]` writes the library's part of docs/import-matrix.md.

The library answers from an environment of its own, `make .venv/adapters/.ready`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import matrix_page  # noqa: E402
import models  # noqa: E402

Said = dict[str, Any]
Array = np.ndarray[Any, Any]
PYTHON = Path(os.environ.get("PELTC_ADAPTERS_PYTHON") or HERE.parents[1] / ".venv/adapters/bin/python")
"""An interpreter that has the library."""
PATIENCE = 600
"""Seconds that the library may take for all cases."""
EFFECT = 1e-2
"""How much, at least, an adapter must move the output for the comparison to mean anything."""
FAMILIES = ("bert", "roberta", "gpt2", "llama", "t5")


def config(name: str, *parts: Said, **options: Any) -> Said:
    """A configuration of the library, by the name of its class."""
    return {"class": name, "parts": list(parts), "options": options}


def bottleneck(name: str = "SeqBnConfig", **options: Any) -> Said:
    return config(name, **{"reduction_factor": 4, **options})


def prefix(**options: Any) -> Said:
    return config("PrefixTuningConfig", prefix_length=3, bottleneck_size=8, **options)


def lora(name: str = "LoRAConfig", **options: Any) -> Said:
    return config(name, r=2, alpha=3, **options)


def flexible(kind: str, **options: Any) -> Said:
    """A head of the library's own, by its kind."""
    return {"kind": kind, "options": options}


EVERYWHERE = {"attn_matrices": ["q", "k", "v"], "intermediate_lora": True, "output_lora": True}
METHODS: dict[str, Said] = {
    "Houlsby": bottleneck("DoubleSeqBnConfig"),
    "Pfeiffer": bottleneck(),
    "AdapterPlus": bottleneck("AdapterPlusConfig", stochastic_depth=0.0),
    "parallel": bottleneck("ParBnConfig"),
    "parallel, learned scale": bottleneck("ParBnConfig", scaling="learned"),
    "bottlenecks with gates": bottleneck("DoubleSeqBnConfig", use_gating=True, scaling=2.0),
    "Compacter": bottleneck("CompacterConfig"),
    "Compacter++": bottleneck("CompacterPlusPlusConfig", phm_rank=2),
    "prefix": prefix(),
    "prefix, flat": prefix(flat=True, leave_out=[0]),
    "prompt": config("PromptTuningConfig", prompt_length=2),
    "LoRA": lora(**EVERYWHERE),
    "LoRA with gates": lora(use_gating=True, intermediate_lora=True),
    "DoRA": lora("DoRAConfig", intermediate_lora=True),
    "VeRA": lora("VeraConfig"),
    "(IA)³": config("IA3Config"),
    "(IA)³ with gates": config("IA3Config", use_gating=True),
    "LoReFT": config("LoReftConfig", r=2),
    "NoReFT": config("NoReftConfig", r=2, non_linearity="relu"),
    "MAM": config("MAMConfig", prefix_tuning=prefix(), adapter=bottleneck("ParBnConfig")),
    "UniPELT": config("UniPELTConfig", prefix_tuning=prefix(), adapter=bottleneck(), lora=lora()),
}
SHIFTS = "refused: the library counts the prefix in T5's relative positions"
UNSAVED = "refused: the library does not save what its adapters share there"
NO_PROMPT = "the library has none"
FUSED = "the library has none for fused maps"
WITHOUT: dict[tuple[str, str], str] = {
    **{(method, "t5"): SHIFTS for method in ("prefix", "prefix, flat", "MAM", "UniPELT")},
    **{(method, "t5"): UNSAVED for method in ("Compacter", "Compacter++", "VeRA")},
    **{("prompt", family): NO_PROMPT for family in ("gpt2", "llama", "t5")},
    **{(method, "gpt2"): FUSED for method in ("DoRA", "VeRA")},
    ("VeRA", "llama"): "the library fails on grouped queries",
}
"""What the library has not, or what is refused, with the reason."""
CELLS = [(method, family) for method in METHODS for family in FAMILIES if (method, family) not in WITHOUT]

OTHERS: dict[str, tuple[str, Said, Said]] = {
    # name: the model, the config, and what is said beside
    "a head beside": ("bert", lora(), {"head": True}),
    "a head that nobody trained": ("gpt2", lora(), {"head": True}),
    "a head of the library's own": (
        "bert", bottleneck(), {"architecture": "BertAdapterModel", "head": flexible("classification", num_labels=5)}),
    "one map of the first token's pool": (
        "bert", lora(), {"architecture": "BertAdapterModel",
                         "head": flexible("classification", num_labels=3, layers=1, use_pooler=True)}),
    "a head of the library's own in RoBERTa": (
        "roberta", bottleneck(), {"architecture": "RobertaAdapterModel",
                                  "head": flexible("classification", num_labels=3)}),
    "a head for tokens": (
        "bert", lora(), {"architecture": "BertAdapterModel", "head": flexible("tagging", num_labels=4)}),
    "a head for spans": ("bert", lora(), {"architecture": "BertAdapterModel", "head": flexible("qa")}),
    "the last tokens": ("bert", config("LoReftConfig", r=3, prefix_positions=2, suffix_positions=2), {}),
    "the last tokens alone": ("llama", config("NoReftConfig", r=2, prefix_positions=0, suffix_positions=3), {}),
    "one module for both ends": (
        "llama", config("NoReftConfig", r=2, suffix_positions=2, tied_weights=True, layers=[1]), {}),
    "layers of one stack": ("t5", config("NoReftConfig", r=2, layers=[0, 1]), {}),
    "all tokens are first and last": (
        "gpt2", config("LoReftConfig", r=2, prefix_positions=6, suffix_positions=5), {}),
    "a stack": ("bert", {}, {"setup": {"kind": "Stack", "configs": [
        bottleneck(), bottleneck("DoubleSeqBnConfig", residual_before_ln=False), bottleneck(scaling="learned")]}}),
    "a stack on a model that normalises before": ("llama", {}, {"setup": {"kind": "Stack", "configs": [
        bottleneck("DoubleSeqBnConfig", leave_out=[0]), bottleneck(use_gating=True)]}}),
    "a fusion": ("bert", config("DynamicAdapterFusionConfig"), {"setup": {"kind": "Fuse", "configs": [
        bottleneck(), bottleneck(reduction_factor=8, scaling=2.0), bottleneck(scaling="channel")]}}),
    "a fusion of the residual": ("gpt2", config("DynamicAdapterFusionConfig", residual_before=True), {
        "setup": {"kind": "Fuse", "configs": [bottleneck(), bottleneck()]}, "safe": False}),
    "a fusion without values": ("t5", config("StaticAdapterFusionConfig", query_before_ln=True), {
        "setup": {"kind": "Fuse", "configs": [bottleneck(mh_adapter=True), bottleneck(mh_adapter=True)]}}),
    "torch's own format": ("bert", bottleneck(), {"safe": False}),
    "a width for each layer": ("bert", bottleneck("DoubleSeqBnConfig", reduction_factor={"0": 8, "default": 2}), {}),
    "layers that are left out": ("t5", bottleneck("DoubleSeqBnConfig", leave_out=[1, 2], cross_adapter=True), {}),
    "after attention to the encoder": ("t5", bottleneck("DoubleSeqBnConfig", cross_adapter=True), {}),
    "a factor for each channel": ("gpt2", bottleneck(scaling="channel"), {}),
    "a norm before": ("llama", bottleneck("DoubleSeqBnConfig", ln_before=True), {"safe": False}),
    "a norm after": ("bert", bottleneck("DoubleSeqBnConfig", ln_after=True, scaling=2.5), {}),
    "a norm of the result": ("llama", bottleneck(ln_after=True, adapter_residual_before_ln=True), {}),
    "the residual behind the norm": ("bert", bottleneck(residual_before_ln=False, non_linearity="gelu_new"), {}),
    "the residual behind the sum": ("bert", bottleneck(residual_before_ln="post_add"), {}),
    "the residual of the sum": ("gpt2", bottleneck(residual_before_ln=False, non_linearity="swish"), {}),
    "beside attention, with gates": ("llama", bottleneck("ParBnConfig", mh_adapter=True, use_gating=True), {}),
    "rules of their own": ("bert", bottleneck("CompacterConfig", shared_phm_rule=False, factorized_phm_rule=True), {}),
    "whole weights": ("gpt2", bottleneck("CompacterConfig", factorized_phm_W=False, phm_bias=False), {}),
    "shared weights": ("bert", bottleneck("CompacterConfig", shared_W_phm=True, factorized_phm_rule=True), {}),
    "products with a norm": ("bert", bottleneck("CompacterConfig", ln_before=True), {"safe": False}),
    "a prefix by another network": ("bert", prefix(non_linearity="relu"), {}),
    "two bottlenecks": ("bert", config("ConfigUnion", bottleneck(mh_adapter=True, output_adapter=False),
                                       bottleneck("ParBnConfig")), {}),
    "a fused map in part": ("gpt2", lora(attn_matrices=["k", "v"], use_gating=True), {}),
    "vectors before a non-linearity": ("t5", config("IA3Config", attn_matrices=["q"], output_lora=True), {}),
    "products in both stacks": ("t5", bottleneck("CompacterConfig", shared_phm_rule=False), {}),
    "low rank on a model that has hooks": ("qwen2", lora(**EVERYWHERE), {}),
    "bottlenecks on hooks": ("qwen2", bottleneck(mh_adapter=True), {}),
    "beside hooks": ("qwen2", bottleneck("ParBnConfig"), {}),
    "behind a layer whose sub-layers end in norms": ("gemma2", config("LoReftConfig", r=2), {}),
    "magnitudes with a gate": ("bert", lora("DoRAConfig", use_gating=True), {}),
}  # fmt: skip


def shares(said: Said) -> bool:
    """Whether the library can save a config's tensors in torch's own format only, since several names share them."""
    within = [*said.get("parts", ()), *said.get("options", {}).values()]
    return "Prefix" in said.get("class", "") or any(shares(one) for one in within if isinstance(one, dict))


def write(cases: Mapping[str, tuple[str, Said, Said]], bases: Callable[[str], Path], out: Path) -> None:
    """Have the library save the folders of some cases and answer, each into a folder of its name's place in the order.

    Args:
        bases: the folder of a tiny model by its family.
    """
    request = []
    for number, (family, said, more) in enumerate(cases.values()):
        safe = more.get("safe", True) and not shares(said)
        request.append({"base": str(bases(family)), "out": str(out / str(number)), "config": said, "seed": number,
                        "head": False, **more, "safe": safe})  # fmt: skip
    program = [str(PYTHON), "-I", str(HERE / "adapters_folders.py")]
    done = subprocess.run(program, input=json.dumps(request), text=True, capture_output=True, timeout=PATIENCE,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr


def answers(case: Path) -> tuple[Array, dict[str, Array]]:
    """What the library's model answers, and to what; its adapter matters."""
    given = load_file(case / "answer.safetensors")
    expected, bare = given.pop("answer"), given.pop("bare")
    assert np.abs(expected - bare).max() > EFFECT * np.abs(expected).max()
    return expected, given


def errors(case: Path, base: Path) -> dict[str, float]:
    """The worst error of the artifact against the library's model, as a share of the largest value, by mode."""
    import peltc

    expected, given = answers(case)
    found = {}
    for mode in ("fold", "static"):
        peltc.compile(case / "adapter", base, case / mode, mode=mode, verify=False)
        outputs = peltc.Session(case / mode, ["CPUExecutionProvider"])(**given)
        both = [outputs[name] for name in ("start_logits", "end_logits") if name in outputs]
        answer = np.stack(both) if both else outputs["logits"]
        found[mode] = float(np.abs(answer - expected).max() / np.abs(expected).max())
    return found


def main(only: Iterable[str]) -> None:
    """Measure and write the table."""
    chosen = list(only) or list(METHODS)
    cells = [(method, family) for method, family in CELLS if method in chosen]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def base(family: str) -> Path:
            return models.save(family, root / family)

        write({f"{m}/{f}": (f, METHODS[m], {}) for m, f in cells}, base, root / "cases")
        found = {cell: errors(root / "cases" / str(number), base(cell[1])) for number, cell in enumerate(cells)}
    rows = ["| method | " + " | ".join(FAMILIES) + " |", "|---|" + "---|" * len(FAMILIES)]
    for method in chosen:
        told = [
            " / ".join(f"{e:.0e}" for e in found[method, f].values()) if (method, f) in found else WITHOUT[method, f]
            for f in FAMILIES
        ]
        rows.append(f"| {method} | {' | '.join(told)} |")
    version = (
        next(PYTHON.parents[1].glob("lib/*/site-packages/adapters-*.dist-info"))
        .name.split("-")[1]
        .removesuffix(".dist")
    )
    matrix_page.write(
        "The adapters library", f"Of version {version}, by `python tests/oracles/adapters_cases.py`.", rows
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="METHOD")
    main(parser.parse_args().only)
