"""The same operations on CuPy: raw kernels (kernels/*.cu), and cuBLAS for the products of a prefill.

Quantized caches are pages (kernels/LAYOUT.md). Where the kernels have no page for a scheme or head_dim (`raw.unsupported`: quarot,
whose key groups lie along channels, and unusual head sizes) or do not know how to fill it (shaped rounding, a codebook, outlier
tokens), the reference's arrays and array code serve on the GPU too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import oscar
from ..cache import BF16, Batch, Cache
from ..config import Config
from ..decoding import Decoder
from ..oscar import WINDOW, Scheme
from ..sampling import RowSampling
from ..weights import Layer, Tensor
from . import blas, card, pages, raw, raw_batch, raw_dense, repage
from .decode_step import DecodeStep, unsupported
from .products import Products, batch_plans
from .queued import Queue, QueuedDecoder
from .reference import New, Reference
from .upload import Upload

if TYPE_CHECKING:
    from ..model import Model

Array = Any
MLP_TOKENS = 8192  # whose gate and up projections are in memory at once


@dataclass(frozen=True)
class Indices:
    """A batch as the kernels want it: int32 arrays on the device."""

    batch: Batch
    positions: Array  # [tokens]
    rows: Array  # [tokens]: the cache row of each
    slots: Array  # [sequences]
    starts: Array
    counts: Array
    firsts: Array  # [sequences]: where a sequence's first token stands among the tokens
    first_tiles: Array  # [sequences]: of raw.Tiles
    lengths: Array  # [cache rows]: tokens before this pass, -1 for a row that is not in the batch


class Cuda(Reference):
    name = "cuda"
    dtype = BF16

    def __init__(self) -> None:
        import cupy

        self.xp = cupy
        properties = cupy.cuda.runtime.getDeviceProperties(0)
        self.multiprocessors = properties["multiProcessorCount"]
        self.capability = 10 * properties["major"] + properties["minor"]
        self.indices: Indices | None = None
        self.scheduled: Indices | None = None  # the pass that the schedule of decode attention is for
        self.scratch: dict[tuple, tuple[Array, Array, Array]] = {}
        self.turn = 0  # of the next launch of decode attention
        self.products = Products(self.xp, self.multiprocessors, self.capability)

    def run(self, launch: raw.Launch) -> None:
        card.run(launch)

    # --- between host and device

    def array(self, x: np.ndarray) -> Array:
        return self.xp.asarray(np.asarray(x).astype(self.dtype, copy=False))

    def loading(self, advance: Callable[[int], object], tensors: Sequence[Tensor]) -> Upload:
        return Upload(self.dtype, advance, tensors)

    def numpy(self, x: Array) -> np.ndarray:
        return self.xp.asnumpy(x)

    def free_bytes(self) -> int:
        return self.xp.cuda.runtime.memGetInfo()[0] + self.xp.get_default_memory_pool().free_bytes()

    def release(self) -> None:
        self.xp.get_default_memory_pool().free_all_blocks()

    def work_bytes(self, config: Config, tokens: int, context: int, rows: int = 1, penalties: bool = False) -> int:
        """What is alive at once in a layer of model.py, while attention reads keys and values in BF16 or while the MLP runs; or, of many
        rows, the arrays of a `DecodeStep`, which is made when the prompts are read."""
        c = config
        if c.head_dim not in raw.HEAD_DIMS:  # array code in float32
            arrays = 4 // self.dtype.itemsize * super().work_bytes(config, tokens, context, rows)
            return arrays + self._tables_bytes(config, context)
        attention = tokens * (c.hidden_size + 3 * c.q_size + 3 * c.kv_size)  # x, qkv, q, k, y
        attention += 2 * (context if raw.tiled(c.head_dim, self.capability) else context - tokens) * c.kv_size
        heads = raw.Heads(c.num_heads, c.num_kv_heads, c.head_dim)
        parts = raw.prefill_parts(heads, tokens, 1, context - tokens, self.multiprocessors, self.capability)
        attention += 0 if parts is None else 4 * parts.workspace_floats(c.head_dim) // self.dtype.itemsize
        mlp = tokens * (2 * c.hidden_size + c.intermediate_size) + min(tokens, MLP_TOKENS) * 2 * c.intermediate_size
        step = rows * (2 * c.hidden_size + 3 * c.q_size + 2 * c.kv_size + c.intermediate_size)  # x twice, qkv, q, y, h
        few = max(rows, tokens if tokens <= raw_batch.BATCH_TOKENS else 0)  # cuBLAS takes more
        reading = max(attention, mlp) * self.dtype.itemsize + self._products_bytes(c, few)
        drawing = raw_dense.drawing_bytes(c.vocab_size, rows, penalties)
        merging = 18 * self.multiprocessors * min(8, c.num_heads // c.num_kv_heads) * c.head_dim  # parts of attention
        stepping = step * self.dtype.itemsize + drawing + merging + 2 * self._products_bytes(c, rows)  # the prompts' scratch is kept
        return max(reading, stepping) + 4 * rows * c.vocab_size + self._tables_bytes(config, context)

    def _tables_bytes(self, config: Config, context: int) -> int:
        """Of RoPE."""
        return 4 * config.head_dim * max(1024, 1 << (context - 1).bit_length())

    def _products_bytes(self, config: Config, tokens: int) -> int:
        """Scratch of `Products` for so many tokens."""
        plans = batch_plans(config, min(tokens, raw_batch.BATCH_TOKENS), self.multiprocessors, self.capability)
        partial = max((4 * (plan.workspace_floats + plan.counters) for plan in plans), default=0)
        return partial + tokens * config.hidden_size * self.dtype.itemsize * bool(plans)

    def widen(self, x: Array) -> Array:
        return x.astype(np.float32)

    def say_if_slow(self, config: Config, scheme: Scheme) -> bool:
        reason = unsupported(config, scheme, 1)
        if reason:
            text = f"{reason}: this model runs in array code on {self.name}, many times slower than by kernels"
            print(f"minioscar: {text}", file=sys.stderr, flush=True)
        return reason is not None

    # --- the transformer

    def rotate_heads(self, x: Array, head_dim: int, axis: int) -> None:
        """A raw kernel, not for its speed alone: cuBLAS takes 0.1 s to load, and a short prompt needs nothing else of it."""
        if head_dim in raw.HEAD_DIMS:
            self.run(raw.rotate_weights(x, head_dim, axis))
        else:
            super().rotate_heads(x, head_dim, axis)

    def linear(
        self, x: Array, weight: Array, bias: Array | None = None, *, norm: tuple[Array, float] | None = None, silu: bool = False,
        residual: Array | None = None, float32: bool = False,
    ) -> Array:
        """Raw kernels for what is bound by the weights, and for logits, which want float32; cuBLAS for many tokens."""
        (tokens, size), rows, most = x.shape, weight.shape[0] // (2 if silu else 1), raw_batch.BATCH_TOKENS
        many = tokens > most and not float32
        if size % 8 or many and rows % 8:
            return super().linear(x, weight, bias, norm=norm, silu=silu, residual=residual, float32=float32)
        if not many:
            out = self.xp.empty((tokens, rows), np.float32 if float32 else self.dtype)
            for i in range(0, tokens, most):
                part = {"norm": norm, "bias": bias, "silu": silu, "residual": None if residual is None else residual[i : i + most]}
                for launch in self.products.launches(x[i : i + most], weight, out[i : i + most], **part):
                    self.run(launch)
            return out
        if norm is not None:
            x, given = self.xp.empty_like(x), x
            self.run(raw_dense.rms_norm(given, *norm, x))
        if residual is not None and bias is None and not silu:
            self.add_product(residual, x, weight)
            return residual
        if silu:  # gate and up together are the widest array of a pass: in parts
            out = self.xp.empty((tokens, rows), self.dtype)
            for i in range(0, tokens, MLP_TOKENS):
                gate_up = self._plus(self.product(x[i : i + MLP_TOKENS], weight, False), bias)
                self.run(raw_dense.silu_mul(gate_up, out[i : i + MLP_TOKENS]))
                del gate_up  # before there is another
        else:
            out = self._plus(self.product(x, weight, False), bias)
        return self._plus(out, residual)

    def _plus(self, y: Array, x: Array | None) -> Array:
        """y, x added in place where there is one."""
        if x is not None:
            self.run(raw_dense.add(x, y))
        return y

    def product(self, x: Array, weight: Array, float32: bool) -> Array:
        """Logits in float32: the difference between two tokens is often smaller than the bfloat16 rounding of a logit."""
        return x.astype(np.float32) @ weight.astype(np.float32).T if float32 else x @ weight.T

    def add_product(self, y: Array, x: Array, weight: Array) -> None:
        """y += x @ weight.T"""
        blas.add_product(y, x, weight)

    def rotate_scale(
        self, qkv: Array, layer: Layer, tables: tuple[Array, Array], kept: dict[str, Array], config: Config, scheme: Scheme, batch: Batch
    ) -> tuple[Array, New | None]:
        heads = raw.Heads(config.num_heads, config.num_kv_heads, config.head_dim)
        if _plain(scheme, heads.head_dim):
            return super().rotate_scale(qkv, layer, tables, kept, config, scheme, batch)
        xp, at, norms = self.xp, self._indices(batch, kept), kept.get("norms")
        q = xp.empty((len(qkv), heads.q_heads, heads.head_dim), self.dtype)
        options = {"norms": norms, "norm_stride": 0 if norms is None else norms.shape[1], "slots": at.rows, "eps": config.rms_norm_eps}
        options |= {"rotate": scheme.rotate, "q_weight": layer.q_norm, "k_weight": layer.k_norm}
        if _decodes(batch):  # the new token goes to its place at once
            if self.scheduled is not at:  # once a step: the layers differ in nothing that it looks at
                plan, (tasks, workspace, _) = self._planned(heads, scheme, len(at.lengths))
                self.run(raw.schedule(heads, scheme, plan, at.lengths, tasks, workspace))  # two launches before attention, as that demands
                self.scheduled, self.turn = at, 0
            keys, values = (kept[name if not scheme.quantized else f"window_{name}"] for name in ("keys", "values"))
            place = {"keys": keys, "values": values, "places": keys.shape[2]}
            self.run(raw.rotate_scale(heads, qkv, at.positions, *tables, q, **options, **place))
            return q, None
        k = xp.empty((len(qkv), heads.kv_heads, heads.head_dim), self.dtype)
        self.run(raw.rotate_scale(heads, qkv, at.positions, *tables, q, **options, k_out=k))
        v = qkv.reshape(len(qkv), -1, heads.head_dim)[:, heads.q_heads + heads.kv_heads :]
        return q, New(k, v, None)  # the norms are in the cache

    def decoder(
        self, model: Model, cache: Cache, rows: Sequence[RowSampling], *, logits: bool = False, graph: bool = True
    ) -> Decoder:
        """What has no kernels (decode_step.unsupported) goes step by step through array code."""
        if unsupported(model.config, cache.scheme, len(cache.lengths)):
            return super().decoder(model, cache, rows, logits=logits)
        return QueuedDecoder(self, model, cache, rows, logits, graph)

    def queue(self, kernels: DecodeStep, graph: bool) -> Queue:
        return Queue(kernels, graph)

    # --- the cache

    def layout(self, config: Config, scheme: Scheme, batch: int, context: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        arrays = super().layout(config, scheme, batch, context)
        if not scheme.quantized or _plain(scheme, config.head_dim):
            return arrays
        tokens = context // WINDOW * WINDOW
        page = (batch, config.num_kv_heads, tokens // raw.PAGE_TOKENS, raw.page_bytes(scheme, config.head_dim))
        unpaged = {name: array for name, array in arrays.items() if name.startswith(("window", "sink", "norms"))}
        return {"pages": (page, np.dtype(np.uint8)), **unpaged}

    def attention(self, q: Array, new: New | None, kept: dict[str, Array], scheme: Scheme, batch: Batch) -> Array:
        if new is not None and _plain(scheme, q.shape[2]):
            return super().attention(q, new, kept, scheme, batch)
        if new is not None:
            out = self._prefill(q, new, kept, scheme, batch)
            self.append(new, kept, scheme, batch)
            return out
        at, cached = self._indices(batch, kept), kept["keys" if not scheme.quantized else "window_keys"]
        heads = raw.Heads(q.shape[1], cached.shape[1], q.shape[2])
        size = len(at.lengths)
        everyone = batch.slots == tuple(range(size))
        if not everyone:  # the kernel takes q by cache row
            q, packed = self.xp.zeros((size, *q.shape[1:]), q.dtype), q
            q[at.slots] = packed
        plan, (tasks, workspace, arrived) = self._planned(heads, scheme, size)
        out = self.xp.empty_like(q)
        self.run(raw.decode_attention(heads, scheme, plan, q, kept, at.lengths, tasks, out, None, workspace, arrived, turn=self.turn))
        self.turn = 1 - self.turn
        if scheme.quantized:
            self.run(raw.pack_step(heads, scheme, at.lengths, kept))
        return out if everyone else out[at.slots]

    def _prefill(self, q: Array, new: New, kept: dict[str, Array], scheme: Scheme, batch: Batch) -> Array:
        """A packed past is brought back to BF16 for the time of this layer; a plain one is read where it is, or copied into tiles."""
        xp, at, (kv_heads, dim) = self.xp, self._indices(batch, kept), new.k.shape[1:]
        heads, most = raw.Heads(q.shape[1], kv_heads, dim), max(batch.starts)
        past = plain = (kept["keys"], kept["values"]) if most and not scheme.quantized else None
        if tiled := raw.tiled(dim, self.capability):
            shape = _tiles(batch).sum(), kv_heads, raw.TILE_TOKENS, dim
            past = raw.Tiles(xp.empty(shape, self.dtype), xp.empty(shape, self.dtype), at.first_tiles)
        elif most and scheme.quantized:
            shape = len(batch.slots), kv_heads, -(-most // raw.PAGE_TOKENS) * raw.PAGE_TOKENS, dim
            past = xp.empty(shape, self.dtype), xp.empty(shape, self.dtype)
        if most and scheme.quantized:
            self.run(raw.unpack(heads, scheme, at.slots, at.starts, most, kept, past))
        out, strides, slots = xp.empty_like(q), (new.k.strides[0] // 2, new.v.strides[0] // 2), at.slots if plain else None
        arrivals = raw.Arrivals(new.k, new.v, *strides, at.firsts, slots, at.starts, at.counts, max(batch.counts))
        if tiled:
            self.run(raw.fill_tiles(heads, arrivals, plain, int(np.add(batch.starts, batch.counts).max()), past))
        found = raw.prefill_parts(heads, arrivals.most, len(batch.slots), most, self.multiprocessors, self.capability)
        cut = None if found is None else (found, xp.empty(found.workspace_floats(dim), np.float32), xp.zeros(found.blocks, np.int32))
        self.run(raw.prefill_attention(heads, q, arrivals, past, out, self.capability, cut=cut, multiprocessors=self.multiprocessors))
        return out

    def take_out(self, layer: dict[str, Array], slot: int, length: int, config: Config, scheme: Scheme) -> dict[str, np.ndarray]:
        packed = length // WINDOW * WINDOW
        if "pages" not in layer or not packed:
            return super().take_out(layer, slot, length, config, scheme)
        whole = {name: array[slot : slot + 1] for name, array in layer.items() if name != "pages"}
        rows = repage.plain(layer["pages"][slot, :, : packed // raw.PAGE_TOKENS], scheme, config.head_dim, self.xp)
        whole |= {name: array[None] for name, array in rows.items()}
        return super().take_out(whole, 0, length, config, scheme)

    def put_in(self, row: dict[str, np.ndarray], layer: dict[str, Array], slot: int, config: Config, scheme: Scheme) -> None:
        if "pages" in layer and "key_codes" in row:
            packed = {name: self.xp.asarray(row[name]) for name in row if name in repage.NAMES}
            found = repage.pages(packed, scheme, layer["pages"].shape[-1], self.xp)
            layer["pages"][slot, :, : found.shape[1]] = found
            row = {name: array for name, array in row.items() if name not in repage.NAMES}
        super().put_in(row, layer, slot, config, scheme)

    def append(self, new: New, layer: dict[str, Array], scheme: Scheme, batch: Batch) -> None:
        if "pages" not in layer:
            return super().append(new, layer, scheme, batch)
        at, k, v = self._indices(batch, layer), new.k, new.v
        heads = raw.Heads(k.shape[1], k.shape[1], k.shape[2])  # q heads play no part here
        strides = k.strides[0] // 2, v.strides[0] // 2
        new = raw.Arrivals(k, v, *strides, at.firsts, at.slots, at.starts, at.counts, max(batch.counts))
        self.run(raw.pack_bulk(heads, scheme, new, layer))
        self.run(raw.fill_window(heads, scheme, new, layer))

    def packed(self, layer: dict[str, Array], slot: int, tokens: int, scheme: Scheme) -> tuple[Array, Array]:
        if "pages" not in layer:
            return super().packed(layer, slot, tokens, scheme)
        dim = layer["window_keys"].shape[3]
        found = pages.unpack(layer["pages"][slot, :, : tokens // raw.PAGE_TOKENS], scheme, dim, self.xp)
        norms = layer["norms"][slot, :tokens] if scheme.scale else None
        keys = oscar.dequantize_keys(found["key_codes"], found["key_step"], found["key_min"], norms, scheme, self.xp)
        return keys, oscar.dequantize_values(found["value_codes"], found["value_step"], found["value_min"], scheme, self.xp)

    # --- what the kernels need besides

    def _indices(self, batch: Batch, kept: dict[str, Array]) -> Indices:
        """The arrays of a batch; the layers of one pass ask for the same."""
        if self.indices is None or self.indices.batch is not batch:
            rows = next(iter(kept.values())).shape[0]
            lengths = np.full(rows, -1)
            lengths[list(batch.slots)] = batch.starts
            firsts = np.cumsum(batch.counts) - batch.counts
            tiles = _tiles(batch)
            place = firsts, np.cumsum(tiles) - tiles, lengths
            found = batch.positions, np.repeat(batch.slots, batch.counts), batch.slots, batch.starts, batch.counts, *place
            self.indices = Indices(batch, *(self.xp.asarray(np.asarray(x, np.int32)) for x in found))
        return self.indices

    def _planned(self, heads: raw.Heads, scheme: Scheme, batch: int) -> tuple[raw.Plan, tuple[Array, Array, Array]]:
        """Of decode attention: the cut; the schedule, the workspace and the counters."""
        plan = raw.plan(heads, scheme, batch, self.multiprocessors, self.capability)
        key = plan, heads, batch
        if key not in self.scratch:
            counters = self.xp.zeros(plan.counters(heads.head_dim), np.int32)
            workspace = self.xp.empty(plan.workspace_floats(heads.head_dim), np.float32)
            self.scratch = {key: (self.xp.empty(plan.task_shape, np.int32), workspace, counters)}  # of the newest cut alone
        return plan, self.scratch[key]


def _tiles(batch: Batch) -> np.ndarray:
    """Tiles of raw.Tiles that each sequence has; int64 [sequences]."""
    return -(-np.add(batch.starts, batch.counts) // raw.TILE_TOKENS)


def _decodes(batch: Batch) -> bool:
    return set(batch.counts) == {1}


def _plain(scheme: Scheme, head_dim: int) -> bool:
    """Whether the reference's arrays and array code serve on this back end too."""
    return raw.unsupported(scheme, head_dim) is not None if scheme.quantized else head_dim not in raw.HEAD_DIMS
