"""A matrix as a product of two narrow ones: of the rank that it has, or of the rank that is wanted."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
EXACT = 1e-6
"""What float32 cannot tell from nothing, as a share of the whole."""
FIRST = 32
"""How many random combinations of columns are tried first; matrices that are no larger are decomposed whole."""
Decomposed = tuple[Array, Array, Array]
"""U, s and V of the singular value decomposition U diag(s) V."""


def sketched(matrix: Array) -> Decomposed | None:
    """The decomposition of a matrix of low rank, by way of a few random combinations of its columns, which cost much
    less than all of it; None where the rank is not low."""
    norm, draw, count = float(np.linalg.norm(matrix)), np.random.default_rng(0), FIRST
    while count <= min(matrix.shape) // 2:
        basis = np.linalg.qr(matrix @ draw.standard_normal((matrix.shape[1], count)))[0]
        inside = basis.T @ matrix
        if np.linalg.norm(matrix - basis @ inside) <= EXACT / 4 * norm:
            u, s, v = np.linalg.svd(inside, full_matrices=False)
            return basis @ u, s, v
        count *= 2
    return None


def factors(matrix: Array, rank: int | None = None) -> tuple[Array, Array, float] | None:
    """B [O, r] and A [r, I] whose product is the matrix, as nearly as the rank allows; and what it leaves of the
    matrix's norm, as a share. None where no rank is given, and the factors would be no smaller than the matrix.

    Args:
        rank: r; as many as the matrix has where absent.
    """
    found = sketched(matrix)
    if found is None and rank is None and min(matrix.shape) > 2 * FIRST:
        return None
    u, s, v = found or np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    s = s[s > EXACT * s.max(initial=0)]
    r = len(s) if rank is None else rank
    if rank is None and r * sum(matrix.shape) >= matrix.size:
        return None
    root = np.sqrt(s[:r])
    B, A = np.zeros((len(matrix), r), np.float32), np.zeros((r, matrix.shape[1]), np.float32)
    B[:, : len(root)], A[: len(root)] = u[:, : len(root)] * root, root[:, None] * v[: len(root)]
    total = float(np.sqrt((s**2).sum()))
    return B, A, float(np.sqrt((s[r:] ** 2).sum())) / total if total else 0.0
