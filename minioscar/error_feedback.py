"""Shaped rounding: the rounding error of a key avoids what queries look at, as GPTQ (arXiv 2210.17323) does it for
weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from .hadamard import hadamard

Array = Any


def shaped_codes(keys: Array, step: Array, minimum: Array, feedback: Array, bits: int, xp: Any = np) -> Array:
    """Codes of keys for given groups along tokens, the rounding error of each channel fed back into the channels after
    it.

    keys [kv_heads, tokens, d]; step, minimum [kv_heads, groups, d]; feedback float32 [kv_heads, d, d]
    (`feedback_matrix`). For i = 0 ... d - 1: the code of channel i is rounded, and x_j -= (x_i - what it reads back as)
    * feedback[i, j] for j > i. The errors e of a token come out with a small e.M.e rather than a small e.e. Returns
    uint8 codes in the keys' shape, which are stored and read like any other.
    """
    x, top = xp.moveaxis(keys, -1, 0).astype(xp.float32, order="C"), 2**bits - 1  # [d, kv_heads, tokens]
    group, codes = keys.shape[-2] // step.shape[-2], xp.empty(keys.shape, xp.uint8)
    low, width = (xp.moveaxis(xp.repeat(a.astype(xp.float32), group, axis=-2), -1, 0) for a in (minimum, step))
    for i in range(len(x)):
        code = xp.clip(xp.rint((x[i] - low[i]) / xp.where(width[i] == 0, xp.float32(1), width[i])), 0, top)
        codes[..., i] = code = xp.where(width[i] == 0, xp.uint8(0), code.astype(xp.uint8))
        error = x[i] - (code * width[i] + low[i])
        x[i + 1 :] -= error * xp.moveaxis(feedback[:, i, i + 1 :], -1, 0)[..., None]
    return codes


def feedback_matrix(energy: np.ndarray, floor: float = 0.03) -> np.ndarray:
    """How the error of one rotated channel is to be fed into the later ones, from what queries weigh channels with.

    energy [..., d]: mean square of the queries in each channel before rotation, equal in both channels of a RoPE pair
    (so that it holds at every position). The error e of a rotated key costs e.M.e in logits, M = H.diag(energy).H, to
    which `floor` of its mean is added. With U the upper Cholesky factor of M's inverse (M^-1 = U^T.U =
    H.diag(1 / energy).H), feedback[i, j] = U[i, j] / U[i, i] for j > i, else 0. float32 [..., d, d]. GPTQ (arXiv
    2210.17323), section 3.
    """
    h = hadamard(energy.shape[-1]).astype(np.float64)
    mean = energy.mean(axis=-1, keepdims=True)
    energy = np.where(mean > 0, energy + floor * mean, 1)  # without queries nothing is to be avoided
    upper = np.linalg.cholesky((h / energy[..., None, :]) @ h).swapaxes(-1, -2)
    return np.triu(upper / np.diagonal(upper, axis1=-2, axis2=-1)[..., None], 1).astype(np.float32)
