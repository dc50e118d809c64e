"""Plans and launches of products with quantized matrices: kernels/quantized/. ops/linear.py has those of arrays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..ops.launch import Card, Launch, TensorMap
from ..ops.linear import normed
from ..ops.linear_batch import Scratch
from ..plans import BATCH_TOKENS, MAX_STAGES, BatchPlan, share_slabs
from ..sm90.linear_batch import MAX_WGMMA_STAGES
from . import ROWS, RUN, Quantized

Array = Any

LINEAR_TOKENS = 8  # of quantized/linear.cu: the columns of an MMA
CHUNK = 128  # columns that a warp of quantized/linear.cu has at a time
FEW, MAX_SLOTS = 2, {"int4": 3, "int8": 6, "e4m3": 6}  # tokens; slots of a ring, more are slower
MOST_COLUMNS = 128  # whose sum is scaled at once
WGMMA_ROWS = 192  # of a block of sm90/quantized_batch.cu
PREPARED_COLUMNS = 48  # that its blocks prepare by themselves where there is no norm; a launch is faster for more
PREPARE_BYTES = 2048  # that it leaves for a block of sm90/prepare_x.cu
ONE_GROUP = 31  # the shift of a column to its group where a row has one


@dataclass(frozen=True)
class VectorPlan:
    """Tiles and rings of quantized/linear.cu."""

    warps: int  # of a block; they split k
    row_tiles: int  # of 16 rows (of gate and of up), of a pass
    slots: int  # chunks that a warp has in flight
    early: int  # of these, before x is asked for
    shared: int


def vector_plan(tokens: int, weight: Quantized, norm: bool, silu: bool, card: Card) -> VectorPlan | None:
    """None where no two chunks fit into a ring. `warps`, which decide the order of sums, do not depend on the tokens; 1
    to FEW of them, and more, have each one number of slots if that is possible."""
    branches, (rows, size), few = 2 if silu else 1, weight.shape, FEW if tokens <= FEW else LINEAR_TOKENS
    tiles, folds = -(-rows // (ROWS * branches)), CHUNK // _columns_at_once(weight, 2)
    codes = ROWS * CHUNK // (2 if weight.kind == "int4" else 1)
    of_tile = branches * (codes + folds * (16 if weight.kind == "e4m3" else 64))

    slot_counts = range(1, MAX_SLOTS[weight.kind] + 1)

    def shared(warps: int, row_tiles: int, slots: int, tokens: int) -> int:
        x = tokens * (2 * _up(size, CHUNK) + 64) if norm else warps * slots * tokens * CHUNK * 2
        return warps * row_tiles * (2 * branches * ROWS * LINEAR_TOKENS * 4 + slots * of_tile) + x

    def slots(warps: int, row_tiles: int, tokens: int) -> int:
        return sum(shared(warps, row_tiles, n, tokens) <= card.max_shared_bytes for n in slot_counts)

    def used(row_tiles: int) -> float:  # of the card
        passes = -(-tiles // row_tiles)
        return tiles / (-(-passes // card.multiprocessors) * card.multiprocessors * row_tiles)

    warps = 16 if slots(16, 1, FEW) >= 2 else 8
    most = 3 if weight.kind == "int4" and not silu else 1  # of 8 bits fewer slots would fit
    fitting = [n for n in range(1, most + 1) if n == 1 or slots(warps, n, few) >= 2]
    row_tiles = max(fitting, key=lambda n: (round(used(n), 2), n))
    found = slots(warps, row_tiles, few)
    found = found if found >= 2 else slots(warps, row_tiles, tokens)
    if found < 2:
        return None
    early = 1 if weight.kind == "int4" else found  # 8 bits are bound by memory first
    return VectorPlan(warps, row_tiles, found, early, shared(warps, row_tiles, found, tokens))


def fits(tokens: int, weight: Quantized, norm: bool, silu: bool, card: Card) -> bool:
    """Whether quantized/linear.cu takes this many tokens; normed, they stay in shared memory."""
    possible = 1 <= tokens <= LINEAR_TOKENS and has_kernels(weight, silu)
    return possible and vector_plan(tokens, weight, norm, silu, card) is not None


def has_kernels(weight: Quantized, silu: bool) -> bool:
    """Whether tiles of 16 rows are of gate or of up alone, and rows of x consist of 16-byte vectors."""
    return weight.shape[1] % 8 == 0 and not (silu and weight.shape[0] % (2 * ROWS))


def linear(
    x: Array, weight: Quantized, out: Array, card: Card, *, norm: tuple[Array, float] | None = None,
    bias: Array | None = None, residual: Array | None = None, silu: bool = False,
) -> Launch:
    """`Reference.linear` of x [tokens, in], bf16, at most LINEAR_TOKENS of them; out bf16 or float32.

    Raises ValueError where `fits` says no.
    """
    (tokens, size), rows, normed = x.shape, weight.shape[0], norm is not None
    plan = vector_plan(tokens, weight, normed, silu, card)
    if plan is None or not fits(tokens, weight, normed, silu, card):
        where = f"a card of capability {card.capability / 10}"
        raise ValueError(f"{tokens} tokens of {size} numbers do not fit quantized/linear.cu on {where}")
    blocks = min(-(-rows // (ROWS * plan.row_tiles * (2 if silu else 1))), card.multiprocessors)
    weights, eps = norm or (None, 0.0)
    numbers = *map(np.int32, (tokens, size, rows, shift(weight))), np.float32(eps)
    args = (x, weights, *weight.arrays(), bias, residual, out, *numbers)
    shape = f"BLOCK_WARPS={plan.warps}", f"NORM={normed:d}", f"ROW_TILES={plan.row_tiles}", f"SLOTS={plan.slots}"
    to = f"EARLY={plan.early}", f"SILU={silu:d}", f"OUT_BF16={out.dtype.itemsize == 2:d}"
    defines = *shape, *_defines(weight), *to
    return Launch("quantized/linear.cu", "linear", defines, (blocks,), 32 * plan.warps, args, plan.shared)


@dataclass(frozen=True)
class CodesPlan(BatchPlan):
    """Tile config and split plan of quantized/linear_batch.cu."""

    slab_runs: int  # of 64 columns, of a slab and k group
    stage_bytes: int
    slab_clocks: float

    @property
    def shared(self) -> int:
        return self.stages * self.stage_bytes

    @property
    def cost(self) -> float:
        """Clocks of a block, about: of its slabs, and of its partial sums on the way through L2 and back."""
        return self.max_slabs * self.slab_clocks + self.partial_tiles * (2000 + self.tile_floats / 8)


def batch_configs(tokens: int, weight: Quantized, silu: bool, card: Card) -> list[CodesPlan]:
    """Ways to share the slabs, one block a multiprocessor. Sums of a group and of all groups are in registers: of 32
    rows a warp and 64 tokens, or of 16 and 128; fewer where groups are small."""
    rows, size = weight.shape
    outputs, found = rows // 2 if silu else rows, []
    for row_tiles, k_groups, whole in itertools.product((2,) if silu else (2, 1), (1, 2), (False, True)):
        most = (128 if _columns_at_once(weight, 2) == MOST_COLUMNS else 96) // row_tiles
        for slab_runs, limit in itertools.product((2, 1), range(most, 15, -16)):
            column_blocks = -(-tokens // limit)
            columns = -(-tokens // column_blocks // 16) * 16
            stage_bytes = _stage_bytes(weight, row_tiles, k_groups, slab_runs, columns)
            if (stages := min(card.max_shared_bytes // stage_bytes, MAX_STAGES)) >= 3:
                break
        else:
            continue
        tiles = -(-outputs // (128 * row_tiles // k_groups // (2 if silu else 1)))
        slabs = -(-size // (RUN * slab_runs * k_groups))
        sharing = share_slabs(tiles, slabs, max(card.multiprocessors // column_blocks, 1), whole)
        clocks = _slab_clocks(weight, row_tiles, k_groups, slab_runs, columns)
        shape = columns, column_blocks, row_tiles, k_groups, stages
        found.append(CodesPlan(*shape, *sharing, slab_runs, stage_bytes, clocks))
    return found


def _stage_bytes(weight: Quantized, row_tiles: int, k_groups: int, slab_runs: int, columns: int) -> int:
    """Codes and scales of 8 warps, x, and its sums; as quantized/linear_batch.cu has them."""
    folds, is_e4m3 = RUN * slab_runs // _columns_at_once(weight, slab_runs), weight.kind == "e4m3"
    codes = 8 * row_tiles * slab_runs * (512 if weight.kind == "int4" else 1024)
    x = _up(codes + 8 * row_tiles * folds * (4 if is_e4m3 else 64)) + k_groups * slab_runs * columns * 128
    return _up(x + (0 if is_e4m3 else k_groups * folds * columns * 4))


def _up(size: int, unit: int = 128) -> int:
    return -(-size // unit) * unit


def _slab_clocks(weight: Quantized, row_tiles: int, k_groups: int, slab_runs: int, columns: int) -> float:
    """Of a slab on an H200: the longest of its bytes, its x out of L2 and its MMA, 6.5 clocks each on a quarter of a
    multiprocessor, and a fourth of the others, which get in its way."""
    memory = 8 * row_tiles * slab_runs * (544 if weight.kind == "int4" else 1056) / 17.8
    x, products = k_groups * slab_runs * columns * 128 / 64, 2 * row_tiles * columns / 8 * 4 * slab_runs * 6.5
    longest = max(memory, x, products)
    return longest + (memory + x + products - longest) / 4


@dataclass(frozen=True)
class WgmmaCodesPlan:
    """Tile config and split plan of sm90/quantized_batch.cu."""

    columns: int  # of a block
    column_blocks: int
    stages: int
    shared: int
    blocks: int
    tiles: int
    splits: int  # of k, each in another block; 1 where there are tiles enough
    max_slabs: int  # of a block
    slabs: int  # of CHUNK k, of a row
    folds: int  # groups of a slab
    slab_clocks: float

    @property
    def x_numbers(self) -> int:
        """Of x as sm90/prepare_x.cu leaves it."""
        return self.column_blocks * self.columns * self.slabs * CHUNK

    @property
    def x_sums(self) -> int:
        return self.column_blocks * self.columns * self.slabs * self.folds

    @property
    def workspace_floats(self) -> int:
        return self.column_blocks * self.blocks * WGMMA_ROWS * self.columns if self.splits > 1 else 0

    @property
    def counters(self) -> int:
        return self.column_blocks * self.tiles * 12 if self.splits > 1 else 0

    @property
    def cost(self) -> float:
        """About clocks on an H200: of a block's slabs, and of partial sums, which the last block reads alone: 1.1 us
        and, of 48 tokens, 1.2 us for each split."""
        merging = 2000 + self.splits * WGMMA_ROWS * self.columns * 4 / 18 if self.splits > 1 else 0
        return self.max_slabs * self.slab_clocks + merging


def wgmma_configs(tokens: int, weight: Quantized, silu: bool, card: Card) -> list[WgmmaCodesPlan]:
    """The fewest blocks of columns, and splits of k, at most a block a multiprocessor; with SILU one split."""
    limit = 80 if _columns_at_once(weight, 2) == MOST_COLUMNS else 48  # as registers allow
    column_blocks = -(-tokens // limit)
    columns = max(_up(-(-tokens // column_blocks), 8), 16)
    room = max(card.multiprocessors // column_blocks, 1)
    rows, size = weight.shape
    tiles, slabs, found = -(-rows // WGMMA_ROWS), -(-size // CHUNK), []
    codes, x = 12 * (1024 if weight.kind == "int4" else 2048), 2 * CHUNK * columns
    folds, scales = CHUNK // _columns_at_once(weight, 2), 12 * (16 if weight.kind == "e4m3" else 64)
    stage_bytes = _up(codes + x + folds * (columns * 4 + scales), 1024)
    exchange = 6 * 64 * columns if silu else 0  # sums of up, on their way to gate
    stages = min((card.max_shared_bytes - exchange - PREPARE_BYTES) // stage_bytes, MAX_WGMMA_STAGES)
    for splits in range(1, 2 if silu else min(slabs, 8) + 1):
        blocks = tiles * splits if splits > 1 else min(tiles, room)
        if blocks <= room:
            most = -(-tiles * splits // blocks) * -(-slabs // splits)
            shape = columns, column_blocks, stages, stages * stage_bytes + exchange
            clocks = max(codes * 1.06 * blocks * column_blocks / (132 * 17.8), (codes + x) / 64, 12 * columns + 500)
            found.append(WgmmaCodesPlan(*shape, blocks, tiles, splits, most, slabs, folds, clocks))
    return found


def uses_wgmma(plan: WgmmaCodesPlan, card: Card) -> bool:
    """Whether sm90/quantized_batch.cu is faster: where its tiles, which are larger, keep half of the card busy."""
    return plan.blocks * plan.column_blocks * 2 >= card.multiprocessors


CodesBatchPlan = CodesPlan | WgmmaCodesPlan


@lru_cache(4096)
def _batch_plan(tokens: int, kind: str, shape: tuple[int, int], group: int, silu: bool, card: Card) -> CodesBatchPlan:
    weight = Quantized(kind, shape, group)
    if card.capability == 90 and _columns_at_once(weight, 2) > 32:  # scales of smaller groups need more registers
        plan = min(wgmma_configs(tokens, weight, silu, card), key=lambda plan: plan.cost)
        if uses_wgmma(plan, card):
            return plan
    return min(batch_configs(tokens, weight, silu, card), key=lambda plan: plan.cost)


def batch_plan(tokens: int, weight: Quantized, silu: bool, card: Card) -> CodesBatchPlan:
    """The cheapest. Raises ValueError for more than BATCH_TOKENS, and for matrices that `has_kernels` refuses."""
    if not 1 <= tokens <= BATCH_TOKENS or not has_kernels(weight, silu):
        shape = f"{tokens} tokens and a {'gate and up' if silu else 'matrix'} of {weight.shape}"
        raise ValueError(f"{shape} do not fit quantized/linear_batch.cu")
    return _batch_plan(tokens, weight.kind, weight.shape, weight.group, silu, card)


def possible_plans(tokens: int, shapes: Sequence[tuple[int, int, bool]], card: Card) -> list[CodesBatchPlan]:
    """Of matrices of these shapes (in, out, silu) whose form is not known."""
    forms = ("int4", 128), ("int4", 32), ("int8", 64), ("e4m3", 128)
    weights = [(Quantized(kind, (n, k), group), silu) for kind, group in forms for k, n, silu in shapes]
    return [batch_plan(tokens, weight, silu, card) for weight, silu in weights if has_kernels(weight, silu)]


def linear_batch(
    x: Array, weight: Quantized, out: Array, p: CodesBatchPlan, scratch: Scratch, *, bias: Array | None = None,
    residual: Array | None = None, silu: bool = False,
) -> Launch:
    """As `linear`, for up to BATCH_TOKENS, with the x that `before_batch` has made."""
    tokens, (rows, size), rest = len(x), weight.shape, (bias, residual, out, scratch.workspace)
    numbers, grid = tuple(map(np.int32, (tokens, size, rows, shift(weight)))), (p.blocks, p.column_blocks)
    to = f"SILU={silu:d}", f"OUT_BF16={out.dtype.itemsize == 2:d}"
    if isinstance(p, WgmmaCodesPlan):
        prepares, x = x.ndim == 2, x.reshape(tokens, -1)
        args = (TensorMap(x, p.columns), *_boxes(weight, p, silu), *weight.arrays()[1:], scratch.x_sums, *rest)
        args += scratch.split_counter, *numbers, np.int32(p.splits)
        shape = f"COLUMNS={p.columns}", f"STAGES={p.stages}", f"PREPARES={prepares:d}"
        defines, threads = (*shape, *_defines(weight), *to), 512 if prepares or p.columns > 64 else 448
        return Launch("sm90/quantized_batch.cu", "linear_batch", defines, grid, threads, args, p.shared)
    shape = f"COLUMNS={p.columns}", f"ROW_TILES={p.row_tiles}", f"K_GROUPS={p.k_groups}", f"SLAB_RUNS={p.slab_runs}"
    args = (x, *weight.arrays(), *rest, scratch.split_counter, *numbers, np.int32(p.granularity))
    defines = *shape, f"STAGES={p.stages}", *_defines(weight, p.slab_runs), *to
    return Launch("quantized/linear_batch.cu", "linear_batch", defines, grid, 256, args, p.shared)


def _boxes(weight: Quantized, p: WgmmaCodesPlan, silu: bool) -> tuple[TensorMap, TensorMap]:
    """A slab of the codes of a block's tiles, and of their scales where it copies them: of e4m3 it does not."""
    codes, scales, _ = weight.arrays()
    tiles = WGMMA_ROWS // ROWS // (2 if silu else 1)
    of_codes = TensorMap(codes, tiles, CHUNK * ROWS // (2 if weight.kind == "int4" else 1), False)
    return of_codes, of_codes if weight.kind == "e4m3" else TensorMap(scales, tiles, 64 * p.folds, False)


def before_batch(
    x: Array, weight: Quantized, p: CodesBatchPlan, norm: tuple[Array, float] | None, scratch: Scratch
) -> tuple[list[Launch], Array]:
    """What makes the x that `linear_batch` takes, and that: x, or prepared [tokens, slabs, CHUNK]."""
    if not isinstance(p, WgmmaCodesPlan) or norm is None and p.columns <= PREPARED_COLUMNS:
        return normed(x, norm, scratch)
    (tokens, size), columns, (weights, eps) = x.shape, p.column_blocks * p.columns, norm or (None, 0.0)
    to = scratch.x[: tokens * p.slabs * CHUNK].reshape(tokens, p.slabs, CHUNK)
    args = (x, weights, to, scratch.x_sums, np.int32(tokens), np.int32(size), np.float32(eps))
    defines = (*_defines(weight), f"NORM={norm is not None:d}", "SILU=0", "OUT_BF16=1")
    grid = columns, 1 if norm else -(-p.slabs // 32)  # a thread has a quarter of a slab
    return [Launch("sm90/prepare_x.cu", "prepare_x", defines, grid, 128, args)], to


def dequantize(weight: Quantized, out: Array) -> Launch:
    """`weight.dequantize()` in out [rows, columns], bf16, columns a multiple of 8."""
    rows, columns = weight.shape
    grid = -(-columns // (8 * RUN)), -(-rows // ROWS)
    args = (*weight.arrays(), out, *map(np.int32, (rows, columns, shift(weight))))
    return Launch("quantized/dequantize.cu", "dequantize", (_defines(weight)[0],), grid, 256, args)


def words_shape(kind: str, rows: int, columns: int) -> tuple[int, ...]:
    """Of the codes of a matrix, uint32."""
    return -(-rows // ROWS), -(-columns // RUN), *(() if kind == "int4" else (2,)), 32, 4


def repack(kind: str, codes: Array, out: Array) -> Launch:
    """Plain codes uint8 [rows, columns], columns a multiple of 8, -> out uint32 [words_shape]."""
    rows, columns = codes.shape
    grid = -(-columns // (8 * RUN)), -(-rows // ROWS)
    numbers = np.int32(rows), np.int32(columns)
    return Launch("quantized/repack.cu", "repack", (f"KIND={kind.upper()}",), grid, 256, (codes, out, *numbers))


def shift(weight: Quantized) -> int:
    """Of a column to its group."""
    return ONE_GROUP if weight.group >= weight.shape[1] else weight.group.bit_length() - 1


def _columns_at_once(weight: Quantized, runs: int) -> int:
    """Whose sum is scaled: those of a group, as far as `runs` go."""
    return min(1 << shift(weight), MOST_COLUMNS, RUN * runs)


def _defines(weight: Quantized, runs: int = 2) -> tuple[str, str]:
    return f"KIND={weight.kind.upper()}", f"GROUP={_columns_at_once(weight, runs)}"
