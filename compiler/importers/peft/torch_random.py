"""Random numbers as torch's generator on a CPU draws them, for adapters that store a seed in place of what it drew.

torch seeds the same Mersenne Twister as numpy. Its permutation of n numbers exchanges each place with one that comes
later, or, from a twentieth of 2³² numbers on, each with one that came earlier; either way the first few are known
without the rest.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
LARGE = (2**32 - 1) // 20
"""From how many numbers on a permutation is drawn the other way."""
CHUNK = 2**22


def twister(seed: int) -> np.random.MT19937:
    """The generator that `torch.Generator().manual_seed(seed)` is; of the seed its lower 32 bits count."""
    found = np.random.MT19937()
    found._legacy_seeding(seed % 2**32)
    return found


def permuted(size: int, count: int, seed: int) -> Array:
    """The first `count` of `torch.randperm(size)` after a seed."""
    return (_forwards if size < LARGE else _backwards)(size, min(count, size), twister(seed))


@cache
def places(rows: int, columns: int, count: int, seed: int) -> Array:
    """Places of a matrix [count, 2], a row and a column each: the first of a permutation of all, counted row by row."""
    return np.stack(np.divmod(permuted(rows * columns, count, seed), columns), -1)


def _forwards(size: int, count: int, draw: np.random.MT19937) -> Array:
    steps = min(count, size - 1)
    later = np.arange(steps) + draw.random_raw(steps) % (size - np.arange(steps, dtype=np.uint64))
    moved: dict[int, int] = {}
    found = []
    for place, other in enumerate(later.astype(np.int64).tolist()):
        found.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    if count > steps:
        found.append(moved.get(size - 1, size - 1))
    return np.array(found, np.int64)


def _backwards(size: int, count: int, draw: np.random.MT19937) -> Array:
    found = np.zeros(count, np.int64)
    for start in range(0, size, CHUNK):
        place = np.arange(start, min(start + CHUNK, size), dtype=np.uint64)
        halves = draw.random_raw(2 * len(place)).reshape(-1, 2)
        earlier = ((halves[:, 0] << np.uint64(32)) | halves[:, 1]) % (place + np.uint64(1))
        if start < count:
            for i, z in zip(place.tolist(), earlier.tolist(), strict=True):
                if i < count:
                    found[i] = found[z]
                if z < count:
                    found[z] = i
        else:
            hit = earlier < count
            found[earlier[hit].astype(np.int64)] = place[hit]
    return found
