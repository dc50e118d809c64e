"""Tables of text, in Markdown for a page or in columns of equal width for a terminal, and numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table, a cell for each title."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def aligned(cells: Iterable[tuple[str, int]]) -> str:
    """A line of cells, each with its width; a negative one keeps the text to the left."""
    return " ".join(cell.ljust(-width) if width < 0 else cell.rjust(width) for cell, width in cells).rstrip()


def size(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
