"""Every operation of the model in plain array code: the meaning of each, and what runs where there is no GPU.

`xp` is NumPy here; the CUDA back end is a subclass that puts CuPy in its place and raw kernels where they pay. Tokens of all
sequences of a batch lie one after another, `[tokens, ...]`, without padding. Activations are float32 (`dtype`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import oscar
from ..cache import BF16, Batch, Cache, layout, row_layout
from ..decoding import Decoder
from ..memory import host_bytes
from ..oscar import WINDOW, Scheme
from ..sampling import RowSampling

if TYPE_CHECKING:
    from ..config import Config
    from ..model import Model
    from ..weights import Layer, Tensor

Array = Any
QUERIES = 256  # queries of one sequence whose scores are in memory at once


class New(NamedTuple):
    """New tokens on their way into the cache."""

    k: Array  # [tokens, kv_heads, d], rotated if the scheme does
    v: Array
    norms: Array | None  # float32 [tokens], of k as BF16 keeps it, over all kv heads and channels
    feedback: Array | None = None  # Layer.key_feedback, for a shaped scheme


class Reference:
    name = "cpu"
    xp = np
    dtype = np.dtype(np.float32)  # of weights and activations

    # --- between host and device

    def array(self, x: np.ndarray) -> Array:
        """A weight or table on this back end, floats in its dtype; a copy, since x may be a file that is mapped into memory."""
        return np.array(x, self.dtype)

    @contextmanager
    def loading(self, advance: Callable[[int], object], tensors: Sequence[Tensor]) -> Iterator[Callable[[Sequence[Tensor]], Array]]:
        """Gives what makes one array of tensors of files (`weights.Tensor`), their rows one below the other, in this back end's dtype.

        The arrays hold their numbers when the context has ended. advance: is told of the bytes of the files that were read. tensors:
        all that will be asked for, once each: a card allocates them together.
        """

        def put(tensors: Sequence[Tensor]) -> Array:
            parts = [tensor.array for tensor in tensors]
            if len({part.dtype for part in parts}) > 1:  # float32 holds F16 and BF16 exactly
                parts = [part.astype(np.float32) for part in parts]
            found = self.array(parts[0] if len(parts) == 1 else np.concatenate(parts))
            advance(sum(part.nbytes for part in parts))
            return found

        yield put

    def numpy(self, x: Array) -> np.ndarray:
        return np.asarray(x)

    def free_bytes(self) -> int:
        """Memory that a model and its cache may take, in bytes."""
        return host_bytes()

    def release(self) -> None:
        """Gives memory that is in no use back, after a run that did not fit."""

    def work_bytes(self, config: Config, tokens: int, context: int, rows: int = 1, penalties: bool = False) -> int:
        """The arrays of one forward pass of `tokens` tokens that ends at `context`, or of a later step of so many rows; weights and cache
        apart."""
        hidden, q, kv = config.hidden_size, config.q_size, config.kv_size

        def attention(n: int) -> int:
            piece = min(QUERIES, n)
            scores = config.num_heads * piece * context * (2 if n > QUERIES else 1)  # those of the last piece are still there
            scores += piece * (2 * piece + 3 * q)  # the mask, q and y of a piece
            unpacked = 2 * kv * (context - n)  # the past, twice for a moment
            return n * (hidden + 3 * q + 6 * kv) + 2 * kv * context + max(unpacked, scores)

        mlp = tokens * (2 * hidden + 8 * config.intermediate_size)
        return self.dtype.itemsize * max(mlp, attention(tokens), attention(1), rows * config.vocab_size)

    def say_if_slow(self, config: Config, scheme: Scheme) -> bool:
        """Whether array code takes the place of kernels that this back end has; that is said on stderr."""
        return False

    # --- the transformer

    def rotate_heads(self, x: Array, head_dim: int, axis: int) -> None:
        """In place: x, a weight matrix [out, in] or a bias [out], every head_dim numbers along `axis` (a head) times H.

        Raises ValueError where `oscar.hadamard` does.
        """
        rows = self.xp.moveaxis(x, axis, -1)
        rotated = oscar.rotate(rows.reshape(*rows.shape[:-1], -1, head_dim), self.xp).reshape(rows.shape)
        x[...] = self.xp.moveaxis(rotated, -1, axis).astype(x.dtype)

    def embed(self, table: Array, ids: np.ndarray) -> Array:
        """table [vocab, hidden], ids int [tokens] on the host -> [tokens, hidden]."""
        return table[self.xp.asarray(ids)]

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467); float32 inside. Shape and dtype of x."""
        xp = self.xp
        y = x.astype(xp.float32)
        y = y / xp.sqrt((y * y).mean(axis=-1, keepdims=True) + xp.float32(eps))
        return (y * weight.astype(xp.float32)).astype(x.dtype)

    def linear(
        self, x: Array, weight: Array, bias: Array | None = None, *, norm: tuple[Array, float] | None = None, silu: bool = False,
        residual: Array | None = None, float32: bool = False,
    ) -> Array:
        """residual + act(rms_norm(x) @ weight.T + bias), each part where it is given: [tokens, in] -> [tokens, out].

        weight [out, in]. norm: the weight [in] and eps of an RMSNorm of x before. silu: weight holds gate rows, then up rows;
        silu(gate) * up, [tokens, out / 2]. float32: the result is float32, whatever the dtype of the activations. residual: may be
        overwritten by the result.
        """
        if norm is not None:
            x = self.rms_norm(x, *norm)
        y = self.product(x, weight, float32)
        if bias is not None:
            y = self.sum(y, bias)
        if silu:
            y = self.silu_mul(y)
        return y if residual is None else self.sum(residual, y)

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

    def rotate_scale(
        self, qkv: Array, layer: Layer, tables: tuple[Array, Array], kept: dict[str, Array], config: Config, scheme: Scheme, batch: Batch
    ) -> tuple[Array, New | None]:
        """From the qkv projection to what attention takes: QK-norm, RoPE, and steps 1 and 2 of OScaR where the scheme has them.

        qkv [tokens, (q_heads + 2 * kv_heads) * d]; tables: cos and sin, float32 [positions, d/2]. Returns q' = q.H
        [tokens, q_heads, d] and the new tokens K' = K.H, V, n_t. A back end may write them into the cache at once, `kept`,
        and return None; `attention` knows.
        """
        xp, heads = self.xp, config.num_heads
        qkv = qkv.reshape(len(qkv), -1, config.head_dim)
        q, k, v = xp.split(qkv, [heads, heads + config.num_kv_heads], axis=1)
        q, k = q.astype(xp.float32), k.astype(xp.float32)  # rounded once, at the end
        if config.qk_norm:
            q, k = self.rms_norm(q, layer.q_norm, config.rms_norm_eps), self.rms_norm(k, layer.k_norm, config.rms_norm_eps)
        cos, sin = (table[xp.asarray(batch.positions)] for table in tables)
        q, k = self.rope(q, cos, sin), self.rope(k, cos, sin)
        if scheme.rotate:
            q, k = oscar.rotate(q, xp), oscar.rotate(k, xp)
        q, k = q.astype(qkv.dtype), k.astype(qkv.dtype)
        norms = oscar.token_norms(k.astype(BF16), xp) if scheme.scale else None
        return q, New(k, v, norms, layer.key_feedback if scheme.shaped else None)

    def attention(self, q: Array, new: New, kept: dict[str, Array], scheme: Scheme, batch: Batch) -> Array:
        """Attention of new tokens over the cache and, unquantized, over each other; after it the cache holds them.

        One new token is a decode step, many on an empty row are a prefill. A block of WINDOW tokens is quantized behind the
        token that fills it, which still sees it as it was. q and the result are [tokens, q_heads, d].
        """
        y = self.attend(q, new.k, new.v, kept, scheme, batch)
        self.append(new, kept, scheme, batch)
        return y

    def decoder(
        self, model: Model, cache: Cache, rows: Sequence[RowSampling], *, logits: bool = False, graph: bool = True
    ) -> Decoder:
        """Decode steps of the rows of a cache, as decoding.py says. graph: for back ends that have such a thing."""
        return Decoder(model, cache, rows, logits)

    # --- the cache

    def layout(self, config: Config, scheme: Scheme, batch: int, context: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The arrays of one layer of a cache on this back end; as many bytes on each."""
        return layout(config, scheme, batch, context)

    def take_out(self, layer: dict[str, Array], slot: int, length: int, config: Config, scheme: Scheme) -> dict[str, np.ndarray]:
        """The first `length` tokens of a row as it is kept, on the host, in the form of `cache.row_layout`; copies."""
        return {
            name: np.array(self.numpy(layer[name][(slot, *map(slice, shape))]), order="C")
            for name, (shape, _) in row_layout(config, scheme, length).items()
        }

    def put_in(self, row: dict[str, np.ndarray], layer: dict[str, Array], slot: int, config: Config, scheme: Scheme) -> None:
        """The inverse of `take_out`, bit for bit, into a row of any capacity that holds so many tokens."""
        for name, array in row.items():
            cut = tuple(map(slice, map(min, array.shape, layer[name].shape[1:])))  # norms have no room in a last partial block
            layer[name][(slot, *cut)] = self.xp.asarray(array[cut])

    def append(self, new: New, layer: dict[str, Array], scheme: Scheme, batch: Batch) -> None:
        """Writes new tokens: into the window, and every full block of WINDOW tokens from there into packed form.

        Everything passes through BF16 first.
        """
        xp, (k, v, norms, feedback) = self.xp, new
        for slot, start, span in batch.spans():
            rows = {"keys": k[span].astype(BF16).swapaxes(0, 1), "values": v[span].astype(BF16).swapaxes(0, 1)}  # [heads, n, d]
            count = span.stop - span.start
            if not scheme.quantized:
                for name, new in rows.items():
                    layer[name][slot, :, start : start + count] = new
                continue
            held = start % WINDOW
            if scheme.scale:
                kept = max(min(count, layer["norms"].shape[1] - start), 0)  # a last partial block has no room, nor needs it
                layer["norms"][slot, start : start + kept] = norms[span][:kept]
            full, left = divmod(held + count, WINDOW)
            if full:
                blocks = {name: xp.concatenate([layer[f"window_{name}"][slot, :, :held], new], axis=1) for name, new in rows.items()}
                self.pack(layer, slot, start - held, *(block[:, : full * WINDOW] for block in blocks.values()), scheme, feedback)
                rows, held = {name: block[:, full * WINDOW :] for name, block in blocks.items()}, 0
            for name, new in rows.items():
                layer[f"window_{name}"][slot, :, held:left] = new

    def pack(
        self, layer: dict[str, Array], slot: int, first: int, keys: Array, values: Array, scheme: Scheme, feedback: Array | None = None
    ) -> None:
        """Quantizes whole blocks, BF16 [kv_heads, n, d], as tokens first ... first + n - 1 of a row, and keeps its sinks."""
        xp, tokens = self.xp, slice(first, first + keys.shape[1])
        self.keep_sinks(layer, slot, first, keys, values, scheme)
        if scheme.outliers:
            keys = self.keep_outliers(layer, slot, first, keys, values, scheme)
        norms = layer["norms"][slot, tokens] if scheme.scale else None
        codes, step, minimum = oscar.quantize_keys(keys, norms, scheme, xp, feedback)
        layer["key_codes"][slot, :, tokens] = oscar.pack(codes, scheme.bits, xp)
        groups = slice(first // scheme.group, tokens.stop // scheme.group) if scheme.key_axis == "token" else tokens
        layer["key_step"][slot, :, groups] = step
        if minimum is not None:
            layer["key_min"][slot, :, groups] = minimum
        codes, step, minimum = oscar.quantize_values(values, scheme, xp)
        layer["value_codes"][slot, :, tokens] = oscar.pack(codes, scheme.bits, xp)
        layer["value_step"][slot, :, tokens] = step
        if minimum is not None:
            layer["value_min"][slot, :, tokens] = minimum

    def keep_sinks(self, layer: dict[str, Array], slot: int, first: int, keys: Array, values: Array, scheme: Scheme) -> None:
        """The first tokens of a row stay in BF16 beside the cache; their packed slots are not read."""
        if scheme.sinks and first == 0:
            layer["sink_keys"][slot], layer["sink_values"][slot] = keys[:, : scheme.sinks], values[:, : scheme.sinks]

    def keep_outliers(
        self, layer: dict[str, Array], slot: int, first: int, keys: Array, values: Array, scheme: Scheme
    ) -> Array:
        """Of each block and kv head, the tokens whose keys have the smallest 1-norms stay in BF16 (OTT, arXiv 2505.10938).

        Returns the keys with the mean of their block's other tokens in these places, so that they stretch no group's range.
        """
        xp, (heads, n, dim) = self.xp, keys.shape
        blocks = keys.astype(xp.float32).reshape(heads, -1, WINDOW, dim)
        places = xp.argsort(abs(blocks).sum(axis=-1), axis=-1)[..., : scheme.outliers]  # [heads, blocks, outliers]
        at, index = slice(first // WINDOW, (first + n) // WINDOW), _block_index(places, xp)
        layer["outlier_places"][slot, :, at] = places
        layer["outlier_keys"][slot, :, at] = keys.reshape(blocks.shape)[index]
        layer["outlier_values"][slot, :, at] = values.reshape(blocks.shape)[index]
        others = (blocks.sum(axis=2) - blocks[index].sum(axis=2)) / (WINDOW - scheme.outliers)
        blocks[index] = others[:, :, None]
        return blocks.reshape(keys.shape)

    def put_outliers(self, keys: Array, values: Array, layer: dict[str, Array], slot: int) -> None:
        """What `keep_outliers` kept, into the packed part of a row, float32 [kv_heads, n, d]."""
        blocks = keys.shape[1] // WINDOW
        index = _block_index(layer["outlier_places"][slot, :, :blocks], self.xp)
        for out, name in ((keys, "outlier_keys"), (values, "outlier_values")):
            out.reshape(out.shape[0], blocks, WINDOW, -1)[index] = self.widen(layer[name][slot, :, :blocks])

    def past(self, layer: dict[str, Array], slot: int, length: int, scheme: Scheme, room: int = 0) -> tuple[Array, Array]:
        """What attention takes the first `length` tokens of a row to be: keys, values, float32 [kv_heads, length + room, d].

        The last `room` tokens are left for the caller to fill.
        """
        xp = self.xp
        window = layer["keys" if not scheme.quantized else "window_keys"]
        shape = (window.shape[1], length + room, window.shape[3])
        keys, values = xp.empty(shape, xp.float32), xp.empty(shape, xp.float32)
        if not scheme.quantized:
            keys[:, :length], values[:, :length] = (self.widen(layer[name][slot, :, :length]) for name in ("keys", "values"))
            return keys, values
        packed = length - length % WINDOW
        if packed:
            parts = self.packed(layer, slot, packed, scheme)
            if scheme.outliers:
                self.put_outliers(*parts, layer, slot)
            keys[:, :packed], values[:, :packed] = parts
            if scheme.sinks:
                for out, name in ((keys, "sink_keys"), (values, "sink_values")):
                    out[:, : scheme.sinks] = self.widen(layer[name][slot])
        for out, name in ((keys, "window_keys"), (values, "window_values")):
            out[:, packed:length] = self.widen(layer[name][slot, :, : length - packed])
        return keys, values

    def packed(self, layer: dict[str, Array], slot: int, tokens: int, scheme: Scheme) -> tuple[Array, Array]:
        """The packed tokens of a row, dequantized: keys, values, float32 [kv_heads, tokens, d]. Sinks are not put in."""
        xp, groups = self.xp, tokens // scheme.group if scheme.key_axis == "token" else tokens
        keys = oscar.dequantize_keys(
            oscar.unpack(layer["key_codes"][slot, :, :tokens], scheme.bits, xp),
            layer["key_step"][slot, :, :groups],
            None if scheme.codebook else layer["key_min"][slot, :, :groups],
            layer["norms"][slot, :tokens] if scheme.scale else None,
            scheme,
            xp,
        )
        values = oscar.dequantize_values(
            oscar.unpack(layer["value_codes"][slot, :, :tokens], scheme.bits, xp),
            layer["value_step"][slot, :, :tokens],
            None if scheme.codebook or scheme.symmetric_values else layer["value_min"][slot, :, :tokens],
            scheme,
            xp,
        )
        return keys, values

    def widen(self, x: Array) -> Array:
        """BF16 -> float32, exactly: the upper half of the word. (NumPy's own conversion of ml_dtypes takes three times as long.)"""
        return (x.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)

    def attend(self, q: Array, k: Array, v: Array, layer: dict[str, Array], scheme: Scheme, batch: Batch) -> Array:
        """Causal grouped-query attention over the cache, which does not hold the new tokens yet, and the new tokens.

        q [tokens, q_heads, d], k and v [tokens, kv_heads, d]. softmax(q.k / sqrt(d)).v in float32 -> [tokens, q_heads, d] in
        q's dtype.
        """
        xp = self.xp
        out = xp.empty(q.shape, q.dtype)
        kv_heads, dim = k.shape[1:]
        scale = xp.float32(1 / math.sqrt(dim))
        for slot, start, span in batch.spans():
            keys, values = self.past(layer, slot, start, scheme, room=span.stop - span.start)
            keys[:, start:], values[:, start:] = (x[span].astype(xp.float32).swapaxes(0, 1) for x in (k, v))
            for first in range(span.start, span.stop, QUERIES):
                last = min(first + QUERIES, span.stop)
                n, seen = last - first, start + last - span.start  # tokens that the last of these queries sees
                x = (q[first:last].astype(xp.float32) * scale).reshape(n, kv_heads, -1, dim)  # [n, kv_heads, group, d]
                x = x.transpose(1, 2, 0, 3).reshape(kv_heads, -1, dim)
                scores = (x @ keys[:, :seen].swapaxes(1, 2)).reshape(kv_heads, -1, n, seen)
                if n > 1:
                    scores[..., seen - n :] += xp.triu(xp.full((n, n), -xp.inf, xp.float32), 1)
                scores -= scores.max(axis=-1, keepdims=True)
                xp.exp(scores, out=scores)
                total = scores.sum(axis=-1, keepdims=True)
                y = (scores.reshape(kv_heads, -1, seen) @ values[:, :seen]).reshape(kv_heads, -1, n, dim) / total
                out[first:last] = y.transpose(2, 0, 1, 3).reshape(n, -1, dim)
        return out


def _block_index(places: Array, xp: Any) -> tuple[Array, Array, Array]:
    """places [heads, blocks, n] of tokens in their blocks -> what picks them from [heads, blocks, WINDOW, d]."""
    heads, blocks, _ = places.shape
    return xp.arange(heads)[:, None, None], xp.arange(blocks)[:, None], places
