"""Absorption: claims whose effect is affine go into the base's own weights and biases.

    before   y = x Wᵀ + b;  y' = f(x, y)      f affine
    after    y' = x W'ᵀ + b'

The graph keeps every node it had. A map without a bias gets one, in one more addition, where the effect has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from peltc.compiler.interpreters.affine import Affine, AffineInterpreter, Map
from peltc.compiler.interpreters.numeric import NumericInterpreter, OneHot
from peltc.compiler.plan.claims import Claim
from peltc.compiler.survey.anatomy import Site, places_of
from peltc.spec.formula.interpreter import Deferred
from peltc.spec.method import ROLES

Array = np.ndarray[Any, Any]
Read = Callable[[str], Array]

MAX_LOSS = 0.1
"""The share of a change that rounding may take before a fold warns."""
SAMPLE = 256
NEW_BIAS = ".pelt_bias"
"""Behind a weight's name: a bias that the base does not have."""


@dataclass(frozen=True)
class Folded:
    """A parameter with claims inside.

    Attributes:
        name: the parameter, or `<weight>.pelt_bias` for a bias that the base does not have.
        array: its new values, in the type and layout in which they are stored.
        claims: `attachment at site`, in order.
        loss: ‖stored - exact‖ / ‖exact - base‖, what rounding took of the change; 0 in float32.
    """

    name: str
    array: Array
    claims: tuple[str, ...]
    loss: float


def absorb(
    claims: list[Claim], sites: list[Site], read: Read, tensors: Mapping[str, Array], dtype: np.dtype[Any]
) -> list[Folded]:
    """Fold the claims on one weight.

    Args:
        claims: all claims that the weight absorbs, in order of effect.
        sites: the site of each claim's map: its own, or that of the map that ends its block.
        read: base parameters by name, as stored.
        tensors: the adapter's tensors by name.
        dtype: the type to store in.
    """
    site = sites[0]
    if site.kind == "norm":
        return _norm(claims, site, read, tensors, dtype)
    if site.kind == "table":
        return _table(claims, site, read, tensors, dtype)
    if site.kind == "experts":
        return _experts(claims, site, read, tensors, dtype)
    weight, bias = site.parameters["weight"], site.parameters.get("bias")
    stored = read(weight)
    W = np.asarray(stored, np.float32)
    W = W.T if site.transposed else W
    b = None if bias is None else np.asarray(read(bias), np.float32)
    new_W, new_b = W, b
    for rows in dict.fromkeys(s.rows for s in sites):
        group = [claim for claim, s in zip(claims, sites, strict=True) if s.rows == rows]
        if rows is None:
            new_W, new_b = fold_map(group, W, b, tensors)
            continue
        index = places_of(rows)
        part_W, part_b = W[index], None if b is None else b[index]
        changed_W, changed_b = fold_map(group, part_W, part_b, tensors)
        if changed_W is not part_W:
            new_W = new_W.copy() if new_W is W else new_W
            new_W[index] = changed_W
        if changed_b is not None and changed_b is not part_b:
            new_b = np.zeros(len(W), np.float32) if new_b is None else new_b.copy() if new_b is b else new_b
            new_b[index] = changed_b
    labels = tuple(f"{c.attachment} at {c.site.name}" for c in claims)
    folded = []
    if new_W is not W:
        array = np.ascontiguousarray(new_W.T if site.transposed else new_W).astype(dtype, copy=False)
        folded.append(Folded(weight, array, labels, _loss(array.T if site.transposed else array, new_W, W)))
    if new_b is not None and new_b is not b:
        array = np.ascontiguousarray(new_b).astype(dtype, copy=False)
        base = np.zeros_like(new_b) if b is None else b
        folded.append(Folded(bias or f"{weight}{NEW_BIAS}", array, labels, _loss(array, new_b, base)))
    return folded


