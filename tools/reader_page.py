"""Draws the page beside the reader, and says what is on it: `python -m tools.reader_page weights/reader/page.png`."""

from __future__ import annotations

import sys

import numpy as np

from minioscar.evaluation import pages

SEED, SHAPE, CELLS = 1, (15, 21), 24


def example() -> pages.Page:
    return pages.page(*SHAPE, CELLS, np.random.default_rng(SEED))


if __name__ == "__main__":
    pages.drawn(example()).save(sys.argv[1], optimize=True)
    print(*(cell.text for cell in example().cells))
