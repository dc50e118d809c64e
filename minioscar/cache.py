"""The KV cache: packed blocks, sinks and residual window, or plain BF16; allocated once, nothing grows.

A sequence of length L keeps its first L - L % WINDOW tokens packed and the newest L % WINDOW in BF16. What the arithmetic of a
block is stands in oscar.py; who writes and reads the arrays is `ops` (append, attention).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from .config import Config
from .oscar import WINDOW, Scheme

if TYPE_CHECKING:
    from .ops.reference import Reference

Array = Any
BF16 = np.dtype(ml_dtypes.bfloat16)


def layout(config: Config, scheme: Scheme, batch: int, context: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, dtype) of the arrays of one layer, in their plain form; another back end may put the same bytes into pages.

    The axes are batch, kv_heads, tokens (or groups of tokens, or blocks' worth of them), channels (or groups, or packed bytes).
    """
    heads, dim = config.num_kv_heads, config.head_dim
    if not scheme.quantized:
        return {"keys": ((batch, heads, context, dim), BF16), "values": ((batch, heads, context, dim), BF16)}
    tokens = context // WINDOW * WINDOW  # a partial block at the end of the context never leaves the window
    packed = dim * scheme.bits // 8
    value_groups = dim // scheme.value_group(dim)
    key_params = (tokens // scheme.group, dim) if scheme.key_axis == "token" else (tokens, value_groups)
    arrays = {
        "key_codes": ((batch, heads, tokens, packed), np.uint8),
        "key_step": ((batch, heads, *key_params), np.float16),
        "key_min": ((batch, heads, *key_params), np.float16),
        "value_codes": ((batch, heads, tokens, packed), np.uint8),
        "value_step": ((batch, heads, tokens, value_groups), np.float16),
        "window_keys": ((batch, heads, WINDOW, dim), BF16),
        "window_values": ((batch, heads, WINDOW, dim), BF16),
    }
    if scheme.codebook:
        del arrays["key_min"]
    elif not scheme.symmetric_values:
        arrays["value_min"] = arrays["value_step"]
    if scheme.outliers:
        kept = (batch, heads, tokens // WINDOW, scheme.outliers)
        arrays |= {"outlier_keys": ((*kept, dim), BF16), "outlier_values": ((*kept, dim), BF16), "outlier_places": (kept, np.uint8)}
    if scheme.scale:
        arrays["norms"] = ((batch, tokens), np.float32)
    if scheme.sinks:
        arrays["sink_keys"] = arrays["sink_values"] = ((batch, heads, scheme.sinks, dim), BF16)
    return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in arrays.items()}


def row_layout(config: Config, scheme: Scheme, length: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, dtype) of what one layer of a row of `length` tokens holds, in plain form: `layout` without the batch axis, cut.

    This is what a saved cache consists of. Arrays that would be empty are left out.
    """
    capacity = min(-(-length // WINDOW) * WINDOW, config.max_context)
    tokens, rows = length // WINDOW * WINDOW if scheme.quantized else length, {}
    whole = capacity // WINDOW * WINDOW if scheme.quantized else capacity  # tokens that the arrays of `layout` are for
    for name, (shape, dtype) in layout(config, scheme, 1, capacity).items():
        size = list(shape[1:])  # [kv_heads, tokens or groups or blocks, ...]; norms are [tokens]
        if name == "norms":
            size[0] = min(length, size[0])
        elif name.startswith("window"):
            size[1] = length - tokens
        elif name.startswith("sink"):
            size[1] = size[1] if tokens else 0
        else:
            size[1] = size[1] * tokens // whole if whole else 0
        rows[name] = (tuple(size), dtype)
    return {name: (shape, dtype) for name, (shape, dtype) in rows.items() if math.prod(shape)}


def cache_bytes(config: Config, scheme: Scheme, batch: int, context: int) -> int:
    """Bytes of a whole cache, before it is made; equal to the `nbytes` that it will have."""
    arrays = layout(config, scheme, batch, context).values()
    return config.num_layers * sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays)


def left_after_cut(scheme: Scheme, held: int, length: int) -> int:
    """How many tokens of a row of `held` are left when it is cut to `length`.

    The window can be cut anywhere. A packed block cannot be taken apart, so a cut within one keeps the blocks before it: up to
    WINDOW - 1 tokens fewer than asked for.
    """
    if length >= held:
        return held
    inside = not scheme.quantized or length >= held - held % WINDOW
    return length if inside else length - length % WINDOW


@dataclass(frozen=True)
class Batch:
    """The new tokens of one forward pass, sequence after sequence, without padding.

    slots[i] is the cache row of sequence i, starts[i] its length before this pass, counts[i] its new tokens.
    """

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def positions(self) -> np.ndarray:
        """The position of every new token; int64 [tokens]."""
        return np.concatenate([np.arange(s, s + n) for s, n in zip(self.starts, self.counts, strict=True)])

    @property
    def last(self) -> np.ndarray:
        """Where each sequence's last new token stands among the tokens; int64 [sequences]."""
        return np.cumsum(self.counts) - 1

    def spans(self) -> list[tuple[int, int, slice]]:
        """(slot, start, where its tokens stand) of each sequence."""
        ends = np.cumsum(self.counts).tolist()
        return [(s, p, slice(e - n, e)) for s, p, n, e in zip(self.slots, self.starts, self.counts, ends, strict=True)]


class Cache:
    """Keys and values of `batch` sequences of at most `context` tokens, in the given scheme.

    layers[i] is a dict of the arrays that `layout` names, parts of `whole`, which has one more axis in front: what is done for all
    layers at once takes it. lengths[b] counts the tokens of row b (host, int64).
    """

    def __init__(self, config: Config, scheme: Scheme, batch: int, context: int, ops: Reference):
        self.scheme, self.context = scheme, context
        self.lengths = np.zeros(batch, np.int64)
        shapes = ops.layout(config, scheme, batch, context)
        self.whole = {name: ops.xp.zeros((config.num_layers, *shape), dtype) for name, (shape, dtype) in shapes.items()}
        self.layers = [{name: array[i] for name, array in self.whole.items()} for i in range(config.num_layers)]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for layer in self.layers for array in layer.values())

    def place(self, slots: list[int], counts: list[int]) -> Batch:
        """Room for counts[i] new tokens in row slots[i]. Raises ValueError if a row would grow past the context."""
        starts = [int(self.lengths[s]) for s in slots]
        for slot, start, count in zip(slots, starts, counts, strict=True):
            if count < 1 or start + count > self.context:
                raise ValueError(f"row {slot} holds {start} of {self.context} tokens; {count} more do not fit")
        return Batch(tuple(slots), tuple(starts), tuple(counts))

    def advance(self, batch: Batch) -> None:
        """The new tokens of `batch` are now part of their rows."""
        for slot, start, count in zip(batch.slots, batch.starts, batch.counts, strict=True):
            self.lengths[slot] = start + count

    def broken_off(self, batch: Batch) -> None:
        """After a pass that ended midway: some layers have its tokens and others not, and windows may be overwritten."""
        for slot, start in zip(batch.slots, batch.starts, strict=True):
            self.lengths[slot] = start - start % WINDOW if self.scheme.quantized else start

    def truncate(self, slot: int, length: int) -> int:
        """Forgets the tokens of a row from `length` on; returns how many are left (`left_after_cut`). The caller feeds the rest again."""
        self.lengths[slot] = left_after_cut(self.scheme, int(self.lengths[slot]), length)
        return int(self.lengths[slot])

    def copy(self, source: int, target: int) -> None:
        """Row `target` becomes what row `source` is."""
        for layer in self.layers:
            for array in layer.values():
                array[target] = array[source]
        self.lengths[target] = self.lengths[source]

    def reset(self, slot: int) -> None:
        """Row `slot` is empty again. What its arrays hold is never read: every read is bounded by the length."""
        self.lengths[slot] = 0
