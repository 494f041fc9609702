"""A matrix as a product of two narrow ones: of the rank that it has, or of the rank that is wanted."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
EXACT = 1e-6
"""What float32 cannot tell from nothing, as a share of the whole."""
FIRST = 32


def decomposed(matrix: Array) -> tuple[Array, Array, Array]:
    """U, s and V of the singular value decomposition U diag(s) V, without singular values that are mere rounding.

    A matrix of low rank is first described by a few random combinations of its columns, which costs much less.
    """
    size, norm = min(matrix.shape), float(np.linalg.norm(matrix))
    draw, count = np.random.default_rng(0), FIRST
    found = None
    while count <= size // 2:
        basis = np.linalg.qr(matrix @ draw.standard_normal((matrix.shape[1], count)))[0]
        inside = basis.T @ matrix
        if np.linalg.norm(matrix - basis @ inside) <= EXACT / 4 * norm:
            u, s, v = np.linalg.svd(inside, full_matrices=False)
            found = basis @ u, s, v
            break
        count *= 2
    u, s, v = found or np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    rank = int((s > EXACT * s.max(initial=0)).sum())
    return u[:, :rank], s[:rank], v[:rank]


def factors(matrix: Array, rank: int | None = None) -> tuple[Array, Array, float]:
    """B [O, r] and A [r, I] whose product is the matrix, as nearly as the rank allows; and what it leaves of the
    matrix's norm, as a share.

    Args:
        rank: r; as many as the matrix has where absent.
    """
    u, s, v = decomposed(matrix)
    r = len(s) if rank is None else rank
    root = np.sqrt(s[:r])
    B, A = np.zeros((len(matrix), r), np.float32), np.zeros((r, matrix.shape[1]), np.float32)
    B[:, : len(root)], A[: len(root)] = u[:, : len(root)] * root, root[:, None] * v[: len(root)]
    total = float(np.sqrt((s**2).sum()))
    return B, A, float(np.sqrt((s[r:] ** 2).sum())) / total if total else 0.0
