"""A picture -> tiles of pixels, as LLaVA's image processors cut them, and what of a tile grid is picture.

LLaVA-NeXT (llava-vl.github.io, 2024-01-30): the whole picture squeezed into one tile, then the picture itself, fitted
into one of a few grids of tiles. LLaVA-1.5 takes the middle of the picture, one tile. In both a tile is as large as
what CLIP was trained with. Equal to LlavaNextImageProcessorPil and LlavaImageProcessorPil of transformers 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of RGB
Size = tuple[int, int]  # height, width


def cut(picture: np.ndarray, tile: int, grids: Sequence[Size] | None) -> np.ndarray:
    """The tiles of a picture uint8 [height, width, 3], uint8 [tiles, tile, tile, 3]: the whole, then a grid of tiles
    row by row.

    grids: height and width in pixels of those that there are (None: LLaVA-1.5's one tile).
    """
    if grids is None:
        return _middle(picture, tile)[None]
    height, width = best_grid(picture.shape[:2], grids)
    fitted = fit(picture.shape[:2], (height, width))
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = ((whole - part) // 2 for whole, part in zip((height, width), fitted, strict=True))
    canvas[top : top + fitted[0], left : left + fitted[1]] = _resized(picture, fitted)
    grid = canvas.reshape(height // tile, tile, width // tile, tile, 3).swapaxes(1, 2)
    return np.concatenate([_resized(picture, (tile, tile))[None], grid.reshape(-1, tile, tile, 3)])


def best_grid(size: Size, grids: Sequence[Size]) -> Size:
    """The grid that shows most of the picture's own pixels, of those the one that wastes least."""

    def rank(grid: Size) -> tuple[int, int]:
        scale = min(grid[1] / size[1], grid[0] / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return -shown, grid[0] * grid[1] - shown

    return min(grids, key=rank)


def fit(size: Size, grid: Size) -> Size:
    """The size of a picture that fills a grid in one direction."""
    by_height, by_width = grid[0] / size[0], grid[1] / size[1]
    if by_width < by_height:
        return min(math.ceil(size[0] * by_width), grid[0]), grid[1]
    return grid[0], min(math.ceil(size[1] * by_height), grid[1])


def shown_rows(size: Size, grid: Size) -> tuple[slice, slice]:
    """Rows and columns of a map over a grid, `grid` high and wide, that show a picture of this size and no padding.

    As `unpad_image` of transformers' modeling_llava_next.py has it, which is a row more where half of one is padding.
    """
    if size[1] / size[0] > grid[1] / grid[0]:
        padding = (grid[0] - int(round(size[0] * (grid[1] / size[1]), 7))) // 2
        return slice(padding, grid[0] - padding), slice(0, grid[1])
    padding = (grid[1] - int(round(size[1] * (grid[0] / size[0]), 7))) // 2
    return slice(0, grid[0]), slice(padding, grid[1] - padding)


def normalized(pixels: np.ndarray) -> np.ndarray:
    """uint8 [n, height, width, 3] -> float32 [n, 3, height, width], each colour about 0 with a deviation of 1."""
    x = (pixels.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(DEVIATION)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _middle(picture: np.ndarray, tile: int) -> np.ndarray:
    """The shorter side is made as long as a tile, and the middle of the longer one is taken."""
    height, width = picture.shape[:2]
    size = (tile, int(tile * width / height)) if height <= width else (int(tile * height / width), tile)
    top, left = ((side - tile) // 2 for side in size)
    return _resized(picture, size)[top : top + tile, left : left + tile]


def _resized(picture: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [height, width, 3]."""
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))
