"""Permutations as torch draws them, against torch itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peltc.compiler.importers.peft.torch_random import LARGE, permuted, places

SEEDS = (0, 777, 2**32 - 1, 2**33 + 1, 2**64 - 1)


def drawn(size: int, count: int, seed: int) -> list[int]:
    return [int(i) for i in torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("size", "count"),
    [(1, 1), (2, 1), (2, 2), (7, 7), (624, 624), (1000, 999), (1000, 1000), (40_000, 3000), (3_000_017, 500)],
)
def test_the_first_of_a_permutation(size: int, count: int, seed: int) -> None:
    """Whatever the size, as far as memory goes; of a seed torch takes the lower half."""
    assert permuted(size, count, seed).tolist() == drawn(size, count, seed)


def test_no_more_than_there_are() -> None:
    assert sorted(permuted(5, 9, 3).tolist()) == [0, 1, 2, 3, 4]


def test_another_seed_is_another_permutation() -> None:
    assert permuted(1000, 20, 1).tolist() != permuted(1000, 20, 2).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("size", [LARGE - 1, LARGE, LARGE + 7])
def test_large_permutations_are_drawn_the_other_way(size: int) -> None:
    assert permuted(size, 40, 777).tolist() == drawn(size, 40, 777)


def test_places_are_rows_and_columns() -> None:
    found = places(5, 7, 35, 11)
    assert found.shape == (35, 2) and sorted(map(tuple, found.tolist())) == [(i, j) for i in range(5) for j in range(7)]
    assert (found[:, 0] * 7 + found[:, 1]).tolist() == drawn(35, 35, 11)
    assert np.array_equal(found, places(5, 7, 35, 11))
