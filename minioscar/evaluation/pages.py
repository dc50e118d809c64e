"""Pages that a small model can read: cells with a label and a value each, drawn by Pillow in its own font.

A cell is "C7:4K2P". It stands in a box of 4 x 1 tokens of 32 x 32 pixels, where in the box is random, and so are the
boxes that are used, the labels, the values, the size of the letters, the margins and both shades of gray. A page of
R rows and C columns of tokens has (R - 1) x (C // 4) boxes: the rest is margin, above or below, left and right. So a
line of text is within a row of tokens, while its symbols are cut by tokens and patches in any way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

LETTERS, DIGITS = "ABCDEFGHJKLMNPQRSTUVWXYZ", "0123456789"  # no I and O, which look like 1 and 0
SYMBOLS = DIGITS + LETTERS
VALUE = 4  # symbols of a value
SIZES = 18, 19, 20  # of Pillow's default font
TOKEN, BOX = 32, (32, 128)  # pixels of a token's side; of a box, height and width
GLYPH = 24  # pixels of the side of the square in which a symbol is drawn
OFFSETS = 0, 16, 32, 40, 56, 72, 88  # pixels from a cell's left edge to each symbol's: 16 wide, the colon 8
SLACK = BOX[0] - GLYPH, BOX[1] - 112  # places of a cell in its box, down and across
LEFT = 4  # pixels by which a glyph's square begins before its symbol does


@dataclass(frozen=True)
class Cell:
    label: str
    value: str
    y: int  # pixels of its first glyph's square from the page's upper edge
    x: int
    box: tuple[int, int]  # row and column of its box

    @property
    def text(self) -> str:
        return f"{self.label}:{self.value}"


@dataclass(frozen=True)
class Page:
    rows: int  # of tokens
    columns: int
    cells: tuple[Cell, ...]
    size: int  # of the font
    paper: int  # shade
    ink: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    def tokens_of(self, cell: Cell) -> range:
        """Indices of the page's tokens from the first to the last that the cell's glyphs touch."""
        top, bottom = cell.y // TOKEN, (cell.y + GLYPH - 1) // TOKEN
        left, right = cell.x // TOKEN, (cell.x + OFFSETS[-1] + GLYPH - 1) // TOKEN
        return range(top * self.columns + left, bottom * self.columns + right + 1)


@cache
def glyph(symbol: str, size: int) -> np.ndarray:
    """The symbol in Pillow's default font, ink from 0 to 255, on one base line; uint8 [GLYPH, GLYPH]."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("L", (GLYPH, GLYPH))
    across = LEFT + (4 if symbol == ":" else 8)
    ImageDraw.Draw(image).text((across, 19), symbol, 255, ImageFont.load_default(size), anchor="ms")
    return np.asarray(image)


def boxes_of(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of boxes on a page of so many tokens."""
    return rows - 1, columns // 4


def page(rows: int, columns: int, cells: int, rng: np.random.Generator) -> Page:
    """A random one. Raises ValueError where it has not so many boxes, or there are not so many labels."""
    down, across = boxes_of(rows, columns)
    if not 0 < cells <= min(down * across, len(LETTERS) * len(DIGITS)):
        raise ValueError(f"a page of {rows} x {columns} tokens has no room for {cells} cells")
    boxes = rng.permutation(down * across)[:cells]
    labels = rng.permutation(len(LETTERS) * len(DIGITS))[:cells]
    margin = TOKEN * rng.integers(2), rng.integers(TOKEN * columns - BOX[1] * across + 1)
    found = []
    for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
        row, column = divmod(box, across)
        y = row * BOX[0] + margin[0] + rng.integers(SLACK[0] + 1)
        x = column * BOX[1] + margin[1] + rng.integers(SLACK[1] + 1)
        value = "".join(SYMBOLS[i] for i in rng.integers(len(SYMBOLS), size=VALUE))
        found.append(Cell(LETTERS[label // 10] + DIGITS[label % 10], value, int(y), int(x), (row, column)))
    shades = int(rng.integers(180, 256)), int(rng.integers(0, 91))
    return Page(rows, columns, tuple(found), SIZES[rng.integers(len(SIZES))], *shades)


def drawn(page: Page) -> Any:
    """The page as a PIL image of gray shades."""
    from PIL import Image

    ink = np.zeros((page.rows * TOKEN, page.columns * TOKEN), np.uint8)
    for cell in page.cells:
        for symbol, offset in zip(cell.text, OFFSETS, strict=True):
            x = cell.x + offset
            square = ink[cell.y : cell.y + GLYPH, x : x + GLYPH]
            np.maximum(square, glyph(symbol, page.size), out=square)
    return Image.fromarray(shaded(ink, page.paper, page.ink))


def shaded(ink: Any, paper: int, dark: int) -> np.ndarray:
    """Ink from 0 to 255 on paper; uint8."""
    return np.rint(paper + (dark - paper) * (ink.astype(np.float32) / 255)).astype(np.uint8)
