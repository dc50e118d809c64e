"""Hadamard matrices of the orders that head sizes have: Sylvester's doubling, of 1 or of a matrix of Paley's."""

from __future__ import annotations

from functools import cache

import numpy as np


@cache
def hadamard(n: int) -> np.ndarray:
    """The normalized Hadamard matrix of order n: symmetric and orthogonal, so H @ H = I. float32 [n, n].

    n = 2^k gives Walsh-Hadamard (Sylvester's doubling). n = 12 * 2^k and 20 * 2^k double a matrix of order 12 or 20 by
    Paley's first construction (q = 11, 19), its core written with chi(i + j) instead of chi(i - j), which makes it
    symmetric. Every entry is +-1/sqrt(n), so an outlier channel spreads evenly over all of them.
    Raises ValueError for other n.
    """
    order = odd_part(n)
    h = np.ones((1, 1)) if order == 1 else _paley(order - 1)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return (h / np.sqrt(n)).astype(np.float32)


def odd_part(n: int) -> int:
    """Order of the matrix that `hadamard` doubles up to n: 1, 12 or 20. Raises ValueError where there is none."""
    odd = n // (n & -n) if n > 0 else 0
    if odd not in (1, 3, 5) or (odd > 1 and n % 4):
        raise ValueError(f"no Hadamard matrix of order {n} here: head_dim must be 2^k, 12*2^k or 20*2^k")
    return 1 if odd == 1 else 4 * odd


def _paley(q: int) -> np.ndarray:
    """Symmetric Hadamard matrix of order q + 1, q a prime with q % 4 == 3; entries +-1, not normalized."""
    squares = {i * i % q for i in range(1, q)}
    chi = np.array([-1 if i == 0 or i in squares else 1 for i in range(q)])  # -(chi + identity), on i + j
    i = np.arange(q)
    h = np.ones((q + 1, q + 1))
    h[1:, 1:] = chi[(i[:, None] + i) % q]
    return h