def fold_map(
    claims: list[Claim], W: Array, b: Array | None, tensors: Mapping[str, Array]
) -> tuple[Array, Array | None]:
    """The weight [O, I] and bias [O] of a map with claims inside; the very arrays given where they do not change."""
    affine, numeric = AffineInterpreter(), NumericInterpreter()
    state: dict[str, Any] = {"W": W, "b": b}

    def scope(claim: Claim, interpreter: Any) -> dict[str, Any]:
        values: dict[str, Any] = {name: tensors[t.name] for name, t in claim.tensors.items()}
        values["W"] = Deferred(lambda: state["W"])
        values["b"] = Deferred(lambda: np.zeros(len(W), np.float32) if state["b"] is None else state["b"])
        values |= {"x": Affine.identity("x"), "y": Affine.identity("y")}
        return claim.scope(values, interpreter)

    x = Affine.identity("x")
    for claim in claims:
        if "input" in claim.effects:
            x = _substitute(affine.evaluate(claim.effects["input"], scope(claim, affine)), x, None)
    for name, key in ROLES.items():
        for claim in claims:
            if name in claim.effects:
                found = np.asarray(numeric.evaluate(claim.effects[name], scope(claim, numeric)), np.float32)
                state[key] = np.broadcast_to(found, W.shape if key == "W" else (len(W),))
    W_now, b_now = state["W"], state["b"]
    plain = (
        set(x.maps) == {"x"} and x.maps["x"].matrix is None and np.all(x.maps["x"].diagonal == 1) and x.offset is None
    )
    late = [c for c in claims if {"delta", "output"} & set(c.effects)]
    if plain and not late:
        return W_now, b_now
    y = Affine({source: Map(matrix=W_now) if plain else m.then(W_now) for source, m in x.maps.items()}, b_now)
    if x.offset is not None:
        moved = W_now @ np.broadcast_to(x.offset, W_now.shape[1:])
        y = Affine(y.maps, moved if y.offset is None else y.offset + moved)
    for claim in late:
        for name in ("delta", "output"):
            if name in claim.effects:
                value = _substitute(_as_affine(affine.evaluate(claim.effects[name], scope(claim, affine))), x, y)
                y = y.plus(value) if name == "delta" else value
    matrix = np.broadcast_to(y.maps["x"].dense(W.shape[1]) if "x" in y.maps else np.float32(0), W.shape)
    if y.offset is b:
        return matrix, b
    if y.offset is None:  # what is made of the output may leave the base's bias out
        return matrix, np.zeros(len(W), np.float32)
    return matrix, np.broadcast_to(y.offset, (len(W),)).astype(np.float32)


def _as_affine(value: Any) -> Affine:
    return value if isinstance(value, Affine) else Affine({}, np.asarray(value, np.float32))


def _substitute(value: Any, x: Affine, y: Affine | None) -> Affine:
    """A map of (x, y) as a map of the raw input, x and y being maps of it themselves."""
    value = _as_affine(value)
    result = Affine({}, value.offset)
    for source, inner in (("x", x), ("y", y)):
        outer = value.maps.get(source)
        if outer is None or inner is None:
            continue
        result = result.plus(inner.apply(partial(_followed, outer=outer), outer.apply))
    return result


def _followed(inner: Map, outer: Map) -> Map:
    return inner.composed(outer)


def _norm(
    claims: list[Claim], site: Site, read: Read, tensors: Mapping[str, Array], dtype: np.dtype[Any]
) -> list[Folded]:
    """Claims on a normalisation's gain and bias."""
    numeric = NumericInterpreter()
    zeros = np.zeros(site.sizes["d"], np.float32)
    state = {short: np.asarray(read(site.parameters[role]), np.float32) if role in site.parameters else zeros
             for role, short in ROLES.items()}  # fmt: skip
    base = dict(state)
    for role, short in ROLES.items():
        for claim in claims:
            if role in claim.effects:
                values = {name: tensors[t.name] for name, t in claim.tensors.items()} | state
                found = np.asarray(numeric.evaluate(claim.effects[role], claim.scope(values, numeric)), np.float32)
                state[short] = np.broadcast_to(found, zeros.shape)
    labels = tuple(f"{c.attachment} at {c.site.name}" for c in claims)
    folded = []
    for role, short in ROLES.items():
        new, old = state[short], base[short]
        if new is not old:
            array = new.astype(dtype)
            folded.append(Folded(site.parameters[role], array, labels, _loss(array, new, old)))
    return folded


