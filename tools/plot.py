"""How the docs' figures look and are saved: matplotlib's SVG, whose text stays text and whose bytes do not change.

Sizes are in pixels of a screen with 96 to the inch, as browsers show SVG; 13 pixels are 9.75 points.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minioscar.storage.files import replacing

INK, MUTED, FAINT, GRID = "#1f2430", "#5b6270", "#9aa0ab", "#e4e4e4"
BLUE, RED, GREEN, SAND, PALE, GREY = "#3b6fb5", "#c0504d", "#5b9a5b", "#f1ece2", "#9db7da", "#7d8492"
POINTS = 0.75  # of a pixel
STYLE = {
    "font.size": 9, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.titlecolor": INK, "text.color": INK,
    "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.edgecolor": FAINT,
    "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": GRID, "legend.frameon": False,
    "svg.hashsalt": "minioscar", "svg.fonttype": "none",
}  # fmt: skip
styled = rc_context(STYLE)  # a decorator of what draws


def figure(width: int, height: int, title: str) -> Figure:
    found = Figure(figsize=(width / 96, height / 96), label=title)
    found.set_layout_engine("constrained", w_pad=1 / 8, h_pad=1 / 8, wspace=0.02)
    return found


def page(width: int, height: int, title: str) -> tuple[Figure, Axes]:
    """A figure whose one pair of axes are pixels, from the upper left; for drawings."""
    found = Figure(figsize=(width / 96, height / 96), label=title)
    axes = found.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    return found, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, fill: str, edge: str = "none") -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor=edge, linewidth=POINTS))


def words(axes: Axes, x: float, y: float, text: str, size: float = 13, **options: object) -> None:
    """On a base line; size in pixels; options as `Axes.text` has them."""
    axes.text(x, y, text, fontsize=size * POINTS, **options)


def arrow(axes: Axes, points: Sequence[tuple[float, float]], color: str = INK) -> None:
    """A polyline with a head at its last point."""
    if len(points) > 2:
        axes.plot(*zip(*points[:-1], strict=True), color=color, lw=1.1, solid_capstyle="butt")
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
    axes.annotate("", points[-1], points[-2], arrowprops=style)


@styled
def save(drawn: Figure, path: Path) -> None:
    about = {"Date": None, "Title": drawn.get_label(), "Description": json.dumps(content(drawn))}
    with replacing(path) as partial:
        drawn.savefig(partial, format="svg", metadata=about)


def content(drawn: Figure) -> dict:
    """What a figure shows, which two versions of matplotlib may draw with other bytes: texts, lines, boxes."""
    found: dict[str, list] = {"texts": [], "lines": [], "boxes": []}
    for axes in drawn.axes:
        labels = axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel(), *(text.get_text() for text in axes.texts)
        found["texts"] += filter(None, labels)
        found["lines"] += [
            [[float(f"{number:.4g}") for number in point] for point in line.get_xydata()] for line in axes.lines
        ]
        found["boxes"] += [[float(f"{number:.4g}") for number in patch.get_bbox().bounds] for patch in axes.patches]
    return found


def saved_content(path: Path) -> dict:
    return json.loads(unescape(re.search(r"<dc:description>(.*?)</dc:description>", path.read_text(), re.DOTALL)[1]))
