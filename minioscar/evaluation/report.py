"""report.json and report.html of `inspect`: figures of what inspection.py measured, each with a few lines for a
student."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..storage import strict_json as json
from ..storage.files import check_writable, expand, replacing
from .figures import FIGURES, STYLE, drawn, sinks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = "report.json", "report.html"
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 17px/1.55 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 3rem auto; padding: 0 1.5rem; }}
h1 {{ font-size: 1.9rem; margin-bottom: 0; }} h2 {{ font-size: 1.3rem; margin-top: 3rem; }}
figure {{ margin: 1rem 0; }} figure svg {{ width: 100%; height: auto; }} p {{ max-width: 46rem; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #ddd; }}
td:nth-child(2) {{ text-align: left; font-family: monospace; white-space: pre; }} .dim {{ color: #666; }}
</style></head><body>
<h1>{title}</h1>
<p class="dim">{subtitle}</p>
{body}
</body></html>
"""


def check(folder: str | Path, text: str | None = None) -> None:
    """Raises UserError where a report cannot be made, before anything is measured: no matplotlib, no folder to write
    to.

    text: the file that is measured, which no report replaces.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "inspect draws its figures with matplotlib, which is not installed; pip install 'minioscar[plot]'"
        ) from None
    if str(folder) == "-":
        raise UserError("--out - would be standard output, but a report is a folder; name one, or take --json instead")
    folder = expand(folder)
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    except FileNotFoundError:
        raise UserError(f"{folder}: the working directory is gone; go to another, or give a whole path") from None
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(
            f"{folder} cannot be written to ({existing} is no folder or is write-protected); give another --out"
        )
    for name in FILES if folder.is_dir() else ():
        check_writable(folder / name, inputs=() if text is None else (text,))


def write(report: dict, folder: str | Path) -> list[Path]:
    """Writes report.json and report.html into the folder, each whole or not at all; returns their paths."""
    folder = expand(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); give another --out") from None
    for name, text in zip(FILES, (json.dumps(report), page(report)), strict=True):
        with replacing(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return [folder / name for name in FILES]


def page(report: dict) -> str:
    """The whole report as one HTML file that loads nothing."""
    parts = []
    for title, text, draw in FIGURES:
        parts += [f"<h2>{html.escape(title)}</h2>", f"<figure>{svg(draw, report)}</figure>", f"<p>{text}</p>"]
        if draw is sinks:
            parts.append(sink_table(report))
    subtitle = (
        f"{len(report['layers'])} layers, {report['kv_heads']} kv heads of {report['head_dim']} channels; "
        f"{report['tokens']:,} tokens{_of(report)}, one unquantized run on {report['device']}. "
        f"Keys are taken after RoPE, in groups of {report['group']} tokens."
    )
    title = html.escape(f"What quantization meets in {Path(report['model']).name}")
    return PAGE.format(title=title, subtitle=html.escape(subtitle), body="\n".join(parts))


def _of(report: dict) -> str:
    """What the tokens are of."""
    counts: dict[str, int] = {}
    for run in report["runs"]:
        counts[run["kind"]] = counts.get(run["kind"], 0) + run["count"]
    return " of text" if len(counts) == 1 else f" ({', '.join(f'{n:,} of {kind}' for kind, n in counts.items())})"


def svg(draw: Callable[[Figure, dict], None], report: dict) -> str:
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context(STYLE):
        drawn(draw, report).savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def sink_table(report: dict) -> str:
    rows = [
        f"<tr><td>{sink['position']}</td><td>{html.escape(repr(sink['text']))}</td><td>{sink['layers']}</td>"
        f"<td>{sink['attention']:.1%}</td><td>{sink['norm_to_median']:.2f}</td></tr>"
        for sink in report["sinks"][:10]
    ]
    head = (
        "<tr><th>token</th><th>text</th><th>sink in layers</th><th>attention received</th><th>norm / median</th></tr>"
    )
    return f"<table>{head}{''.join(rows)}</table>" if rows else "<p>No token is a sink in any layer.</p>"
