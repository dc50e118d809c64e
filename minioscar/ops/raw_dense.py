"""Launches of the raw kernels that know nothing of the cache, as in raw.py: linear layers, norms, what stands between them, sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..sampling import Sampling
from .raw import SHARED_BYTES, Launch

Array = Any

LINEAR_TOKENS = 8  # of linear.cu: the columns of an MMA
BATCH_TOKENS = 256  # of linear_batch.cu
MOST_STAGES = 6  # of linear_batch.cu


def fits(tokens: int, size: int, norm: bool, silu: bool, capability: int) -> bool:
    """Whether linear.cu takes so many tokens of `size` numbers; normed, they stand in shared memory. linear_batch.cu always has room."""
    return 1 <= tokens <= LINEAR_TOKENS and size % 8 == 0 and _linear_bytes(tokens, size, norm, silu) <= _room(capability)


def _linear_bytes(tokens: int, size: int, norm: bool, silu: bool) -> int:
    sums = 2 * (2 if silu else 1) * linear_warps(size, silu) * 16 * 8 * 4
    return sums + (tokens * (-(-size // 64) * 128 + 64) if norm else 0)


def _room(capability: int) -> int:
    return SHARED_BYTES.get(capability, 99) * 1024 - 1024  # a kibibyte for what a kernel declares itself


def linear_warps(size: int, silu: bool) -> int:
    """Warps that share k: as many as have something to ask for at three of five places. Not of the tokens: it decides the order of sums."""
    rounds = {warps: (4 if silu else 8) * 32 * warps for warps in (16, 8)}  # k that all ask for at a time
    return next((warps for warps, k in rounds.items() if size / (-(-size // k) * k) >= 0.6), 4)


def linear(
    x: Array, weight: Array, out: Array, multiprocessors: int, capability: int, *, norm: tuple[Array, float] | None = None,
    bias: Array | None = None, residual: Array | None = None, silu: bool = False,
) -> Launch:
    """`Reference.linear` of x [tokens, in], bf16, at most LINEAR_TOKENS of them; out bf16 or float32.

    Raises ValueError where `fits` says no.
    """
    (tokens, size), (rows, _), tiles = x.shape, weight.shape, 2 if silu else 1
    if not fits(tokens, size, norm is not None, silu, capability):
        raise ValueError(f"{tokens} tokens of {size} numbers have no place in linear.cu on a card of capability {capability / 10}")
    shared, warps = _linear_bytes(tokens, size, norm is not None, silu), linear_warps(size, silu)
    blocks = min(-(-rows // (16 * tiles)), multiprocessors * min(16 // warps, _room(capability) // (shared + 1024) or 1))
    weights, eps = norm or (None, 0.0)
    args = (x, weights, weight, bias, residual, out, *map(np.int32, (tokens, size, rows)), np.float32(eps))
    defines = f"BLOCK_WARPS={warps}", f"NORM={norm is not None:d}", f"SILU={silu:d}", f"OUT_BF16={out.dtype.itemsize == 2:d}"
    return Launch("linear.cu", "linear", defines, (blocks,), 32 * warps, args, shared)


@dataclass(frozen=True)
class BatchPlan:
    """How linear_batch.cu, or on 9.0 linear_batch_sm90.cu, is cut for a weight [rows, size], so many tokens and a card."""

    columns: int  # of a block
    column_blocks: int
    block_rows: int  # of the weight
    k: int  # of a slab
    stages: int
    blocks: int  # that share the slabs
    tiles: int  # of rows
    warpgroups: bool
    prefetch: int = 8  # slabs that a warpgroup asks L2 for while it waits
    cluster: int = 1  # blocks that have one tile and meet in shared memory

    @property
    def shared(self) -> int:
        slab = _stage_bytes(self.columns, self.block_rows, self.k)
        return self.stages * (slab + 16 * self.warpgroups)

    @property
    def workspace_floats(self) -> int:
        return self.column_blocks * self.blocks * 2 * self.block_rows * self.columns

    @property
    def counters(self) -> int:
        return self.column_blocks * self.tiles * (4 if self.warpgroups else 8)

    @property
    def defines(self) -> tuple[str, ...]:
        cut = f"COLUMNS={self.columns}", f"STAGES={self.stages}"
        if self.warpgroups:
            return *cut, f"ROW_TILES={self.block_rows // 64}", f"PREFETCH={self.prefetch}", f"CLUSTER={self.cluster}"
        return *cut, f"K_GROUPS={self.k // 64}"


def batch_plan(tokens: int, size: int, rows: int, silu: bool, multiprocessors: int, capability: int) -> BatchPlan:
    """A block a multiprocessor, equal parts of all slabs; the fewest blocks of columns whose x has room.

    Raises ValueError for more than BATCH_TOKENS.
    """
    if not 1 <= tokens <= BATCH_TOKENS or size % 8:
        raise ValueError(f"{tokens} tokens of {size} numbers have no place in linear_batch.cu")
    warpgroups, outputs, room = capability == 90, rows // 2 if silu else rows, _room(capability)
    k = 64 if warpgroups or rows >= 128 * multiprocessors else 128
    column_blocks = -(-tokens // (128 if 3 * _stage_bytes(128, 256 * 64 // k, k) <= room else 64))
    each = -(-tokens // column_blocks)
    step = 16 if each <= 64 else 32
    columns, most = -(-each // step) * step, max(multiprocessors // column_blocks, 1)
    if warpgroups:
        block_rows, blocks = _cut(size, outputs, silu, most)
        stages = _stages(columns, block_rows, room)
    else:
        block_rows = 256 * 64 // k
        stages = min(room // _stage_bytes(columns, block_rows, k), MOST_STAGES)
    tiles, slabs = -(-outputs // (block_rows // (2 if silu else 1))), -(-size // k)
    return BatchPlan(columns, column_blocks, block_rows, k, stages, blocks if warpgroups else min(most, tiles * slabs), tiles, warpgroups)


def _cut(size: int, outputs: int, silu: bool, most: int) -> tuple[int, int]:
    """Rows of a block of linear_batch_sm90.cu, and blocks: those that end first. Not of the tokens: it decides the order of sums.

    Counted in 64 x 64 weights, which a multiprocessor gets in a quarter of a microsecond: what the busiest block has; ten for parts that
    must meet at the end, four more for blocks that do it twice.
    """
    found = []
    for row_tiles in (2, 3):
        tiles, slabs = -(-outputs // (64 * row_tiles // (2 if silu else 1))), -(-size // 64)
        for blocks in {min(most, tiles * slabs), min(most // tiles, slabs) * tiles} - {0}:
            ends = 0 if tiles % blocks == 0 else 10 if blocks % tiles == 0 else 14
            found.append((-(-tiles * slabs // blocks) * row_tiles + ends, 64 * row_tiles, blocks))
    return min(found)[1:]


def _stages(columns: int, block_rows: int, room: int) -> int:
    """Where sums leave registers for it, so many that a block of 128 rows has room beside one of 192: two launches overlap."""
    own, beside = _stage_bytes(columns, block_rows, 64), 3 * (_stage_bytes(columns, 192, 64) + 16)
    if columns <= 48:
        room = beside if block_rows == 192 else room - 1024 - beside
    return min(room // (own + 16), MOST_STAGES)


def _stage_bytes(columns: int, rows: int, k: int) -> int:
    """A slab of linear_batch.cu or linear_batch_sm90.cu: rows of the weights, and x, so many k of each."""
    return (rows + columns) * 2 * k


def rms_norm(x: Array, weight: Array, eps: float, out: Array) -> Launch:
    """x [tokens, size] -> out, both bf16."""
    args = (x, weight, out, np.int32(x.shape[1]), np.float32(eps))
    any_plan = "COLUMNS=16", "STAGES=2", "K_GROUPS=2", "SILU=0", "OUT_BF16=1"
    return Launch("linear_batch.cu", "rms_norm", any_plan, (len(x),), 256, args)


def linear_batch(
    x: Array, weight: Array, out: Array, p: BatchPlan, workspace: Array, arrived: Array, *, bias: Array | None = None,
    residual: Array | None = None, silu: bool = False,
) -> Launch:
    """As `linear`, for up to BATCH_TOKENS, already normed.

    workspace float32 [p.workspace_floats]; arrived int32 [p.counters], zero before and after.
    """
    (tokens, size), rows = x.shape, weight.shape[0]
    args = (x, weight, bias, residual, out, workspace, arrived, *map(np.int32, (tokens, size, rows)))
    defines = *p.defines, f"SILU={silu:d}", f"OUT_BF16={out.dtype.itemsize == 2:d}"
    file = "linear_batch_sm90.cu" if p.warpgroups else "linear_batch.cu"
    return Launch(file, "linear_batch", defines, (p.blocks, p.column_blocks), 256, args, p.shared)


# --- between the products of a prefill


def silu_mul(gate_up: Array, out: Array) -> Launch:
    """`Reference.silu_mul`: gate_up [tokens, 2 n] -> out [tokens, n], both bf16, n a multiple of 8."""
    return _elementwise("silu_mul", out, gate_up, out)


def add(x: Array, y: Array) -> Launch:
    """y += x in bf16: y [tokens, n], x the same or a bias [n], n a multiple of 8."""
    return _elementwise("add", y, x, y, np.int32(y.shape[1] // 8 if x.ndim == 2 else 0))


def _elementwise(name: str, out: Array, a: Array, b: Array, *more: np.int32) -> Launch:
    tokens, size = out.shape
    if size % 8:
        raise ValueError(f"rows of {size} numbers have no place in elementwise.cu, which takes multiples of 8")
    grid = tokens, -(-size // 4096)
    return Launch("elementwise.cu", name, (), grid, 256, (a, b, np.int32(size // 8), *more))


# --- the next token


SAMPLE_VOCAB = 2**21  # the most that sample.cu has room for


def sample_words(vocab: int) -> int:
    """Of the workspace of a row of logits, in numbers of 64 bits: sample.cu, Row."""
    return 4 + 1024 + 17 * -(-vocab // 2048) + 8192


def sample(logits: Array, sampling: Sampling, sequences: Array, steps: Array, tokens: Array, workspace: Array) -> list[Launch]:
    """`sampling.sample` of every row of logits, float32 [batch, vocab]; sequences, steps and tokens are int32 [batch] on the device.

    A row gets -1 where `sampling.sample` raises Failure. workspace uint64 [batch, sample_words(vocab)], zero the first time. Raises
    ValueError for more than SAMPLE_VOCAB tokens.
    """
    batch, vocab = logits.shape
    if vocab > SAMPLE_VOCAB:
        raise ValueError(f"a vocabulary of {vocab} has no place in sample.cu, which has room for {SAMPLE_VOCAB}")
    scale = min(math.log2(math.e) / sampling.temperature, 1e30) if sampling.temperature else 0.0  # next to 0, the likeliest alone is left
    top_k = sampling.top_k if sampling.top_k < vocab else 0
    of_thread = 8 if batch < 16 else 32  # many rows fill a card with fewer blocks, which have their fixed costs less often
    row = np.int32(workspace.shape[1])
    numbers = np.int32(vocab), np.float32(scale)

    def launch(name: str, *args: Any) -> Launch:
        grid = -(-vocab // (256 * of_thread)), batch
        return Launch("sample.cu", name, (f"TOKENS={of_thread}",), grid, 256, (logits, workspace, row, *args))

    launches = [launch("sample_max", tokens, *numbers, np.int32(top_k))]
    if sampling.temperature == 0:
        return launches
    if sampling.top_p < 1 and not top_k:
        # Tokens below (1 - top_p) / vocab of the largest p are less than what top-p leaves out, all together. Three octaves more make up
        # for everything that is rounded, and for weights next to 2^-41, which are rounded by up to a factor of 2.
        octaves = 3 + math.log2(vocab / (1 - sampling.top_p))
        bins = min(math.ceil(24 * octaves), 1024)
        launches.append(launch("sample_mass", *numbers, np.float64(sampling.top_p), np.int32(bins)))
    chosen = np.int32(top_k), np.float64(sampling.top_p), np.float32(sampling.min_p), np.uint64(sampling.seed)
    launches.append(launch("sample_draw", sequences, steps, tokens, *numbers, *chosen))
    return launches


# --- around a step


def embed(table: Array, tokens: Array, x: Array) -> Launch:
    """x[i] = table[tokens[i]]: table bf16 [vocab, hidden], tokens int32 [n], x bf16 [n, hidden], hidden a multiple of 8."""
    return Launch("step.cu", "embed", (), (len(tokens),), 128, (table, tokens, x, np.int32(table.shape[1])))


def advance(lengths: Array, steps: Array) -> Launch:
    """lengths and steps, int32 [rows], grow by one where the length is not negative."""
    return Launch("step.cu", "advance", (), (1,), 128, (lengths, steps, np.int32(len(lengths))))
