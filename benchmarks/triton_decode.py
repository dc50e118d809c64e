"""Decode attention over a BF16 cache in Triton, as a peer of `bench.py kernel`: split-KV on tensor cores, tuned by
trying.

    out[b,h,:] = softmax_t(<q[b,h,:], key[b,t,:]> / sqrt(head_dim)) . value[b,t,:]

`attend`, grid (splits, kv_heads, batch): a program takes `per_split` tokens of one kv head for all of its q heads,
which are the rows of both products, padded to 16 with zeros. `combine` merges the splits. Keys and values are read
once; a split leaves head_dim + 1 floats per q head. Triton compiles when a function is first called, and where
TRITON_INTERPRET=1 was set at import it runs on NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

Tensor = Any


class Tuning(NamedTuple):
    block: int  # tokens of a tile
    warps: int
    stages: int  # tiles on their way
    programs: int  # for each multiprocessor


TILES = ((64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 4, 3), (128, 8, 3))
TUNINGS = [Tuning(*tile, programs) for tile in TILES for programs in (1, 2, 3, 4, 8)]


@triton.jit
def attend(
    q, k, v, lengths, parts, logs, scale, per_split, row_stride, head_stride,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts[b,h,split,:]: the attention over the split alone; logs[b,h,split]: log2 of the sum of its exponentials,
    -inf if it is empty."""
    split, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    splits, kv_heads = tl.num_programs(0), tl.num_programs(1)
    members, channels, steps = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, BLOCK)
    q_head = (row * kv_heads + head) * GROUP + members
    inside = members[:, None] < GROUP
    query = tl.load(q + q_head[:, None] * DIM + channels, mask=inside, other=0.0)
    base = row * row_stride + head * head_stride
    begin = split * per_split
    end = tl.minimum(begin + per_split, tl.load(lengths + row))
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DIM], tl.float32)
    for first in range(begin, end, BLOCK):
        tokens = first + steps
        there, at = (tokens < end)[:, None], base + tokens[:, None] * DIM + channels
        keys = tl.load(k + at, mask=there, other=0.0)
        logits = tl.where(
            (tokens < end)[None, :], tl.dot(query, tl.trans(keys)) * scale, float("-inf")
        )  # [ROWS, BLOCK]
        higher = tl.maximum(top, tl.max(logits, 1))
        weights, shrink = tl.exp2(logits - higher[:, None]), tl.exp2(top - higher)
        values = tl.load(v + at, mask=there, other=0.0)
        out = out * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
        total = total * shrink + tl.sum(weights, 1)
        top = higher
    place = q_head * splits + split
    safe = tl.where(total > 0, total, 1.0)
    tl.store(parts + place[:, None] * DIM + channels, out / safe[:, None], mask=inside)
    tl.store(logs + place, tl.where(total > 0, top + tl.log2(safe), float("-inf")), mask=members < GROUP)


@triton.jit
def combine(parts, logs, out, splits, DIM: tl.constexpr, SPLITS: tl.constexpr, SLICE: tl.constexpr):
    """Grid (batch * q_heads, DIM / SLICE): the mean of a head's parts, weighted by the sums of their exponentials."""
    head, some = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
    channels = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    log = tl.load(logs + head * splits + some, mask=some < splits, other=float("-inf"))
    weights = tl.exp2(log - tl.max(log, 0))
    part = tl.load(parts + (head * splits + some)[:, None] * DIM + channels, mask=(some < splits)[:, None], other=0.0)
    mean = tl.sum(part * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + head * DIM + channels, mean.to(out.dtype.element_ty))


def decode(
    q: Tensor, caches: Sequence[tuple[Tensor, Tensor]], lengths: Tensor, tuning: Tuning, multiprocessors: int
) -> list[Callable[[], Tensor]]:
    """One call per cache, each returning out, [batch, q_heads, head_dim] in BF16; all of them share one workspace.

    q: like out. caches: keys and values, [batch, kv_heads, tokens, head_dim] in BF16, equally strided, each head's
    tokens contiguous. lengths: int32 [batch], of 1 to `tokens`. Raises ValueError where head_dim is no power of two.
    """
    batch, q_heads, dim = q.shape
    kv_heads, tokens = caches[0][0].shape[1:3]
    group = q_heads // kv_heads
    if dim & (dim - 1):
        raise ValueError(f"head_dim {dim} is no power of two, which a tile of Triton's must be")
    wanted = max(1, tuning.programs * multiprocessors // (batch * kv_heads))
    per_split = triton.cdiv(triton.cdiv(tokens, wanted), tuning.block) * tuning.block
    splits = triton.cdiv(tokens, per_split)
    parts = torch.empty((batch, q_heads, splits, dim), dtype=torch.float32, device=q.device)
    logs = torch.empty((batch, q_heads, splits), dtype=torch.float32, device=q.device)
    out, scale = torch.empty_like(q), dim**-0.5 * 1.4426950408889634  # log2(e): exponentials are to the base 2
    shape = {"GROUP": group, "ROWS": max(16, triton.next_power_of_2(group)), "DIM": dim, "BLOCK": tuning.block}
    part, options = min(32, dim), {"num_warps": tuning.warps, "num_stages": tuning.stages}

    def call(k: Tensor, v: Tensor) -> Tensor:
        strides = k.stride(0), k.stride(1)
        attend[splits, kv_heads, batch](q, k, v, lengths, parts, logs, scale, per_split, *strides, **shape, **options)
        combine[batch * q_heads, dim // part](
            parts, logs, out, splits, DIM=dim, SPLITS=triton.next_power_of_2(splits), SLICE=part
        )
        return out

    return [lambda k=k, v=v: call(k, v) for k, v in caches]
