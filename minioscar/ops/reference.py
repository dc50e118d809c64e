"""Every operation of the model in plain array code: the meaning of each, and what runs where there is no GPU.

`xp` is NumPy here; the CUDA back end is a subclass that puts CuPy in its place and raw kernels where they pay. Tokens
of all sequences of a batch lie one after another, `[tokens, ...]`, without padding. Activations are float32 (`dtype`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import oscar, work_bytes
from ..batch import Batch
from ..cache import BF16, Cache, LayerCache, NewTokens, array_cache, cache_bytes
from ..decoding import Decoder, Stepper
from ..experts import reference as experts
from ..machine import host_bytes
from ..oscar import Scheme
from ..quantized import Quantized
from ..sampling import RowSampling
from ..towers import layers

if TYPE_CHECKING:
    from ..config import Config
    from ..formats import Plain
    from ..storage.checkpoint import Tensor
    from ..weights import Layer

Array = Any


class Reference:
    name = "cpu"
    xp = np
    dtype = np.dtype(np.float32)  # of weights and activations
    cards = 1  # that run a model together: parallel/
    first = property(lambda self: self)  # the back end of the first of these, which alone runs towers
    cache_bytes = staticmethod(cache_bytes)

    # --- between host and device

    def array(self, x: np.ndarray) -> Array:
        """A weight or table on this back end, floats in its dtype; a copy, since x may be a mapped file."""
        return np.array(x, self.dtype)

    def loading(
        self, advance: Callable[[int], object], tensors: Sequence[Tensor], dtype: np.dtype | None = None
    ) -> AbstractContextManager[Callable[[Sequence[Tensor]], Array]]:
        """Gives what makes one array of tensors of files (`checkpoint.Tensor`), in rows.

        dtype: of the array (None: this back end's).
        The arrays hold their numbers when the context has ended. advance: is told of the bytes of the files that were
        read. tensors: all that will be asked for, once each: a card allocates them together.
        """
        return nullcontext(partial(self._read, advance, dtype))

    def _read(self, advance: Callable[[int], object], dtype: np.dtype | None, tensors: Sequence[Tensor]) -> Array:
        arrays = [tensor.array for tensor in tensors]
        if len({array.dtype for array in arrays}) > 1:  # float32 represents F16 and BF16 exactly
            arrays = [array.astype(np.float32) for array in arrays]
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        joined = self.array(joined) if dtype is None else np.array(joined, dtype)
        advance(sum(array.nbytes for array in arrays))
        return joined

    def quantized(self, plain: Plain) -> Array:
        """What stands in the place of a quantized matrix: here its numbers, since NumPy multiplies nothing else."""
        with np.errstate(invalid="ignore"):  # infinite scales are refused when all is read
            return plain.dequantize(self.xp).astype(self.dtype, copy=False)

    def weight_bytes(self, config: Config) -> int:
        """Of all weights on this back end."""
        return config.parameters() * self.dtype.itemsize

    def numpy(self, x: Array) -> np.ndarray:
        return np.asarray(x)

    def on_cards(self, x: Array) -> list[np.ndarray]:
        """On the host, what each card has of x, an array or a quantized matrix: of one all."""
        return [self.numpy(x.dequantize(self.xp) if isinstance(x, Quantized) else x)]

    def spread(self, x: Array) -> Array:
        """What the first card has, on all."""
        return x

    def all_heads(self, x: Array, heads: int) -> np.ndarray:
        """x [tokens, heads, d] on the host; heads: of the model, of which a card of several has some (parallel/)."""
        return self.numpy(x)

    def on_host(self, x: Array) -> np.ndarray:
        """A copy that stays there for a while."""
        return np.array(x)

    def free_bytes(self) -> int:
        """Memory that a model and its cache may take, in bytes."""
        return host_bytes()

    def release(self) -> None:
        """Gives memory that is in no use back, after a run that did not fit."""

    def work_bytes(
        self, config: Config, tokens: int, context: int, rows: int = 1, penalties: bool | None = False
    ) -> int:
        """The arrays of one forward pass of `tokens` tokens that ends at `context`, or of a later step of so many rows;
        weights and cache apart."""
        return work_bytes.of_array_code(config, tokens, context, rows, self.dtype.itemsize)

    def say_if_slow(self, config: Config, scheme: Scheme) -> bool:
        """Whether array code runs instead of kernels that this back end has; if so, says it on stderr."""
        return False

    # --- the transformer

    def rotate_heads(self, x: Array, head_dim: int, axis: int) -> None:
        """In place: x, a weight matrix [out, in] or a bias [out], every head_dim numbers along `axis` (a head) times H.

        Raises ValueError where `hadamard` does.
        """
        rows = self.xp.moveaxis(x, axis, -1)
        rotated = oscar.rotate(rows.reshape(*rows.shape[:-1], -1, head_dim), self.xp).reshape(rows.shape)
        x[...] = self.xp.moveaxis(rotated, -1, axis).astype(x.dtype)

    def scale_rows(self, x: Array, factors: np.ndarray) -> None:
        """In place: row i of x, [rows, in] or [rows], times factors[i], in float32. x may have more rows."""
        x = x[: len(factors)]
        factors = self.xp.asarray(factors.astype(np.float32)).reshape(-1, *(1,) * (x.ndim - 1))
        x[...] = (x.astype(self.xp.float32) * factors).astype(x.dtype)

    def embed(self, table: Array, ids: np.ndarray) -> Array:
        """table [vocab, hidden], ids int [tokens] on the host -> [tokens, hidden]."""
        return table[self.xp.asarray(ids)]

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467); float32 inside, then x's dtype."""
        xp = self.xp
        y = x.astype(xp.float32)
        y = y / xp.sqrt((y * y).mean(axis=-1, keepdims=True) + xp.float32(eps))
        return (y * weight.astype(xp.float32)).astype(x.dtype)

    def linear(
        self, x: Array, weight: Array, bias: Array | None = None, *, norm: tuple[Array, float] | None = None,
        silu: bool = False, residual: Array | None = None, float32: bool = False,
    ) -> Array:
        """residual + act(rms_norm(x) @ weight.T + bias), each term where it is given: [tokens, in] -> [tokens, out].

        weight [out, in]. norm: the weight [in] and eps of an RMSNorm of x before. silu: weight holds gate rows, then up
        rows; silu(gate) * up, [tokens, out / 2]. float32: the result is float32, whatever the dtype of the activations.
        residual: may be overwritten by the result.
        """
        if norm is not None:
            x = self.rms_norm(x, *norm)
        y = self.product(x, self.dense(weight), float32)
        if bias is not None:
            y = self.sum(y, bias)
        if silu:
            y = self.silu_mul(y)
        return y if residual is None else self.sum(residual, y)

    def dense(self, weight: Array | Quantized) -> Array:
        """A matrix as an array of this back end's dtype; one that was quantized for the time of a product."""
        return weight.dequantize(self.xp).astype(self.dtype) if isinstance(weight, Quantized) else weight

    def sum(self, x: Array, y: Array) -> Array:
        """x + y in x's dtype; float32 inside."""
        a, b = (z.astype(self.xp.float32, copy=False) for z in (x, y))
        return (a + b).astype(x.dtype, copy=False)

    def product(self, x: Array, weight: Array, float32: bool) -> Array:
        """x [tokens, in] @ weight [out, in] transposed."""
        return x @ weight.T

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """Turns channel pairs (i, i + d/2) by their angles: x [tokens, heads, d], cos and sin float32 [tokens, d/2]."""
        xp = self.xp
        a, b = xp.split(x.astype(xp.float32), 2, axis=-1)
        cos, sin = cos[:, None], sin[:, None]
        return xp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

    def silu_mul(self, gate_up: Array) -> Array:
        """silu(gate) * up: [tokens, 2 * n] -> [tokens, n]; float32 inside."""
        xp = self.xp
        gate, up = xp.split(gate_up.astype(xp.float32), 2, axis=-1)
        return (gate / (1 + xp.exp(-gate)) * up).astype(gate_up.dtype)

    def experts(self, x: Array, layer: Layer, config: Config, batch: Batch, alone: bool = False) -> Array:
        """A layer's MLP where a router chooses a few of many for each token; x [tokens, hidden] may be overwritten."""
        return experts.forward(self, x, layer, config, alone)

    def rotate_scale(
        self, qkv: Array, layer: Layer, tables: tuple[Array, Array], layer_cache: LayerCache, config: Config,
        batch: Batch, rotate_values: bool = False,
    ) -> tuple[Array, NewTokens]:
        """From the qkv projection to what attention takes: QK-norm, RoPE, and the scheme's steps 1 and 2 of OScaR.

        qkv [tokens, config.qkv_size]; tables: cos and sin, float32 [positions, d/2]. Returns q' = q.H [tokens, q_heads,
        d] and the new tokens K' = K.H, V, n_t. rotate_values: V.H in the place of V.
        """
        xp, heads, scheme, (key_heads, first) = self.xp, config.num_heads, layer_cache.scheme, config.key_heads
        qkv = qkv.reshape(len(qkv), -1, config.head_dim)
        q, k, v = xp.split(qkv, [heads, heads + key_heads], axis=1)
        q, k = q.astype(xp.float32), k.astype(xp.float32)  # rounded once, at the end
        if config.qk_norm:
            q = self.rms_norm(q, layer.q_norm, config.rms_norm_eps)
            k = self.rms_norm(k, layer.k_norm, config.rms_norm_eps)
        cos, sin = (table[xp.asarray(batch.table_rows)] for table in tables)
        q, k = self.rope(q, cos, sin), self.rope(k, cos, sin)
        q, k = (scheme.rotated(x, layer.rotations, xp) for x in (q, k))
        q, k = q.astype(qkv.dtype), k.astype(qkv.dtype)
        if rotate_values:
            v = oscar.rotate(v.astype(xp.float32), xp).astype(qkv.dtype)
        norms = oscar.token_norms(k.astype(BF16), xp) if scheme.scale else None
        k = k[:, first : first + config.num_kv_heads]
        return q, NewTokens(k, v, norms, layer.key_feedback if scheme.shaped else None)

    def attention(self, q: Array, new: NewTokens, layer_cache: LayerCache, batch: Batch) -> Array:
        """Attention of new tokens over the cache and, unquantized, over each other; then appends them to the cache.

        One new token is a decode step, many on an empty row are a prefill. A block is quantized behind the token that
        completes it, which still sees it as it was. q and the result are [tokens, q_heads, d].
        """
        y = layer_cache.attend(q, new, batch)
        layer_cache.append(new, batch)
        return y

    def layers_for(self, shape: layers.Shape) -> type[layers.Layers]:
        """What computes the layers of a tower of this shape."""
        return layers.Layers

    def decoder(
        self, model: Stepper, cache: Cache, rows: Sequence[RowSampling] | None, *, logits: bool = False,
        replay: str = "graph",
    ) -> Decoder:
        """Decode steps of the rows of a cache (decoding.py). replay: as `decode.StepDecoder` has it."""
        return Decoder(model, cache, rows, logits)

    def prepare(
        self, model: Stepper, cache: Cache, passes: Sequence[Batch], rows: Sequence[RowSampling] | None, progress: bool
    ) -> None:
        """Compiles what is not compiled yet for these passes over prompts and for answers that draw as `rows` say;
        None: for any that join and leave."""

    # --- the cache

    def cache_type(self, config: Config, scheme: Scheme) -> type[LayerCache]:
        """Class of a layer's cache on this back end; all have equally many bytes."""
        return array_cache(scheme)

    def begin(self, cache: Cache, batch: Batch) -> None:
        """Before the first layer of a pass: what a back end prepares once for all of them."""

    def end(self, cache: Cache, batch: Batch) -> None:
        """After the last layer: the new tokens are part of their rows."""
        cache.advance(batch)
