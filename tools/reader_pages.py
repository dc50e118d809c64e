"""Batches of the pages of minioscar/evaluation/pages.py, made on the device that trains, and questions about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minioscar.evaluation import pages
from tools.reader_model import END, FIRST, TEXT

QUESTION = 8  # ids of "C7?", its answer and its end
NONE = -100  # no target
ASCII = [FIRST + ord(symbol) - 32 for symbol in pages.SYMBOLS]
LETTER0 = len(pages.DIGITS)  # index of the first letter in SYMBOLS
assert TEXT["vocab_size"] >= FIRST + 96


@dataclass(frozen=True)
class Stage:
    """Pages of one difficulty. shapes: rows and columns of tokens. jitter: how far margins and the places of cells in
    their boxes go, of all their room; at 0 all letters have one size, too."""

    shapes: tuple[tuple[int, int], ...]
    jitter: float = 1.0
    least: float = 0.25  # of the boxes that are used; up to all


@dataclass(frozen=True)
class Batch:
    pages: Tensor  # float32 [batch, height, width], -1 to 1
    ids: Tensor  # [batch, questions * QUESTION]
    targets: Tensor  # the next id where it belongs to an answer, NONE elsewhere
    cell: Tensor  # [batch, tokens, 6]: label and value of the cell that a token of the page is of, or NONE
    here: Tensor  # [batch, tokens, 2]: the symbols whose middles are in its left and its right half, or NONE


def glyphs(path: Path, device: Any) -> Tensor:
    """float32 [sizes, symbols, GLYPH, GLYPH] from 0 to 1; drawn and kept in the file if it is not there."""
    if not path.exists():
        symbols = (*pages.SYMBOLS, ":")
        np.save(path, np.stack([[pages.glyph(symbol, size) for symbol in symbols] for size in pages.SIZES]))
    return torch.from_numpy(np.load(path)).to(device).float() / 255


class Maker:
    def __init__(self, atlas: Tensor, seed: int) -> None:
        self.atlas, self.device = atlas, atlas.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.ascii = torch.tensor(ASCII, device=self.device)
        self.offsets = torch.tensor(pages.OFFSETS, device=self.device)
        self.side = torch.arange(pages.GLYPH, device=self.device)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        """Random whole numbers from low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator, device=self.device)

    def some(self, batch: int, of: int, count: int) -> Tensor:
        """count different numbers below `of`, in random order, for every row."""
        order = torch.rand(batch, of, generator=self.generator, device=self.device).argsort(dim=1)
        return order[:, :count]

    def batch(self, size: int, shape: tuple[int, int], cells: int, questions: int, jitter: float = 1.0) -> Batch:
        down, across = pages.boxes_of(*shape)
        boxes, labels = self.some(size, down * across, cells), self.some(size, len(pages.LETTERS) * 10, cells)
        values = self.whole(0, len(ASCII) - 1, size, cells, pages.VALUE)
        spare = pages.TOKEN * shape[1] - pages.BOX[1] * across
        reach = [round(jitter * most) for most in (spare, *pages.SLACK)]
        top, left = pages.TOKEN * self.whole(0, 1, size, 1), self.whole(0, reach[0], size, 1)
        y = boxes // across * pages.BOX[0] + top + self.whole(0, reach[1], size, cells)
        x = boxes % across * pages.BOX[1] + left + self.whole(0, reach[2], size, cells)
        label = torch.stack([LETTER0 + labels // 10, labels % 10], dim=-1)
        cell = torch.cat([label, values], dim=-1)  # [batch, cells, 6]
        drawn = self.draw(cell, y, x, shape, jitter > 0)
        here = self.here(cell, y, x, shape)
        return Batch(drawn, *self.ask(cell, questions), self.owners(cell, boxes, top, left, shape), here)

    def draw(self, cell: Tensor, y: Tensor, x: Tensor, shape: tuple[int, int], sizes: bool) -> Tensor:
        size, height, width = len(cell), shape[0] * pages.TOKEN, shape[1] * pages.TOKEN
        colon = cell.new_full((*cell.shape[:2], 1), len(ASCII))
        text = torch.cat([cell[..., :2], colon, cell[..., 2:]], dim=-1)
        font = self.whole(*(0, len(pages.SIZES) - 1) if sizes else (1, 1), size)
        ink = self.atlas[font[:, None, None], text]  # [batch, cells, 7, GLYPH, GLYPH]
        corner = y[:, :, None] * width + x[..., None] + self.offsets
        at = (corner[..., None, None] + self.side[:, None] * width + self.side).view(size, -1)
        canvas = ink.new_zeros(size, height * width).scatter_reduce_(1, at, ink.view(size, -1), "amax")
        paper, dark = self.whole(180, 255, size, 1), self.whole(0, 90, size, 1)
        shade = torch.round(paper + (dark - paper) * canvas)
        return (shade / 127.5 - 1).view(size, height, width)

    def ask(self, cell: Tensor, questions: int) -> tuple[Tensor, Tensor]:
        """About different cells each; the answers are part of the ids."""
        size, told = len(cell), self.ascii[cell[:, :questions]]  # cells are in random order already
        mark, end = (told.new_full((size, questions, 1), i) for i in (FIRST + ord("?") - 32, END))
        ids = torch.cat([told[..., :2], mark, told[..., 2:], end], dim=-1)
        targets = torch.full_like(ids, NONE)
        targets[..., 2:7] = ids[..., 3:]
        return ids.view(size, -1), targets.view(size, -1)

    def here(self, cell: Tensor, y: Tensor, x: Tensor, shape: tuple[int, int]) -> Tensor:
        half, middle = pages.TOKEN // 2, pages.LEFT + 8
        offsets = torch.cat([self.offsets[:2], self.offsets[3:]])
        column = (x[..., None] + offsets + middle) // half
        at = (y + pages.GLYPH // 2)[..., None] // pages.TOKEN * (2 * shape[1]) + column
        table = cell.new_full((len(cell), 2 * shape[0] * shape[1]), NONE)
        return table.scatter_(1, at.flatten(1), cell.flatten(1)).view(len(cell), -1, 2)

    def owners(self, cell: Tensor, boxes: Tensor, top: Tensor, left: Tensor, shape: tuple[int, int]) -> Tensor:
        """A token is of the box in which its middle lies."""
        down, across = pages.boxes_of(*shape)
        table = cell.new_full((len(cell), down * across + 1, 6), NONE)
        table.scatter_(1, boxes[..., None].expand(-1, -1, 6), cell)
        rows, columns = (torch.arange(n, device=self.device) * pages.TOKEN + pages.TOKEN // 2 for n in shape)
        row = torch.div(rows - top, pages.BOX[0], rounding_mode="floor")  # [batch, rows]
        column = torch.div(columns - left, pages.BOX[1], rounding_mode="floor")
        inside = ((row >= 0) & (row < down))[:, :, None] & ((column >= 0) & (column < across))[:, None]
        box = torch.where(inside, row[:, :, None] * across + column[:, None], down * across).flatten(1)
        return table.gather(1, box[..., None].expand(-1, -1, 6))
