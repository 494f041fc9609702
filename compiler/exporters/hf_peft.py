"""What Hugging Face PEFT can say of a change, by the formula that computes it, and how it stores one.

    LORA   y + s B A x;  with biases, y + s (B A x + d);  with magnitudes, (m / ‖V‖) V for V = W + s B A
    IA3    what a map reads, or what it writes, times a vector
    whole  a map of its own in the base's place: `modules_to_save`

The parts of a fused map are one module there. Parts that share A are its rows of B; any others are blocks of a B of
all their ranks together, which computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peltc.compiler.importers.formats import Array

DIGITS = 12
"""How many digits of an alpha are meant: it is a product of a scale and a rank, in floating point."""


@dataclass(frozen=True)
class Part:
    """A change of some rows of a module's map.

    Attributes:
        rows: their numbers in the whole map.
        values: numbers and tensors by what the form calls them.
        options: the attachment's.
    """

    rows: Array
    values: Mapping[str, Any]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Stored:
    """One module as PEFT has it: its tensors by what follows its name, and what the config says of it alone."""

    tensors: Mapping[str, Array]
    said: Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """One kind of change that PEFT knows.

    Attributes:
        kind: PEFT's name of the method; "" for what is trained whole.
        variant: what tells forms of one kind apart that one config does not hold together.
        formulas: what it computes, by definition.
        store: the tensors of a module of so many rows, from its parts.
    """

    kind: str
    formulas: Mapping[str, str]
    store: Callable[[Sequence[Part], int], Stored | str]
    variant: str = ""


def low_rank(parts: Sequence[Part], rows: int) -> Stored | str:
    """A [r, I] and B [O, r], and the magnitudes m [O]; or why there are none."""
    first = parts[0].values
    scale = next((part.values["s"] for part in parts if part.values["s"]), first["s"])
    shared = all(np.array_equal(p.values["A"], first["A"]) for p in parts)
    ranks = [len(p.values["A"]) for p in parts]
    A = first["A"] if shared else np.concatenate([p.values["A"] for p in parts])
    B = np.zeros((rows, len(A)), np.float32)
    start = 0
    for part, rank in zip(parts, ranks, strict=True):
        B[part.rows, start : start + rank] = _scaled(part, "B", scale)
        start += 0 if shared else rank
    tensors = {"lora_A.weight": A, "lora_B.weight": B}
    if "m" in first:
        m = np.zeros(rows, np.float32)
        for part in parts:
            m[part.rows] = part.values["m"].reshape(-1)
        if sum(len(part.rows) for part in parts) < rows:
            return "magnitudes of a part of a fused map; PEFT has them for all of its rows"
        tensors["lora_magnitude_vector"] = m
    if "d" in first:
        tensors["lora_B.bias"] = np.zeros(rows, np.float32)
        for part in parts:
            tensors["lora_B.bias"][part.rows] = _scaled(part, "d", scale)
    stabilised = all(part.options.get("rank_stabilised") is True for part in parts)
    alpha = float(f"{scale * (math.sqrt(len(A)) if stabilised else len(A)):.{DIGITS}g}")
    dropout = {part.options.get("dropout", 0) for part in parts}
    said = {"r": len(A), "alpha": int(alpha) if alpha == int(alpha) else alpha, "stabilised": stabilised}
    return Stored(tensors, said | {"dropout": dropout.pop() if len(dropout) == 1 else 0})


def _scaled(part: Part, name: str, scale: float) -> Array:
    """A tensor that a part's own scale multiplies, as another scale has to find it."""
    found: Array = part.values[name]
    return found if part.values["s"] == scale else found * (part.values["s"] / scale)


def plain_low_rank(parts: Sequence[Part], rows: int) -> Stored | str:
    """Factors without a scale."""
    return low_rank([Part(p.rows, {**p.values, "s": 1.0}, p.options) for p in parts], rows)


def what_is_read(parts: Sequence[Part], rows: int) -> Stored | str:
    """l [1, I]; all parts of a fused map read the same."""
    vector = parts[0].values["l"]
    whole = sum(len(part.rows) for part in parts) == rows
    if not whole or any(not np.array_equal(part.values["l"], vector) for part in parts):
        return "what parts of a fused map read is scaled differently; PEFT has one vector for the module"
    return Stored({"ia3_l": vector.reshape(1, -1)}, {"feedforward": True})


def what_is_written(parts: Sequence[Part], rows: int) -> Stored | str:
    """l [O, 1], ones where no part is."""
    vector = np.ones((rows, 1), np.float32)
    for part in parts:
        vector[part.rows, 0] = part.values["l"].reshape(-1)
    return Stored({"ia3_l": vector}, {"feedforward": False})


def whole(parts: Sequence[Part], rows: int) -> Stored | str:
    """The weight [O, I] and the bias [O]."""
    if sum(len(part.rows) for part in parts) < rows:
        return "a part of a fused map is trained as a whole; PEFT has that of whole modules"
    found: dict[str, Array] = {}
    for name, key in (("weight", "w"), ("bias", "c")):
        if key in parts[0].values:
            found[name] = np.zeros((rows, *parts[0].values[key].shape[1:]), np.float32)
            for part in parts:
                found[name][part.rows] = part.values[key]
    return Stored(found, {})


MAGNITUDES, BIASED = "with magnitudes", "with biases"
V = "(W + s * (B @ A))"
FORMS = (
    Form("LORA", {"delta": "s * linear(linear(x, A), B)"}, low_rank),
    Form("LORA", {"delta": "linear(linear(x, A), B)"}, plain_low_rank),
    Form("LORA", {"delta": "s * (linear(linear(x, A), B) + d)"}, low_rank, BIASED),
    Form("LORA", {"weight": f"(m / norm2({V})) * {V}"}, low_rank, MAGNITUDES),
    Form("IA3", {"input": "x * l"}, what_is_read),
    Form("IA3", {"output": "y * l"}, what_is_written),
    Form("", {"weight": "w", "bias": "c"}, whole),
    Form("", {"weight": "w"}, whole),
)


def config(kind: str, variant: str, modules: Mapping[str, Stored], transposed: bool) -> dict[str, Any]:
    """What the config says of the modules, apart from which they are; `rank_pattern` and `alpha_pattern` are by module.

    Args:
        transposed: whether a base's weight is stored [in, out].
    """
    if kind == "IA3":
        inside = [name for name, module in modules.items() if module.said["feedforward"]]
        return {"feedforward_modules": inside, "fan_in_fan_out": transposed, "init_ia3_weights": True}
    said = [module.said for module in modules.values()]
    stabilised = all(one["stabilised"] for one in said)
    alphas = {name: module.said["alpha"] if stabilised == module.said["stabilised"] else _plain(module.said)
              for name, module in modules.items()}  # fmt: skip
    r, alpha = _usual([one["r"] for one in said]), _usual(list(alphas.values()))
    dropouts = {one["dropout"] for one in said}
    return {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropouts.pop() if len(dropouts) == 1 else 0.0,
        "rank_pattern": {name: module.said["r"] for name, module in modules.items() if module.said["r"] != r},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "use_rslora": stabilised,
        "use_dora": variant == MAGNITUDES,
        "lora_bias": variant == BIASED,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "init_lora_weights": True,
    }


def _plain(said: Mapping[str, Any]) -> float:
    """The alpha that gives with α / r the scale that another gives with α / √r."""
    return float(f"{said['alpha'] * math.sqrt(said['r']):.{DIGITS}g}")


def _usual(values: Sequence[Any]) -> Any:
    return max(dict.fromkeys(values), key=values.count)
