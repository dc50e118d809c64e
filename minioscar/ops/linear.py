"""Launches of linear layers and what stands around them: norms, activations, sums; and the products' scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache import BF16
from .launch import Card, Launch
from .linear_batch import BATCH_TOKENS, LinearPlan, Scratch, batch_plan, linear_batch

if TYPE_CHECKING:
    from ..config import Config

Array = Any

LINEAR_TOKENS = 8  # of linear.cu: the columns of an MMA
SIZES = {"workspace": "workspace_floats", "split_counter": "counters", "x": "x_numbers", "x_sums": "x_sums"}  # of plans


def fits(tokens: int, size: int, norm: bool, silu: bool, card: Card) -> bool:
    """Whether linear.cu takes this many tokens of `size` numbers; normed, they stay in shared memory."""
    has_columns = 1 <= tokens <= LINEAR_TOKENS and size % 8 == 0
    return has_columns and _linear_bytes(tokens, size, norm, silu) <= card.max_shared_bytes


def _linear_bytes(tokens: int, size: int, norm: bool, silu: bool) -> int:
    sums = 2 * (2 if silu else 1) * linear_warps(size, silu) * 16 * 8 * 4
    return sums + (tokens * (-(-size // 64) * 128 + 64) if norm else 0)


def linear_warps(size: int, silu: bool) -> int:
    """Warps that split k: as many as have weights to load in at least three fifths of their rounds. Independent of the
    tokens, since it decides the order of sums."""
    rounds = {warps: (4 if silu else 8) * 32 * warps for warps in (16, 8)}  # k that all ask for at a time
    return next((warps for warps, k in rounds.items() if size / (-(-size // k) * k) >= 0.6), 4)


def linear(
    x: Array, weight: Array, out: Array, card: Card, *,
    norm: tuple[Array, float] | None = None, bias: Array | None = None, residual: Array | None = None,
    silu: bool = False,
) -> Launch:
    """`Reference.linear` of x [tokens, in], bf16, at most LINEAR_TOKENS of them; out bf16 or float32.

    Raises ValueError where `fits` says no.
    """
    (tokens, size), (rows, _), tiles = x.shape, weight.shape, 2 if silu else 1
    if not fits(tokens, size, norm is not None, silu, card):
        where = f"a card of capability {card.capability / 10}"
        raise ValueError(f"{tokens} tokens of {size} numbers do not fit linear.cu on {where}")
    shared, warps = _linear_bytes(tokens, size, norm is not None, silu), linear_warps(size, silu)
    resident = min(16 // warps, card.max_shared_bytes // (shared + 1024) or 1)  # blocks a multiprocessor
    blocks = min(-(-rows // (16 * tiles)), card.multiprocessors * resident)
    weights, eps = norm or (None, 0.0)
    args = (x, weights, weight, bias, residual, out, *map(np.int32, (tokens, size, rows)), np.float32(eps))
    flags = f"NORM={norm is not None:d}", f"SILU={silu:d}", f"OUT_BF16={out.dtype.itemsize == 2:d}"
    defines = f"BLOCK_WARPS={warps}", *flags
    return Launch("linear.cu", "linear", defines, (blocks,), 32 * warps, args, shared)


def rms_norm(x: Array, weight: Array, eps: float, out: Array) -> Launch:
    """x [tokens, size] -> out, both bf16."""
    args = (x, weight, out, np.int32(x.shape[1]), np.float32(eps))
    return Launch("rms_norm.cu", "rms_norm", ("SILU=0", "OUT_BF16=1"), (len(x),), 256, args)


def silu_mul(gate_up: Array, out: Array) -> Launch:
    """`Reference.silu_mul`: gate_up [tokens, 2 n] -> out [tokens, n], both bf16, n a multiple of 8."""
    return _elementwise("silu_mul", out, gate_up, out)


def add(x: Array, y: Array) -> Launch:
    """y += x in bf16: y [tokens, n], x the same or a bias [n], n a multiple of 8."""
    return _elementwise("add", y, x, y, np.int32(y.shape[1] // 8 if x.ndim == 2 else 0))


def _elementwise(name: str, out: Array, a: Array, b: Array, *more: np.int32) -> Launch:
    tokens, size = out.shape
    if size % 8:
        raise ValueError(f"rows of {size} numbers do not fit elementwise.cu, which takes multiples of 8")
    grid = tokens, -(-size // 4096)
    return Launch("elementwise.cu", name, (), grid, 256, (a, b, np.int32(size // 8), *more))


def embed(table: Array, tokens: Array, x: Array) -> Launch:
    """x[i] = table[tokens[i]]: table bf16 [vocab, hidden], tokens int32 [n], x bf16 [n, hidden]; hidden % 8 = 0."""
    return Launch("step.cu", "embed", (), (len(tokens),), 128, (table, tokens, x, np.int32(table.shape[1])))


@dataclass(frozen=True)
class Kernels:
    """Of products with one kind of matrix; parameters as `ARRAYS` has them."""

    fits: Callable[[int, Array, bool, bool, Card], bool]  # whether `few` takes so many tokens
    few: Callable[..., Launch]
    plan: Callable[[int, Array, bool, Card], LinearPlan]  # of more tokens
    # of more tokens, what makes the x that the product takes, and that; then the product
    before: Callable[[Array, Array, LinearPlan, tuple[Array, float] | None, Scratch], tuple[list[Launch], Array]]
    many: Callable[..., Launch]
    # of matrices whose sizes alone are known: (in, out, silu)
    possible_plans: Callable[[int, Sequence[tuple[int, int, bool]], Card], list[LinearPlan]]


def normed(x: Array, norm: tuple[Array, float] | None, scratch: Scratch) -> tuple[list[Launch], Array]:
    """Before products that do not norm by themselves."""
    if norm is None:
        return [], x
    to = scratch.x[: x.size].reshape(x.shape)
    return [rms_norm(x, *norm, to)], to


ARRAYS = Kernels(
    fits=lambda tokens, weight, norm, silu, card: fits(tokens, weight.shape[1], norm, silu, card),
    few=linear,
    plan=lambda tokens, weight, silu, card: batch_plan(tokens, weight.shape[1], weight.shape[0], silu, card),
    before=lambda x, weight, plan, norm, scratch: normed(x, norm, scratch),
    many=linear_batch,
    possible_plans=lambda tokens, shapes, card: [batch_plan(tokens, *shape, card) for shape in shapes],
)
OTHERS: dict[type, Kernels] = {}  # type of a matrix that is no array -> what its package has put here


def kernels_of(weight: Any) -> Kernels:
    return next((kernels for kind, kernels in OTHERS.items() if isinstance(weight, kind)), ARRAYS)


class Products:
    """For one card and one stream, whose launches take the scratch memory in turn. Grown buffers are reallocated;
    earlier launches keep a reference to the old ones."""

    def __init__(self, xp: Any, card: Card):
        self.xp, self.card = xp, card
        self.scratch = Scratch(*(xp.zeros(0, dtype) for dtype in (np.float32, np.int32, BF16, np.float32)))

    def launches(
        self, x: Array, weight: Array, out: Array, *, norm: tuple[Array, float] | None = None, **rest: Any
    ) -> list[Launch]:
        """`Reference.linear` of at most BATCH_TOKENS tokens, a multiple of 8 wide; parameters as `linear` has them."""
        tokens, silu, kernels = len(x), rest.get("silu", False), kernels_of(weight)
        if kernels.fits(tokens, weight, norm is not None, silu, self.card):
            return [kernels.few(x, weight, out, self.card, norm=norm, **rest)]
        plan = kernels.plan(tokens, weight, silu, self.card)
        self.reserve([plan], 0 if norm is None else x.size)
        before, x = kernels.before(x, weight, plan, norm, self.scratch)
        return [*before, kernels.many(x, weight, out, plan, self.scratch, **rest)]

    def reserve(self, plans: Sequence[LinearPlan], normed: int = 0) -> None:
        """Scratch for all of these at once: recorded launches would keep each buffer that was too small. normed:
        numbers of an x that is normed."""
        for name, needed in _scratch_sizes(plans, normed).items():
            if len(old := getattr(self.scratch, name)) < needed:  # counters are 0 before a launch
                self.scratch = replace(self.scratch, **{name: self.xp.zeros(needed, old.dtype)})


def _scratch_sizes(plans: Sequence[LinearPlan], normed: int) -> dict[str, int]:
    """Numbers of each array of `Scratch`."""
    sizes = {name: max((getattr(p, of) for p in plans), default=0) for name, of in SIZES.items()}
    return sizes | {"x": max(sizes["x"], normed)}


def step_plans(config: Config, tokens: int, card: Card) -> list[LinearPlan]:
    """Of the matrices of a model, for so many tokens; none for few, which linear.cu takes without scratch."""
    if tokens <= LINEAR_TOKENS:
        return []
    c = config
    shapes = (c.hidden_size, c.qkv_size, False), (c.q_size, c.hidden_size, False)
    shapes += ((c.hidden_size, c.vocab_size, False),)
    if c.experts:
        shapes += ((c.hidden_size, c.experts.count, False),)  # the router
    else:
        shapes += (c.hidden_size, 2 * c.intermediate_size, True), (c.intermediate_size, c.hidden_size, False)
    shapes = [shape for shape in shapes if shape[0] % 8 == 0]
    kinds = [ARRAYS, *(OTHERS.values() if c.stored_bits(False) else ())]
    return [plan for kernels in kinds for plan in kernels.possible_plans(tokens, shapes, card)]


def scratch_bytes(config: Config, tokens: int, card: Card) -> int:
    """Of `Products` for the matrices of a model and so many tokens."""
    plans = step_plans(config, min(tokens, BATCH_TOKENS), card)
    sizes = _scratch_sizes(plans, tokens * config.hidden_size if plans else 0)
    return sum(count * (BF16.itemsize if name == "x" else 4) for name, count in sizes.items())
