"""The same operations on CuPy: raw kernels (kernels/*.cu), and cuBLAS for the products of a prefill.

Kernels fill and read the cache where there are some for the scheme and the head size (paged.py), array code where there
are none. A decode step is the same code over a batch that lives on the card (decode.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..batch import Batch
from ..cache import BF16, Cache, LayerCache, NewTokens, blocks_of
from ..compilation.ahead import Paper, programs
from ..compilation.cubins import Program, compile_all
from ..config import Config
from ..cublas import add_product
from ..decoding import Decoder, Stepper
from ..experts import on_card as experts
from ..experts.plans import work_bytes as experts_bytes
from ..formats import Plain
from ..oscar import Scheme
from ..quantized import Quantized
from ..quantized import on_card as quantized
from ..sampling import RowSampling
from ..sm90.prefill_attention import split_plan
from ..storage.checkpoint import Tensor
from ..storage.upload import Buffers, Upload, pinned
from ..towers import on_card as towers
from ..towers.layers import Layers, Shape
from ..weights import Layer, bytes_of
from . import attention, linear, prefill
from .attention import HEAD_DIMS, Heads
from .decode import Queue, StepBatch, StepDecoder, step_sizes, unsupported
from .indices import Indices
from .launch import Card, Launch, Recording, run
from .linear import Products, scratch_bytes, step_plans
from .linear_batch import BATCH_TOKENS
from .paged import KernelCache, kernel_cache
from .reference import Reference
from .sample import drawing_bytes

Array = Any
MLP_TOKENS = 8192  # whose gate and up projections are in memory at once


class Cuda(Reference):
    name = "cuda"
    dtype = BF16
    recording_type: type[Recording] = Recording

    def __init__(self) -> None:
        import cupy

        self.xp, self.card = cupy, Card.current()
        self.indices: Indices | None = None
        self.recorded: Recording | None = None  # a step that is being recorded
        self.products = Products(self.xp, self.card)
        self.buffers = Buffers()

    def run(self, launch: Launch) -> None:
        run(launch)
        if self.recorded is not None:
            self.recorded.append(launch)

    @contextmanager
    def recording(self, tokens: int, config: Config) -> Iterator[Recording]:
        """The launches of this context, to be run again, with scratch for so many tokens that is theirs alone."""
        common = self.products
        with self.recording_type().open() as self.recorded:
            self.products = Products(self.xp, self.card)
            self.products.reserve(step_plans(config, tokens, self.card))
            self.recorded.products = self.products
            try:
                yield self.recorded
            finally:
                self.products, self.recorded = common, None

    # --- between host and device

    def array(self, x: np.ndarray) -> Array:
        return self.xp.asarray(np.asarray(x).astype(self.dtype, copy=False))

    def loading(
        self, advance: Callable[[int], object], tensors: Sequence[Tensor], dtype: np.dtype | None = None
    ) -> Upload:
        return Upload(dtype or self.dtype, advance, tensors, self.buffers)

    def quantized(self, plain: Plain) -> Quantized:
        return quantized.stored(self, plain)

    def weight_bytes(self, config: Config) -> int:
        return bytes_of(config, self.dtype.itemsize)

    def numpy(self, x: Array) -> np.ndarray:
        return self.xp.asnumpy(x)

    def on_host(self, x: Array) -> np.ndarray:
        """In pinned memory: from pageable memory it would come back at a fifth of the bus's rate."""
        return self.xp.ascontiguousarray(x).get(out=pinned(x.shape, x.dtype))

    def free_bytes(self) -> int:
        return self.xp.cuda.runtime.memGetInfo()[0] + self.xp.get_default_memory_pool().free_bytes()

    def release(self) -> None:
        self.buffers = Buffers()
        self.xp.get_default_memory_pool().free_all_blocks()

    def work_bytes(
        self, config: Config, tokens: int, context: int, rows: int = 1, penalties: bool | None = False
    ) -> int:
        """The arrays of model.py that are alive at once in a prefill, or, of many rows, in a decode step, which finds
        the scratch of the prefill still there; and in both the logits, the tables of RoPE and that of blocks. Where
        rows join, both are alive, and steps of several numbers of rows."""
        tables = 4 * config.head_dim * max(1024, 1 << (context - 1).bit_length()) + 4 * rows * blocks_of(context)
        if config.head_dim not in HEAD_DIMS:  # array code in float32
            return 4 // self.dtype.itemsize * super().work_bytes(config, tokens, context, rows) + tables
        batch = max(rows, tokens if tokens <= BATCH_TOKENS else 0)  # cuBLAS takes more
        reading = self._prefill_bytes(config, tokens, context) + scratch_bytes(config, batch, self.card)
        sizes, joins = (step_sizes(rows), True) if penalties is None else ([rows], False)
        steps = sum(StepBatch.nbytes(config, n, self.card) + scratch_bytes(config, n, self.card) for n in sizes)
        steps += drawing_bytes(config.vocab_size, rows, penalties is not False)
        logits = 4 * config.vocab_size * (sum(sizes) + joins * rows)
        together = reading + steps if joins else max(reading, steps + scratch_bytes(config, rows, self.card))
        return together + logits + tables

    def _prefill_bytes(self, c: Config, tokens: int, context: int) -> int:
        """While attention reads keys and values in BF16, or while the MLP runs."""
        heads, width = Heads.of(c), self.dtype.itemsize
        split = split_plan(heads, tokens, 1, context - tokens, self.card)
        attending = width * tokens * (c.hidden_size + 2 * c.q_size + c.qkv_size + c.kv_size)  # x, qkv, q, k, y
        attending += prefill.past_bytes(heads, tokens, context, self.card) + (split.nbytes(c.head_dim) if split else 0)
        if c.experts:
            return max(attending, width * tokens * c.hidden_size + experts_bytes(c, tokens, self.card))
        gate_up = min(tokens, MLP_TOKENS) * 2 * c.intermediate_size
        if c.stored_bits(False) and tokens > BATCH_TOKENS:  # the matrix itself, dequantized
            gate_up += 2 * c.intermediate_size * c.hidden_size
            attending = max(attending, width * (tokens * (2 * c.hidden_size + c.qkv_size) + c.qkv_size * c.hidden_size))
        return max(attending, width * (tokens * (2 * c.hidden_size + c.intermediate_size) + gate_up))

    def say_if_slow(self, config: Config, scheme: Scheme) -> bool:
        reason = unsupported(config, scheme, 1)
        if reason:
            text = f"{reason}: this model runs in array code on {self.name}, many times slower than by kernels"
            print(f"[{text}]", file=sys.stderr, flush=True)
        return reason is not None

    # --- the transformer

    def rotate_heads(self, x: Array, head_dim: int, axis: int) -> None:
        """A raw kernel, not for its speed alone: cuBLAS takes 0.1 s to load, and a short prompt does not need it."""
        if head_dim in HEAD_DIMS:
            self.run(attention.rotate_heads(x, head_dim, axis))
        else:
            super().rotate_heads(x, head_dim, axis)

    def linear(
        self, x: Array, weight: Array, bias: Array | None = None, *, norm: tuple[Array, float] | None = None,
        silu: bool = False, residual: Array | None = None, float32: bool = False,
    ) -> Array:
        """Raw kernels for what is bound by the weights, and for logits, which are float32; cuBLAS for many tokens."""
        (tokens, size), rows, limit = x.shape, weight.shape[0] // (2 if silu else 1), BATCH_TOKENS
        is_large = tokens > limit and not float32
        if size % 8 or is_large and rows % 8:  # array code
            return super().linear(x, weight, bias, norm=norm, silu=silu, residual=residual, float32=float32)
        if is_large:
            return self._large_linear(x, weight, bias, norm, silu, residual)
        out = self.xp.empty((tokens, rows), np.float32 if float32 else self.dtype)
        of = x, out, residual
        for i in range(0, tokens, limit):
            given, to, sums = of if tokens <= limit else (None if a is None else a[i : i + limit] for a in of)
            for launch in self.products.launches(given, weight, to, norm=norm, bias=bias, silu=silu, residual=sums):
                self.run(launch)
        return out

    def _large_linear(
        self, x: Array, weight: Array, bias: Array | None, norm: tuple | None, silu: bool, residual: Array | None
    ) -> Array:
        """By cuBLAS."""
        weight = self.dense(weight)
        if norm is not None:
            x, given = self.xp.empty_like(x), x
            self.run(linear.rms_norm(given, *norm, x))
        if residual is not None and bias is None and not silu:
            self.add_product(residual, x, weight)
            return residual
        if not silu:
            return self._add(self._add(self.product(x, weight, False), bias), residual)
        out = self.xp.empty((len(x), weight.shape[0] // 2), self.dtype)
        for i in range(0, len(x), MLP_TOKENS):  # gate and up together are the widest array of a pass
            gate_up = self._add(self.product(x[i : i + MLP_TOKENS], weight, False), bias)
            self.run(linear.silu_mul(gate_up, out[i : i + MLP_TOKENS]))
            del gate_up  # before there is another
        return self._add(out, residual)

    def experts(self, x: Array, layer: Layer, config: Config, batch: Batch | StepBatch, alone: bool = False) -> Array:
        return experts.forward(self, x, layer, config, alone, batch.lengths if isinstance(batch, StepBatch) else None)

    def _add(self, y: Array, x: Array | None) -> Array:
        """y, x added in place where there is one."""
        if x is not None:
            self.run(linear.add(x, y))
        return y

    def product(self, x: Array, weight: Array, float32: bool) -> Array:
        """Logits in float32: two tokens often differ by less than the bfloat16 rounding of a logit."""
        return x.astype(np.float32) @ weight.astype(np.float32).T if float32 else x @ weight.T

    add_product = staticmethod(add_product)

    def dense(self, weight: Array | Quantized) -> Array:
        return quantized.dense(self, weight) if isinstance(weight, Quantized) else weight

    def embed(self, table: Array, ids: Array) -> Array:
        if table.shape[1] % 8:
            return super().embed(table, ids)
        x = self.xp.empty((len(ids), table.shape[1]), self.dtype)
        self.run(linear.embed(table, self.xp.asarray(ids, np.int32), x))
        return x

    def rotate_scale(
        self, qkv: Array, layer: Layer, tables: tuple[Array, Array], layer_cache: LayerCache, config: Config,
        batch: Batch | StepBatch, rotate_values: bool = False,
    ) -> tuple[Array, NewTokens]:
        if isinstance(layer_cache, KernelCache):
            return layer_cache.rotate_scale(qkv, layer, tables, config, batch, rotate_values)
        return super().rotate_scale(qkv, layer, tables, layer_cache, config, batch, rotate_values)

    def layers_for(self, shape: Shape) -> type[Layers]:
        return towers.Layers if towers.fits(shape) else super().layers_for(shape)

    def decoder(
        self, model: Stepper, cache: Cache, rows: Sequence[RowSampling] | None, *, logits: bool = False,
        replay: str = "graph",
    ) -> Decoder:
        """Array code, step by step, where `decode.unsupported` has a reason."""
        if unsupported(model.config, cache.scheme, len(cache.lengths)):
            return super().decoder(model, cache, rows, logits=logits)
        return StepDecoder(model, cache, rows, logits=logits, replay=replay)

    def prepare(
        self, model: Stepper, cache: Cache, passes: Sequence[Batch], rows: Sequence[RowSampling] | None, progress: bool
    ) -> None:
        from cupy.cuda import nvrtc

        wanted = programs(OnPaper(self.card), model, cache, passes, rows)
        compile_all(wanted, self.card.capability, nvrtc, progress)

    def queue(self, batch: StepBatch, runs: Mapping[int, Callable[[], None]], graph: bool) -> Queue:
        return Queue(batch, runs, graph)

    # --- the cache

    def cache_type(self, config: Config, scheme: Scheme) -> type[LayerCache]:
        return kernel_cache(config, scheme) or super().cache_type(config, scheme)

    def begin(self, cache: Cache, batch: Batch | StepBatch) -> None:
        if isinstance(batch, StepBatch):
            batch.schedule(self)

    def end(self, cache: Cache, batch: Batch | StepBatch) -> None:
        if isinstance(batch, StepBatch):
            batch.pack(cache, self)
        else:
            super().end(cache, batch)

    def indices_of(self, batch: Batch) -> Indices:
        """The arrays of a batch; the layers of one pass ask for the same."""
        if self.indices is None or self.indices.batch is not batch:
            self.indices = Indices.of(batch, self.xp)
        return self.indices


class OnPaper(Paper, Cuda):
    """A card on which nothing runs: launches are noted."""

    def __init__(self, card: Card) -> None:
        self.xp, self.card, self.indices, self.recorded = np, card, None, None
        self.products = Products(np, card)
        self.launched: dict[Program, None] = {}
