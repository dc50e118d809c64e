"""Pictures as SVG text: rectangles, lines and letters on a white ground, so that a dark page changes nothing.

A dozen lines of a canvas are all the plotting library that they need, and a test can compare them as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

INK, FAINT, BLUE, RED, GREEN, SAND = "#1f2430", "#9aa0ab", "#3b6fb5", "#c0504d", "#5b9a5b", "#f1ece2"


class Canvas:
    def __init__(self, width: int, height: int, title: str):
        self.size, self.title, self.parts = (width, height), title, [f"<title>{escape(title)}</title>"]

    def rect(self, x: float, y: float, w: float, h: float, fill: str = "none", stroke: str = "none") -> None:
        where = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"'
        self.parts.append(f'<rect {where} fill="{fill}" stroke="{stroke}"/>')

    def text(
        self, x: float, y: float, text: str, size: float = 13, anchor: str = "start", fill: str = INK, mono: bool = False,
        upright: bool = False,
    ) -> None:  # fmt: skip
        family, turned = "monospace" if mono else "sans-serif", f' transform="rotate(-90 {x:.1f} {y:.1f})"' if upright else ""
        attributes = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" font-family="{family}"{turned}'
        self.parts.append(f'<text {attributes} xml:space="preserve">{escape(text)}</text>')

    def line(
        self, points: Sequence[tuple[float, float]], stroke: str = INK, width: float = 1.5, dash: str = "", arrow: bool = False
    ) -> None:
        more = f' stroke-dasharray="{dash}"' if dash else ""
        more += ' marker-end="url(#arrow)"' if arrow else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width}"{more}/>')

    def save(self, name: str, folder: Path) -> None:
        width, height = self.size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        shape = f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/>'
        marker = f'<defs><marker id="arrow" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">{shape}</marker></defs>'
        ground = f'<rect width="{width}" height="{height}" fill="white"/>'
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join([head, marker, ground, *self.parts, "</svg>"]) + "\n", encoding="utf-8")
