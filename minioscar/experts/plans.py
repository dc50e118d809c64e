"""Plans and launches of a layer of experts: experts/route.cu, and experts/experts.cu or experts/quantized.cu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache import BF16
from ..ops.launch import Card, Launch, TensorMap
from ..quantized import RUN, Quantized
from ..quantized.plans import shift

if TYPE_CHECKING:
    from ..config import Config, Experts

Array = Any
ALONE = ("ALONE=1",)  # what the experts of a card of several make, without the residual
FEW = 8  # tokens whose experts every block of experts.cu finds by itself
WARPS = 16  # of a block of experts.cu
MOST_PER_TOKEN = 32  # a lane of route.cuh keeps one choice
WIDE_PAIRS = 4  # on average an expert has more pairs: up to 16 of them share a reading of its weights then, else 8
EXPERT_TOKENS = 8192  # whose pairs are in memory at once
WGMMA_PAIRS, WGMMA_ROWS = 128, 256  # of an item of sm90/experts.cu
MANY_PAIRS = 8  # on average an expert has more pairs: on compute capability 9.0 warpgroups take them
MANY_CODED_PAIRS = 64  # the same of quantized matrices, which are dequantized for it: two experts' time each


def unsupported(config: Config) -> str | None:
    """Why the experts of a model have no kernels, or None."""
    if config.experts and (config.hidden_size % 8 or config.intermediate_size % 8):
        return f"sizes {config.hidden_size}, {config.intermediate_size} of experts are not multiples of 8"
    if config.experts and config.experts.per_token > MOST_PER_TOKEN:
        return f"{config.experts.per_token} experts a token are more than {MOST_PER_TOKEN}"
    return None


@dataclass(frozen=True)
class TeamPlan:
    """How the warps of a block of experts.cu share their items."""

    warps: int  # of a team, that split k
    runs: int  # of 32 k, in registers


@lru_cache
def team_plan(size: int, silu: bool) -> TeamPlan:
    """The one whose rounds have the most weights to load, for rows of `size` numbers. Independent of the tokens, since
    it decides the order of sums."""
    plans = [TeamPlan(warps, runs) for runs in ((4,) if silu else (8, 6)) for warps in (16, 8, 4, 2)]
    round_k = {plan: 32 * plan.runs * plan.warps for plan in plans}
    return max(plans, key=lambda plan: size / (-(-size // round_k[plan]) * round_k[plan]))


@lru_cache
def codes_plan(size: int, silu: bool, kind: str) -> TeamPlan:
    """The same for experts/quantized.cu, whose runs have 64 k: the fullest rounds, for up of the most warps, whose
    items the blocks share more evenly, else of the most runs."""
    most = 4 if kind == "int4" else 2 if silu else 3  # as registers allow
    plans = [TeamPlan(warps, runs) for runs in range(most, 0, -1) for warps in (16, 8, 4, 2)]

    def preference(plan: TeamPlan) -> tuple[float, int, int]:
        runs, at_once = -(-size // RUN), plan.runs * plan.warps
        full = runs / (-(-runs // at_once) * at_once)
        return (full, plan.warps, plan.runs) if silu else (full, plan.runs, plan.warps)

    return max(plans, key=preference)


@dataclass(frozen=True)
class Routes:
    """What route.cu makes of the logits of many tokens; pair t * per_token + s is the s-th choice of token t."""

    chosen: Array  # int32 [pairs]: the expert of each
    weights: Array  # float32 [pairs]
    sorted: Array  # int32 [pairs]: pairs by expert
    entries: Array  # int32 [1 + entries, 4]
    columns: int  # pairs of an entry at most

    @property
    def of_warpgroups(self) -> bool:
        """Whether sm90/experts.cu takes them."""
        return self.columns == WGMMA_PAIRS

    @classmethod
    def allocate(cls, xp: Any, tokens: int, e: Experts, card: Card, coded: bool = False) -> Routes:
        """coded: of quantized matrices."""
        pairs = tokens * e.per_token
        columns = WGMMA_PAIRS if uses_wgmma(pairs, e, card, coded) else 16 if pairs > WIDE_PAIRS * e.count else 8
        chosen, ordered, entries = (xp.empty(shape, np.int32) for shape in (pairs, pairs, _entries(pairs, columns, e)))
        return cls(chosen, xp.empty(pairs, np.float32), ordered, entries, columns)

    def launches(self, logits: Array, e: Experts, lengths: Array | None = None) -> list[Launch]:
        """logits float32 [tokens, experts]. lengths: int32 [tokens], below 0 where a row is not in use."""
        tokens, pairs, columns = (np.int32(n) for n in (len(logits), len(self.chosen), self.columns))
        choose = logits, lengths, self.chosen, self.weights, tokens
        sort = self.chosen, self.sorted, self.entries, pairs, columns
        return [
            Launch("experts/route.cu", "choose", _defines(e), (-(-len(logits) // 8),), 256, choose),
            Launch("experts/route.cu", "sort", _defines(e), (1,), 512, sort),
        ]


def uses_wgmma(pairs: int, e: Experts, card: Card, coded: bool = False) -> bool:
    return card.capability == 90 and pairs > (MANY_CODED_PAIRS if coded else MANY_PAIRS) * e.count


def _entries(pairs: int, columns: int, e: Experts) -> tuple[int, int]:
    """The number of entries, then the entries: every expert may have one that is not full."""
    return 1 + min(pairs, e.count + pairs // columns), 4


def _defines(e: Experts) -> tuple[str, ...]:
    return f"EXPERTS={e.count}", f"TOP_K={e.per_token}", f"NORMALIZED={e.normalized:d}"


Choices = Array | Routes  # of up to FEW tokens the router's logits, float32 [tokens, experts]


def are_few(tokens: int, config: Config, card: Card) -> bool:
    up, down = (config.hidden_size, True), (config.intermediate_size, False)
    return tokens <= FEW and max(_shared(tokens, *of, config.experts) for of in (up, down)) <= card.max_shared_bytes


def _shared(tokens: int, size: int, silu: bool, e: Experts) -> int:
    """Bytes of dynamic shared memory of experts.cu for few tokens."""
    rows = tokens * (1 if silu else e.per_token) * (-(-size // 64) * 128 + 64)
    return rows + _sums(1, silu) + 12 * e.count + 4 * FEW * e.per_token + 4 + FEW


def _sums(column_tiles: int, silu: bool) -> int:
    """Bytes of the sums of two rounds."""
    return 2 * (2 if silu else 1) * WARPS * 16 * 8 * column_tiles * 4


@dataclass(frozen=True)
class Product:
    """One of the two products of experts.cu; of a matrix that is quantized, [experts * out, in], of quantized.cu.

    silu: up, weight bf16 [experts, 2 * n, hidden], out bf16 [pairs, n], x bf16 [tokens, hidden], of few tokens not
    normed yet; of warpgroups x [pairs, hidden] and out are in the order of the sorted pairs. Else down, weight bf16
    [experts, hidden, n], x bf16 [pairs, n]; of few tokens out = residual + what their experts make, bf16 [tokens,
    hidden], which may be the residual; of more what each pair adds, float32 [pairs, hidden].
    """

    x: Array
    weight: Array
    out: Array
    silu: bool
    norm: tuple[Array | None, float] = (None, 0.0)  # of few tokens, up
    residual: Array | None = None  # of few tokens, down

    def launch(self, choices: Choices, e: Experts, card: Card, lengths: Array | None = None) -> Launch:
        """lengths: of few tokens, as `Routes.launches` has them."""
        if isinstance(choices, Routes) and choices.of_warpgroups:
            return self._wgmma(choices, card)
        coded, of_routes, few = isinstance(self.weight, Quantized), (None,) * 3, not isinstance(choices, Routes)
        rows, size = self.weight.shape[-2] // (e.count if coded else 1), self.weight.shape[-1]
        plan = codes_plan(size, self.silu, self.weight.kind) if coded else team_plan(size, self.silu)
        tiles, teams = -(-rows // (32 if self.silu else 16)), WARPS // plan.warps
        if few:
            tokens, column_tiles, shared = len(choices), 1, _shared(len(choices), size, self.silu, e)
            items = -(-tokens * e.per_token * tiles // teams) if self.silu else tiles
        else:
            of_routes = choices.sorted, choices.entries, choices.weights
            tokens, column_tiles = len(choices.chosen) // e.per_token, choices.columns // 8
            shared, items = _sums(column_tiles, self.silu), -(-len(choices.entries) * tiles // teams)
        kind = f"SILU={self.silu:d}", f"OUT_BF16={self.out.dtype.itemsize == 2:d}", f"FEW={few:d}"
        shape = f"TEAM_WARPS={plan.warps}", f"RUNS={plan.runs}", f"COLUMN_TILES={column_tiles}"
        matrix, numbers = (self.weight,), (tokens, size, rows)
        if coded:  # many pairs leave registers for fewer runs; the order of sums is that of the warps alone
            most = plan.runs if few else 3 if column_tiles == 1 else 1 if self.silu else 2
            runs = next(n for n in range(most, 0, -1) if plan.runs % n == 0)
            shape = shape[0], f"RUNS={runs}", shape[2]
            matrix, numbers = self.weight.arrays(), (*numbers, shift(self.weight))
            shape = *shape, f"KIND={self.weight.kind.upper()}", f"GROUP={min(1 << shift(self.weight), RUN)}"
        arrays = self.x, self.norm[0], *matrix, self.residual, choices if few else None, lengths, *of_routes, self.out
        args = (*arrays, *map(np.int32, numbers), np.float32(self.norm[1]))
        grid, source = (min(items, card.multiprocessors),), "quantized" if coded else "experts"
        defines = *_defines(e), *kind, *shape, *ALONE[: few and not self.silu and self.residual is None]
        return Launch(f"experts/{source}.cu", "experts", defines, grid, 32 * WARPS, args, shared)

    def _wgmma(self, routes: Routes, card: Card) -> Launch:
        count, rows, size = self.weight.shape
        tile_rows = WGMMA_ROWS // 2 if self.silu else WGMMA_ROWS
        maps = TensorMap(self.x, 64), TensorMap(self.weight.reshape(count * rows, size), tile_rows)
        args = (*maps, routes.sorted, routes.entries, routes.weights, self.out, np.int32(size), np.int32(rows))
        stage_bytes = (WGMMA_PAIRS + WGMMA_ROWS) * 128
        stages = card.max_shared_bytes // stage_bytes
        kind = f"SILU={self.silu:d}", f"OUT_BF16={self.out.dtype.itemsize == 2:d}"
        defines = f"WARPGROUPS={WGMMA_PAIRS // 64}", f"ROWS={WGMMA_ROWS}", f"STAGES={stages}", *kind
        threads, shared = 2 * WGMMA_PAIRS + 128, stages * stage_bytes
        return Launch("sm90/experts.cu", "experts", defines, (card.multiprocessors,), threads, args, shared)


def gather(x: Array, routes: Routes, e: Experts, out: Array, h: Array) -> Launch:
    """The tokens of the pairs by expert: x bf16 [tokens, n], out bf16 [pairs, n], n a multiple of 8; 0 in out and in h
    where a pair's row is not in use."""
    args = x, routes.sorted, out, h, np.int32(x.shape[1]), np.int32(h.shape[1])
    return Launch("experts/route.cu", "gather", _defines(e), (len(out),), 128, args)


