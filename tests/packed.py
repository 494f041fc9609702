"""Checkpoints as the tools of GPTQ, AWQ and bitsandbytes write them, from random numbers: packers by themselves, number
after number."""

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


NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip


def levelled(sizes: tuple[int, int], block: int, seed: int, nested: bool = True) -> tuple[dict[str, Array], Array]:
    """The parts of a weight [out, in] in NF4, by what follows its name, and what they stand for."""
    random, count = np.random.default_rng(seed), sizes[0] * sizes[1]
    numbers, blocks = random.integers(0, 16, count), -(-count // block)
    packed = np.array([numbers[i] * 16 + numbers[i + 1] for i in range(0, count, 2)], np.uint8)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "float16", "shape": list(sizes)}
    scales: Array = random.uniform(0.1, 0.3, blocks).astype(np.float32)
    parts = {"": packed.reshape(-1, 1), ".quant_map": NF4, ".absmax": scales}
    if nested:
        levels = random.uniform(-1, 1, 256).astype(np.float32)
        second = random.uniform(0.01, 0.1, -(-blocks // 8)).astype(np.float32)
        codes = random.integers(0, 256, blocks).astype(np.uint8)
        offset = 0.2
        scales = np.array([levels[code] * second[i // 8] + np.float32(offset) for i, code in enumerate(codes)])
        parts |= {".absmax": codes, ".nested_absmax": second, ".nested_quant_map": levels}
        state |= {"nested_blocksize": 8, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(state).encode()
    parts[".quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
    wanted = np.array([NF4[number] * scales[i // block] for i, number in enumerate(numbers)], np.float32)
    return parts, wanted.reshape(sizes)


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
        if method == "bitsandbytes":
            held, wanted[name] = levelled((sizes[0], sizes[1]), group, seed, mixed)
            tensors |= {f"{name}{end}": part for end, part in held.items()}
            continue
        parts, wanted[name] = drawn(method, layout, bits, group, sizes, seed, mixed, symmetric)
        tensors |= {f"{stem}.{end}": part for end, part in parts.items()}
    kept = {name for name, part in tensors.items() if part.dtype != np.float32 or ".weight." in name}
    others = {name: part if name in kept else part.astype(np.float16) for name, part in tensors.items()}
    save_file(others, folder / "model.safetensors", {"format": "pt"})
    own = {"checkpoint_format" if method == "gptq" else "version": layout, "bits": bits, "group_size": group}
    if method == "bitsandbytes":
        own = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": mixed}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **own, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    return wanted
