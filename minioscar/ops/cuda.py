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

from .. import work_bytes
from ..batch import Batch
from ..cache import BF16, Cache, LayerCache, NewTokens
from ..compilation.ahead import Paper, programs
from ..compilation.cubins import Program, compile_all
from ..config import Config
from ..cublas import add_product
from ..decoding import Decoder, Stepper
from ..experts import on_card as experts
from ..formats import Plain
from ..joining import JoiningDecoder
from ..machine import Card
from ..oscar import Scheme
from ..pages import HEAD_DIMS
from ..plans import BATCH_TOKENS
from ..quantized import Quantized
from ..quantized import on_card as quantized
from ..sampling import RowSampling
from ..storage.checkpoint import Tensor
from ..storage.upload import Buffers, Upload, pinned
from ..towers import on_card as towers
from ..towers.layers import Layers, Shape
from ..weights import Layer
from ..work_bytes import MLP_TOKENS, step_plans
from . import attention, linear
from .decode import Queue, StepBatch, StepDecoder, unsupported
from .launch import Launch, Recording, run
from .linear import Products
from .paged import Indices, KernelCache, kernel_cache
from .reference import Reference

Array = Any


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
        return work_bytes.of_weights(config, self.dtype.itemsize)

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
        return work_bytes.on_card(config, tokens, context, rows, penalties, self.card)

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
        of, launches = (x, out, residual), quantized.launches if isinstance(weight, Quantized) else Products.launches
        for i in range(0, tokens, limit):
            given, to, sums = of if tokens <= limit else (None if a is None else a[i : i + limit] for a in of)
            for launch in launches(self.products, given, weight, to, norm=norm, bias=bias, silu=silu, residual=sums):
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
        self, qkv: Array, layer: Layer, tables: tuple[Array, Array], layer_cache: LayerCache, *rest: Any
    ) -> tuple[Array, NewTokens]:
        if isinstance(layer_cache, KernelCache):
            return layer_cache.rotate_scale(qkv, layer, tables, *rest)
        return super().rotate_scale(qkv, layer, tables, layer_cache, *rest)

    def layers_for(self, shape: Shape) -> type[Layers]:
        return towers.Layers if towers.fits(shape) else super().layers_for(shape)

    def decoder(self, model: Stepper, cache: Cache, rows: Sequence[RowSampling] | None, **how: Any) -> Decoder:
        """Array code, step by step, where `decode.unsupported` has a reason."""
        if unsupported(model.config, cache.scheme, len(cache.lengths)):
            return super().decoder(model, cache, rows, **how)
        return (JoiningDecoder if rows is None else StepDecoder)(model, cache, rows, **how)

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
