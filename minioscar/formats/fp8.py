"""8 bits a weight and a scale for a row, a block or the whole matrix: W = value(weight) * scale.

fp8         weight F8_E4M3 [rows, columns], weight_scale_inv [ceil(rows / 128), ceil(columns / 128)], despite its name a
            factor; one number where weight_block_size is null (Qwen, DeepSeek, Mistral)
fbgemm_fp8  weight F8_E4M3, weight_scale [rows, 1]
Blocks at the edges are smaller: a row belongs to block row // 128. Scales of activations are not used: they stay in 16
bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import FLOATS, Format, Linear, Tensor, Unfit, kinds, named, plain, scales
from .plain import Plain

Array = Any
Tile = tuple[int, int]  # rows and columns that share a scale; 0: all of them
E8M0 = ("F8_E8M0", "U8")
WHOLE, ROW = (0, 0), (1, 0)


@dataclass(frozen=True)
class Scaled(Format):
    tiles: tuple[Tile, ...]  # that a matrix may have
    scale: str = "weight_scale"  # the name of its tensor

    def stored_bits(self, columns: int = 0) -> float:
        """A scale of 32 bits is of at most 16 rows."""
        sizes = ((min(rows, 16), math.gcd(width, columns)) for rows, width in self.tiles if width)
        return max(self.bits) + max((32 / rows / width for rows, width in sizes), default=0)

    def layout(self, linear: Linear) -> dict[str, Tensor | tuple[Tensor, ...]]:
        choices = tuple(one for shape in self._shapes(linear) for one in kinds((*FLOATS, *E8M0), shape))
        layout = {"weight": kinds(("F8_E4M3", "I8"), linear[:2]), self.scale: choices}
        if "weight_zero_point" in linear.tensors and linear.tensors["weight"].kind == "I8":
            layout["weight_zero_point"] = kinds(("I8",), linear.shape(self.scale))
        return layout

    def read(self, linear: Linear, xp: Any) -> Plain:
        x, (rows, columns) = linear.tensors, linear[:2]
        tile = self._shapes(linear)[tuple(x[self.scale].shape)]
        group = min(tile[1] or columns, columns)
        scale = spread(x[self.scale], tile, rows, xp)
        if x["weight"].dtype == np.int8:
            zero = 128 + spread(x["weight_zero_point"], tile, rows, xp).astype(xp.float32) if len(x) == 3 else None
            return plain(8, x["weight"].view(np.uint8) ^ np.uint8(128), scale, zero, group, xp)
        scale, dtype = scales(scale, xp)
        return Plain("e4m3", x["weight"], xp.ascontiguousarray(scale), None, group, dtype)

    def _shapes(self, linear: Linear) -> dict[tuple[int, ...], Tile]:
        """Every shape that the scales may have. Raises Unfit where one has two meanings."""
        found: dict[tuple[int, ...], Tile] = {}
        for tile in self.tiles:
            height, width = (min(size or most, most) for size, most in zip(tile, linear[:2], strict=True))
            shape = -(-linear.rows // height), -(-linear.columns // width)
            if found.setdefault(shape, (height, width)) != (height, width):
                raise Unfit(f"scales {shape} may be of {found[shape]} or of {(height, width)} weights each")
            if tile == WHOLE:
                found |= dict.fromkeys(((), (1,)), (height, width))
        return found


def spread(x: Array, tile: Tile, rows: int, xp: Any) -> Array:
    """A number for each tile -> for each row and each tile of columns: [rows, groups]."""
    return xp.repeat(x.reshape(1, 1) if x.size == 1 else x, tile[0], axis=0)[:rows]


def read_config(raw: dict, name: str) -> Scaled:
    """Raises Unfit for what is not implemented."""
    if raw.get("fmt", "e4m3") != "e4m3":
        raise Unfit(f"fmt {raw['fmt']!r} of {name} is not supported, only e4m3")
    block = raw.get("weight_block_size")
    if block is None:
        return Scaled(f"{name} (a scale a matrix)", (8,), (0,), (WHOLE,), "weight_scale_inv")
    tile = tile_of(block, "weight_block_size")
    return Scaled(f"{name} (blocks of {tile[0]} x {tile[1]})", (8,), (tile[1],), (tile,), "weight_scale_inv")


def read_fbgemm(raw: dict, name: str) -> Scaled:
    return Scaled(f"{name} (a scale a row)", (8,), (0,), (ROW,))


def tile_of(value: Any, key: str) -> Tile:
    """Raises Unfit for anything but two sizes."""
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or not all(type(size) is int and 0 < size <= 4096 for size in sizes):
        raise Unfit(f"{key} must be two positive whole numbers, not {value!r}; such as {named([128])}, 128")
    return sizes[0], sizes[1]
