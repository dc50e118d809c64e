"""A tower's layers by kernels (kernels/towers/, prefill_attention.cu without its mask) and cuBLAS, in BF16.

Two arrays are what layers need beside x: `normed`, as large, and `wide`, for q, k and v or the MLP's middle; and on
compute capability 9.0 keys and values in tiles.

  x --layer_norm--> normed --product--> wide: q, k, v --heads--> the same --attention--> normed --product--> wide
  x + wide --layer_norm--> x and normed --product--> wide --activation--> the same --product--> normed; x + normed -> x
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..cache import BF16
from ..ops import linear
from ..ops.attention import Heads, PrefillTokens
from ..ops.launch import Card, Launch
from ..ops.prefill import prefill_attention
from ..plans import BATCH_TOKENS
from ..sm90 import prefill_attention as sm90
from .layers import Places, Shape, Weights

Array = Any
MAX_HEAD_DIM, MAX_HIDDEN = 128, 2048
TILED = {64: 64, 72: 128, 80: 128, 128: 128}  # head_dim -> that of sm90/prefill_attention.cu
OVERWRITE = np.zeros(1, np.float32)  # beta of a product
POOL_BLOCK = 512  # bytes


def fits(shape: Shape) -> bool:
    """Whether there are kernels for it: they read 16 bytes at a time."""
    sizes = shape.hidden, shape.inner, shape.head_dim
    return not any(size % 8 for size in sizes) and shape.head_dim <= MAX_HEAD_DIM and shape.hidden <= MAX_HIDDEN


class Layers:
    """As layers.Layers. What `norm` and `patches` return is overwritten by whatever is called next."""

    on_host = False

    def __init__(self, ops: Any, shape: Shape, tokens: int, segment: int, wide: int = 0):
        self.ops, self.shape = ops, shape
        self.normed = ops.xp.empty(tokens * shape.hidden, BF16)
        self.wide = ops.xp.empty(wide_numbers(shape, tokens, wide), BF16)
        self.segments = Segments.allocate(ops.xp, shape, tokens, min(segment, tokens), ops.card)

    @staticmethod
    def nbytes(shape: Shape, tokens: int, segment: int, ops: Any, wide: int = 0) -> int:
        """Of its arrays and x."""
        normed, wide, segments = tokens * shape.hidden, wide_numbers(shape, tokens, wide), -(-tokens // segment)
        of_tiles = 2 * math.prod(tiles_shape(shape, tokens, min(segment, tokens), ops.card))
        return Layers.array_bytes(2 * normed, 2 * normed, 2 * wide, of_tiles, of_tiles, 4 * 4 * segments)

    @staticmethod
    def array_bytes(*sizes: int) -> int:
        """Of CuPy's pool, which makes arrays of whole blocks."""
        return sum(-(-size // POOL_BLOCK) * POOL_BLOCK for size in sizes)

    def patches(self, vision: Any, pixels: np.ndarray) -> Array:
        frames, (height, width) = (len(pixels) if pixels.ndim == 4 else 1), pixels.shape[-3:-1]
        count, size = height * width // vision.patch**2, 3 * vision.frames * vision.patch**2
        out = self._view(self.wide, count, size)
        self.ops.run(patches(self.ops.xp.asarray(pixels), out, vision, frames))
        return out

    def placed(self, x: Array, table: Array, places: Places, side: int) -> Array:
        self.ops.run(placed(x, table, places, side))
        return x

    def tiles(self, pixels: Array, kernel: Array, first: Array, places: Array) -> Array:
        tiles, tokens = len(pixels), len(places)
        x = self.ops.xp.empty((tiles * tokens, len(first)), BF16)
        every = self.ops.xp.asarray(np.tile(np.arange(tokens, dtype=np.int32), tiles))
        self.ops.run(linear.embed(places, every, x))
        for tile, at in zip(pixels, range(0, len(x), tokens), strict=True):
            self.ops.run(linear.add(first, x[at : at + 1]))
            self.ops.add_product(x[at + 1 : at + tokens], tile, kernel)
        return x

    def norm(self, x: Array, w: Weights, name: str, in_place: bool = False) -> Array:
        out = x if in_place else self._view(self.normed, *x.shape)
        self.ops.run(layer_norm(x, _pair(w, name), out, self.shape.eps))
        return out

    def linear(self, x: Array, w: Weights, name: str) -> Array:
        """Into a new array."""
        weight, bias = _pair(w, name)
        out = self.ops.xp.empty((len(x), len(weight)), BF16)
        self._product(x, weight, out)
        if bias is not None:
            self.ops.run(linear.add(bias, out))
        return out

    def gelu_linear(self, x: Array, weight: Array, bias: Array) -> Array:
        out = self.ops.xp.empty((len(x), len(weight)), BF16)
        self._product(x, weight, out)
        self.ops.run(activate("gelu", out, bias))
        return out

    def mlp(self, x: Array, w: Weights, up: str, down: str) -> Array:
        return self.linear(self._activated(x, w, up, "gelu"), w, down)

    def layer(self, x: Array, w: Weights, prefix: str, places: Places | None = None) -> Array:
        s, run = self.shape, self.ops.run
        y = self.norm(x, w, f"{prefix}{s.norm1}")
        q, keys, values = self._heads(y, w, prefix, places)
        for launch in full_attention(q, keys, values, y, self.segments, self.ops.card):
            run(launch)
        weight, bias = _pair(w, f"{prefix}{s.out}")
        more = self._view(self.wide, *x.shape)
        self._product(y, weight, more)
        run(layer_norm(x, _pair(w, f"{prefix}{s.norm2}"), y, s.eps, (more, bias)))
        h = self._activated(y, w, f"{prefix}{s.up}", s.activation)
        weight, bias = _pair(w, f"{prefix}{s.down}")
        self._product(h, weight, y)
        run(layer_norm(x, None, None, s.eps, (y, bias)))
        return x

    def _heads(self, y: Array, w: Weights, prefix: str, places: Places | None) -> tuple[Array, Array, Array]:
        """q, k and v as attention takes them, [tokens, heads, d] each."""
        s, pairs = self.shape, [_pair(w, f"{prefix}{name}") for name in self.shape.qkv]
        if len(pairs) == 1:
            weight, bias = pairs[0]
            together = self._view(self.wide, len(y), 3, s.heads, s.head_dim)
            self._product(y, weight, together.reshape(len(y), -1))
            found = together[:, 0], together[:, 1], together[:, 2]
            biases = (None, None, None) if bias is None else (bias[i * s.hidden : (i + 1) * s.hidden] for i in range(3))
        else:
            found = tuple(self._view(self.wide, 3, len(y), s.heads, s.head_dim))
            for of, (weight, _) in zip(found, pairs, strict=True):
                self._product(y, weight, of.reshape(len(y), -1))
            biases = (bias for _, bias in pairs)
        self.ops.run(heads(found, tuple(biases), places))
        return found

    def _activated(self, x: Array, w: Weights, name: str, activation: str) -> Array:
        weight, bias = _pair(w, name)
        out = self._view(self.wide, len(x), len(weight))
        self._product(x, weight, out)
        self.ops.run(activate(activation, out, bias))
        return out

    def _product(self, x: Array, weight: Array, out: Array) -> None:
        """out = x @ weight.T. cuBLAS takes 0.1 s to load, and a small picture does not need it."""
        if len(x) > BATCH_TOKENS or x.shape[1] % 8:
            self.ops.add_product(out, x, weight, OVERWRITE)
            return
        for launch in self.ops.products.launches(x, weight, out):
            self.ops.run(launch)

    @staticmethod
    def _view(buffer: Array, *shape: int) -> Array:
        return buffer[: math.prod(shape)].reshape(shape)


@dataclass(frozen=True)
class Segments:
    """Of tokens, which attend to each other within them."""

    length: int  # the last one may be shorter
    indices: tuple[Array, ...]  # int32 [segments]: first tokens, zeros, numbers of tokens, first tiles
    tiles: tuple[Array, Array] | None  # room for keys and values where attention reads `sm90.Tiles`

    @classmethod
    def allocate(cls, xp: Any, shape: Shape, tokens: int, length: int, card: Card) -> Segments:
        first, of_tiles = np.arange(0, tokens, length), tiles_shape(shape, tokens, length, card)
        each = np.arange(len(first)) * -(-length // sm90.TILE_TOKENS)
        indices = first, np.zeros_like(first), np.minimum(length, tokens - first), each
        tiles = (xp.empty(of_tiles, BF16), xp.empty(of_tiles, BF16)) if of_tiles[0] else None
        return cls(length, tuple(xp.asarray(np.stack(indices).astype(np.int32))), tiles)


def tiles_shape(shape: Shape, tokens: int, segment: int, card: Card) -> tuple[int, int, int, int]:
    size, count = computed(shape.head_dim, card), -(-tokens // segment) * -(-segment // sm90.TILE_TOKENS)
    return count if sm90.tiled(size, card) else 0, shape.heads, sm90.TILE_TOKENS, size


def computed(head_dim: int, card: Card) -> int:
    """Channels of a head as attention has them in shared memory, zeros behind its own."""
    if sm90.tiled(128, card) and head_dim in TILED:
        return TILED[head_dim]
    return -(-head_dim // 16) * 16


def wide_numbers(shape: Shape, tokens: int, wide: int) -> int:
    return max(tokens * max(3 * shape.hidden, shape.inner), wide)


def _pair(w: Weights, name: str) -> tuple[Array, Array | None]:
    return w[f"{name}.weight"], w.get(f"{name}.bias")


# --- launches


def full_attention(
    q: Array, keys: Array, values: Array, out: Array, segments: Segments, card: Card
) -> list[Launch]:
    """Each of the tokens of a segment over all of them. q, keys, values: bf16 [tokens, heads, d], rows anywhere, d a
    multiple of 8; out [tokens, heads * d]."""
    tokens, heads, d = q.shape
    count = -(-tokens // segments.length)
    first, starts, counts, first_tiles = (of[:count] for of in segments.indices)
    strides = (x.strides[0] // BF16.itemsize for x in (keys, values))
    new = PrefillTokens(keys, values, *strides, first, None, starts, counts, segments.length)
    shape, past, launches = Heads(heads, heads, computed(d, card)), None, []
    if segments.tiles:
        past = sm90.Tiles(*segments.tiles, first_tiles)
        launches = [sm90.fill_tiles(shape, new, None, segments.length, past)]
    launches.append(prefill_attention(shape, q, new, past, out, card, scale=d**-0.5))
    return [replace(launch, defines=(*launch.defines, f"CHANNELS={d}", "FULL=1")) for launch in launches]


def layer_norm(
    x: Array, norm: tuple[Array, Array] | None, out: Array | None, eps: float,
    more: tuple[Array, Array | None] = (None, None),
) -> Launch:
    """x += more, an array and a bias, where given; out = the norm of x by its weight and bias, where given."""
    tokens, size = x.shape
    weight, bias = norm or (None, None)
    args = (x, *more, weight, bias, out, np.int32(tokens), np.int32(size // 8), np.float32(eps))
    return Launch("towers/layer_norm.cu", "layer_norm", (f"PER_LANE={-(-size // 256)}",), (-(-tokens // 8),), 256, args)


def heads(found: tuple[Array, Array, Array], biases: tuple[Array | None, ...], places: Places | None) -> Launch:
    """In place: the biases of q, k and v, and the angles of q and k."""
    tokens, heads, d = found[0].shape
    tables = (places.there, places.cos, places.sin) if places else (None, None, None)
    args = *found, *biases, *tables, np.int32(found[0].strides[0] // BF16.itemsize)
    return Launch("towers/heads.cu", "heads", (f"HEAD_DIM={d}", f"HEADS={heads}"), (tokens, 3), 128, args)


def activate(name: str, x: Array, bias: Array | None) -> Launch:
    """In place, x [tokens, n]. name: of layers.ACTIVATIONS."""
    vectors, count = x.shape[1] // 8, math.prod(x.shape) // 8
    args = x, bias, np.int32(vectors), np.int32(count)
    return Launch("towers/activation.cu", name, (), (-(-count // 1024),), 256, args)


def patches(pixels: Array, out: Array, vision: Any, frames: int) -> Launch:
    """pixels uint8 [frames, height, width, 3] (or of a still without its first axis), out bf16 [patches, numbers]."""
    rows, columns = (size // (vision.patch * vision.merge) for size in pixels.shape[-3:-1])
    defines = f"PATCH={vision.patch}", f"FRAMES={vision.frames}", f"MERGE={vision.merge}"
    sizes, colours = map(np.int32, (frames, rows, columns)), map(np.float32, (*vision.mean, *vision.deviation))
    return Launch("towers/patches.cu", "patches", defines, (len(out),), 256, (pixels, out, *sizes, *colours))


def placed(x: Array, table: Array, places: Places, side: int) -> Launch:
    """x += the learned places of its patches."""
    sizes = map(np.int32, (x.shape[1] // 8, side, *places.host.max(axis=0)))
    return Launch("towers/places.cu", "places", (), (len(x),), 128, (table, places.there, x, *sizes))