def combine(parts: Array, x: Array, e: Experts, lengths: Array | None = None, alone: bool = False) -> Launch:
    """x += what the pairs of each token add, or alone x = that: x bf16 [tokens, n], parts float32 [pairs, n], n a
    multiple of 8. lengths: as `Routes.launches` has them."""
    grid, defines = (len(x), -(-x.shape[1] // 2048)), (*_defines(e), *ALONE[:alone])
    return Launch("experts/route.cu", "combine", defines, grid, 256, (parts, lengths, x, x, np.int32(x.shape[1])))


def work_bytes(config: Config, tokens: int, card: Card) -> int:
    """Of the arrays of `on_card.forward` for so many tokens, at most EXPERT_TOKENS of which are there at once."""
    c, e, tokens = config, config.experts, min(tokens, EXPERT_TOKENS)
    pairs = tokens * e.per_token
    logits, h, coded = 4 * tokens * e.count, BF16.itemsize * pairs * c.intermediate_size, bool(c.stored_bits(False))
    if are_few(tokens, c, card):
        return logits + h
    routes, wgmma = 12 * pairs + 16 * (e.count + pairs // 8), uses_wgmma(pairs, e, card, coded)
    rows = tokens + pairs * wgmma  # normed; and by expert
    dense = BF16.itemsize * e.count * 2 * c.intermediate_size * c.hidden_size * (wgmma and coded)
    return logits + h + routes + BF16.itemsize * rows * c.hidden_size + 4 * pairs * c.hidden_size + dense