def _table(
    claims: list[Claim], site: Site, read: Read, tensors: Mapping[str, Array], dtype: np.dtype[Any]
) -> list[Folded]:
    """Claims on a table: whatever they make of an id is a row, so that all rows together are the new table."""
    numeric = NumericInterpreter()
    base = np.asarray(read(site.parameters["weight"]), np.float32)
    rows, every = base, OneHot(None, len(base))
    zeros = np.zeros(base.shape[1], np.float32)

    def evaluate(claim: Claim, effect: str, **values: Any) -> Array:
        adapter = {name: tensors[t.name] for name, t in claim.tensors.items()}
        scope = claim.scope({**adapter, "W": rows.T, "b": zeros, **values}, numeric)
        return np.asarray(numeric.evaluate(claim.effects[effect], scope), np.float32)

    for claim in claims:
        if "weight" in claim.effects:
            rows = evaluate(claim, "weight").T
    for claim in claims:
        if "bias" in claim.effects:
            rows = rows + evaluate(claim, "bias")
    for claim in claims:
        for effect in ("delta", "output"):
            if effect in claim.effects:
                found = evaluate(claim, effect, x=every, y=rows)
                rows = rows + found if effect == "delta" else np.broadcast_to(found, rows.shape)
    array = np.ascontiguousarray(rows).astype(dtype, copy=False)
    labels = tuple(f"{c.attachment} at {c.site.name}" for c in claims)
    return [Folded(site.parameters["weight"], array, labels, _loss(array, rows, base))]


def _experts(
    claims: list[Claim], site: Site, read: Read, tensors: Mapping[str, Array], dtype: np.dtype[Any]
) -> list[Folded]:
    """Claims on the stacked weights and biases of experts, one expert after the other."""
    base = {role: np.asarray(read(name), np.float32) for role, name in site.parameters.items()}
    stacks = {role: array.copy() for role, array in base.items()}
    changed: set[str] = set()
    own = {t.name: t for claim in claims for t in claim.tensors.values()}
    for number in range(site.sizes["experts"]):
        W, b = (stacks[role][number] if role in stacks else None for role in ROLES)
        assert W is not None
        W = W.T if site.transposed else W
        part = {name: tensors[name][number] if t.experts else tensors[name] for name, t in own.items()}
        for rows in dict.fromkeys(claim.site.rows for claim in claims):
            group = [claim for claim in claims if claim.site.rows == rows]
            index = np.arange(len(W)) if rows is None else places_of(rows)
            old_W, old_b = W[index], None if b is None else b[index]
            new_W, new_b = fold_map(group, old_W, old_b, part)
            if new_W is not old_W:
                W[index] = new_W
                changed.add("weight")
            if b is not None and new_b is not old_b:
                b[index] = new_b
                changed.add("bias")
    labels = tuple(f"{c.attachment} at {c.site.name}" for c in claims)
    folded = []
    for role in (role for role in ROLES if role in changed):
        array = stacks[role].astype(dtype, copy=False)
        folded.append(Folded(site.parameters[role], array, labels, _loss(array, stacks[role], base[role])))
    return folded


def _loss(stored: Array, exact: Array, base: Array) -> float:
    """What rounding took of the change, as a share of it; measured on at most `SAMPLE` rows, evenly spread."""
    if stored.dtype == np.float32:
        return 0.0
    rows = np.linspace(0, len(exact) - 1, min(len(exact), SAMPLE)).astype(int)
    wanted = exact[rows]
    change = float(np.linalg.norm(wanted - base[rows]))
    return float(np.linalg.norm(stored[rows].astype(np.float32) - wanted)) / change if change else 0.0
