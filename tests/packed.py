"""Checkpoints as the tools of GPTQ and AWQ write them, from random numbers: a packer by itself, number after number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Array = np.ndarray[Any, Any]
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def in_words(numbers: Array, bits: int, order: tuple[int, ...] | None = None) -> Array:
    """Numbers [a, b] in integers along the second axis, the first in the lowest bits: int32 [a, b / n]."""
    n = 32 // bits
    words = np.zeros((len(numbers), numbers.shape[1] // n), np.uint64)
    for column in range(words.shape[1]):
        for place in range(n):
            number = numbers[:, column * n + (order[place] if order else place)]
            words[:, column] |= number.astype(np.uint64) << np.uint64(bits * place)
    return words.astype(np.uint32).view(np.int32)


def drawn(
    method: str, layout: str, bits: int, group: int, sizes: tuple[int, int], seed: int, mixed: bool = False,
    symmetric: bool = False,
) -> tuple[dict[str, Array], Array]:  # fmt: skip
    """The parts of a packed weight [out, in], and what they stand for, float64.

    Args:
        mixed: groups do not follow each other.
        symmetric: all zero points are the middle.
    """
    random, (n_out, n_in) = np.random.default_rng(seed), sizes
    size = n_in if group == -1 else group
    groups = -(-n_in // size)
    numbers = random.integers(0, 2**bits, (n_in, n_out))
    zeros = np.full((groups, n_out), 2 ** (bits - 1)) if symmetric else random.integers(1, 2**bits, (groups, n_out))
    scales = (random.uniform(0.5, 2, (groups, n_out)) * 0.6 / 2**bits).astype(np.float16)
    index = np.arange(n_in) // size
    index = random.permutation(index) if mixed else index
    weight = np.empty((n_out, n_in))
    for i in range(n_in):
        weight[:, i] = (numbers[i] - zeros[index[i]]) * scales[index[i]].astype(np.float64)
    parts = {"scales": scales}
    if method == "awq":
        return parts | {"qweight": in_words(numbers, bits, AWQ), "qzeros": in_words(zeros, bits, AWQ)}, weight
    held = zeros - (layout == "gptq")
    parts |= {"qweight": np.ascontiguousarray(in_words(numbers.T.copy(), bits).T), "qzeros": in_words(held, bits)}
    return parts | {"g_idx": index.astype(np.int32)}, weight


def checkpoint(
    plain: Path, folder: Path, method: str = "gptq", layout: str = "gptq", bits: int = 4, group: int = 16,
    mixed: bool = False, symmetric: bool = False, **settings: Any,
) -> dict[str, Array]:  # fmt: skip
    """Pack the maps of a Llama's layers, in a copy of its folder; returns what they stand for by name."""
    shutil.copytree(plain, folder)
    tensors = load_file(folder / "model.safetensors")
    wanted: dict[str, Array] = {}
    for seed, name in enumerate(sorted(name for name in tensors if name.endswith("_proj.weight"))):
        stem = name.removesuffix(".weight")
        sizes = tensors.pop(name).shape
        parts, wanted[name] = drawn(method, layout, bits, group, sizes, seed, mixed, symmetric)
        tensors |= {f"{stem}.{end}": part for end, part in parts.items()}
    others = {name: part.astype(np.float16) if part.dtype == np.float32 else part for name, part in tensors.items()}
    save_file(others, folder / "model.safetensors", {"format": "pt"})
    own = {"checkpoint_format" if method == "gptq" else "version": layout}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": bits, "group_size": group, **own, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return wanted
