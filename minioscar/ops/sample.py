"""Launches of sampling, and how the rows of a batch draw, on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..sampling import RowSampling, Sampling
from .launch import Launch

Array = Any
SAMPLE_VOCAB, BINS = 2**21, 1024  # of sample.cu's buffers
MAX_ENDS, MAX_BIASES = 64, 1024  # of a row that joins
SETTINGS = np.dtype(  # of a row: sample.cu, Settings
    [("seed", "u8"), ("top_p", "f8"), ("scale", "f4"), ("min_p", "f4"), ("top_k", "i4"), ("sequence", "u4")]
    + [("repetition", "f4"), ("presence", "f4"), ("frequency", "f4"), ("min_tokens", "i4")]
)


def sample_words(vocab: int) -> int:
    """Of the workspace of a row of logits, in numbers of 64 bits: sample.cu, Row."""
    return 4 + 1024 + 17 * -(-vocab // 2048) + 8192


class Drawing:
    """How the rows of a batch draw, on the device; what no row asks for is not there.

    settings: SETTINGS as uint64 [rows, 6]. workspace: uint64 [rows, sample_words(vocab)], zero between launches.
    adjusted: float32 [rows, vocab], logits after penalties and without end tokens. history: int32 [rows, vocab],
    `penalties.history`, which the launch that adjusts updates. ends: int32 [rows, end tokens], padded with -1. allowed,
    biased, biases: of rows that join (joining.py). bins: of the launch that sums for top-p (0: there is none); draws:
    whether not all rows are greedy. Raises ValueError for a vocabulary above SAMPLE_VOCAB.
    """

    allowed = biased = biases = None

    def __init__(self, xp: Any, rows: Sequence[RowSampling], vocab: int):
        if vocab > SAMPLE_VOCAB:
            raise ValueError(f"a vocabulary of {vocab} does not fit sample.cu, which has room for {SAMPLE_VOCAB}")
        self.vocab, size = vocab, len(rows)
        self.settings = xp.asarray(np.stack([settings_of(row, vocab) for row in rows]))
        self.workspace = xp.zeros((size, sample_words(vocab)), np.uint64)
        penalizes, masks = any(row.sampling.penalizes for row in rows), any(row.masks for row in rows)
        self.adjusted = xp.empty((size, vocab), np.float32) if penalizes or masks else None
        self.history = xp.zeros((size, vocab), np.int32) if penalizes else None
        width = max((len(row.ends) for row in rows if row.masks), default=0)
        self.ends = xp.asarray(np.stack([ends_of(row, width) for row in rows])) if masks else None
        drawn = [row.sampling for row in rows if row.sampling.temperature > 0]
        nucleus = [s.top_p for s in drawn if s.top_p < 1 and not _top_k(s, vocab)]
        self.draws, self.bins = bool(drawn), _bins(max(nucleus), vocab) if nucleus else 0

def _bins(top_p: float, vocab: int) -> int:
    """Of sample_mass: tokens below (1 - top_p) / vocab of the largest p are less than what top-p leaves out, all
    together. Three octaves more make up for everything that is rounded, and for weights next to 2^-41, which are
    rounded by up to a factor of 2."""
    return min(math.ceil(24 * (3 + math.log2(vocab / (1 - top_p)))), BINS)


def ends_of(row: RowSampling, width: int) -> np.ndarray:
    return np.array([*(row.ends if row.masks else ()), *[-1] * width][:width], np.int32)


def settings_of(row: RowSampling, vocab: int) -> np.ndarray:
    """SETTINGS as uint64 [6]."""
    s = row.sampling
    # Next to 0, the likeliest alone is left
    scale = min(math.log2(math.e) / s.temperature, 1e30) if s.temperature else 0.0
    penalties = s.repetition_penalty, s.presence_penalty, s.frequency_penalty
    numbers = s.seed, s.top_p, scale, s.min_p, _top_k(s, vocab), row.sequence, *penalties
    return np.array([(*numbers, min(row.min_tokens, 2**31 - 1))], SETTINGS).view(np.uint64)


def _top_k(sampling: Sampling, vocab: int) -> int:
    return sampling.top_k if sampling.top_k < vocab else 0


def sample(logits: Array, drawing: Drawing, steps: Array, tokens: Array) -> list[Launch]:
    """`sampling.next_token` of every row of logits, float32 [batch, vocab]; steps and tokens are int32 [batch] on the
    device.

    tokens: in, what each row was fed with, which penalties count; out, what it draws, -1 where `sampling.sample`
    raises Failure. Launches that no row needs are left out.
    """
    batch, vocab = logits.shape
    # Many rows fill a card with fewer blocks, which have their fixed costs less often
    of_thread = 8 if batch < 16 else 32

    def launch(name: str, *args: Any) -> Launch:
        grid = -(-vocab // (256 * of_thread)), batch
        return Launch("sample.cu", name, (f"TOKENS={of_thread}",), grid, 256, (*args, np.int32(vocab)))

    launches = []
    if drawing.adjusted is not None:
        width = np.int32(0 if drawing.ends is None else drawing.ends.shape[1])
        inputs = logits, drawing.settings, steps, tokens, drawing.ends, width
        biases = drawing.allowed, drawing.biased, drawing.biases, np.int32(MAX_BIASES)
        launches.append(launch("sample_adjust", *inputs, *biases, drawing.history, drawing.adjusted))
        logits = drawing.adjusted
    row = logits, drawing.settings, drawing.workspace, np.int32(drawing.workspace.shape[1])
    launches.append(launch("sample_max", *row, tokens))
    if drawing.bins:
        launches.append(launch("sample_mass", *row, np.int32(drawing.bins)))
    if drawing.draws:
        launches.append(launch("sample_draw", *row, steps, tokens))
    return launches


def advance(lengths: Array, steps: Array) -> Launch:
    """lengths and steps, int32 [rows], grow by one where the length is not negative."""
    return Launch("step.cu", "advance", (), (1,), 128, (lengths, steps, np.int32(len(lengths))))
