"""Rules that make one change of several: sums, and what keeps changes from getting in each other's way.

    cat, svd   Σ wᵢ Δᵢ
    ties       arXiv:2306.01708, section 4: of each wᵢ Δᵢ the largest values are kept; the sign with more weight wins at
               each place; the mean of the values that have it
    dare       arXiv:2311.03099, section 3: of each Δᵢ values are dropped at random, and the others divided by the share
               that is kept, which leaves the mean as it was; then Σ wᵢ Δᵢ

All of them act on whole changes of weights, never on factors: of factors, sums have products of different adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
SUMS = ("cat", "svd")
THINNED = ("ties", "dare")
RULES = (*SUMS, *THINNED)


def combined(
    rule: str, changes: Sequence[Array], weights: Sequence[float], density: float, seed: Sequence[int]
) -> Array:
    """One change of several, float32.

    Args:
        changes: of one shape.
        density: the share of values that `ties` and `dare` keep.
        seed: decides which ones `dare` keeps.
    """
    if rule == "ties":
        return ties([np.float32(w) * change for change, w in zip(changes, weights, strict=True)], density)
    if rule == "dare":
        changes = [thinned(change, density, [*seed, i]) for i, change in enumerate(changes)]
    total = np.zeros(changes[0].shape, np.float32)
    for change, weight in zip(changes, weights, strict=True):
        total += np.float32(weight) * change
    return total


def ties(changes: Sequence[Array], density: float) -> Array:
    """Trim, elect signs, and take the mean of those that agree."""
    kept = [trimmed(change, density) for change in changes]
    elected = np.sign(sum(kept))
    total, count = np.zeros(kept[0].shape, np.float32), np.zeros(kept[0].shape, np.float32)
    for change in kept:
        agrees = (np.sign(change) == elected) & (change != 0)
        total += np.where(agrees, change, 0)
        count += agrees
    return np.asarray(total / np.maximum(count, 1))


def trimmed(change: Array, density: float) -> Array:
    """The share of values that are largest without their sign; zeros for the others."""
    count = max(1, round(density * change.size))
    flat = np.abs(change).reshape(-1)
    found = np.zeros_like(flat)
    places = np.argpartition(flat, flat.size - count)[flat.size - count :]
    found[places] = change.reshape(-1)[places]
    return found.reshape(change.shape)


def thinned(change: Array, density: float, seed: Sequence[int]) -> Array:
    """A share of values drawn at random, divided by the share; zeros for the others."""
    drawn = np.random.default_rng(list(seed)).random(change.shape, np.float32) < density
    return np.asarray(np.where(drawn, change / np.float32(density), 0), np.float32)
