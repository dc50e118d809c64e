"""`inspect` by what tokens are of: its measures on keys with known answers, and a model that sees."""

from __future__ import annotations

import json

import numpy as np
import pytest

from minioscar.app.cli import main
from minioscar.evaluation import figures, inspection, modalities

from .test_video_files import files, folder  # noqa: F401

TOKENS = 256


def test_levels_spreads_and_what_one_norm_leaves_are_told_by_kind() -> None:
    """Two heads. Pictures are four times as long as text; in their second group one head of a token is 16 times its
    usual length, and one norm over both heads makes its other head too short."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 128, 64))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    kinds = ["text"] * 48 + ["image"] * 80
    keys[:, 48:] *= 4
    keys[0, 100] *= 16
    found = modalities.of_layer(keys.astype(np.float32), kinds, 32)
    root, peak = 2**0.5, 4 * (16**2 + 1) ** 0.5
    np.testing.assert_allclose(found["text"]["norm"], [root] * 4, rtol=1e-5)
    np.testing.assert_allclose(found["image"]["norm"], [4 * root] * 3 + [peak], rtol=1e-5)
    np.testing.assert_allclose(found["text"]["spread"], [1] * 4, rtol=1e-5)
    np.testing.assert_allclose(found[modalities.MEETING]["spread"], [4] * 4, rtol=1e-5)
    assert found["image"]["spread"][3] == pytest.approx(peak / (4 * root), rel=1e-5)
    np.testing.assert_allclose(found[modalities.MEETING]["left"], [1] * 4, rtol=1e-5)  # a factor of all heads
    # sqrt(2) of the loud head; of the quiet one, whose share is 4 / peak instead of 1 / sqrt(2), peak / 4 / sqrt(2)
    assert found["image"]["left"][3] == pytest.approx(peak / 4 / root, rel=1e-5)
    assert found["text"]["left"][3] == pytest.approx(1, rel=1e-5)


def test_runs_are_those_of_equal_kinds() -> None:
    found = modalities.runs_of(["text", "text", "image", "text"])
    assert [tuple(run.values()) for run in found] == [("text", 0, 2), ("image", 2, 1), ("text", 3, 1)]


def test_a_report_tells_text_pictures_and_films_apart(folder, files, tmp_path, capsys) -> None:  # noqa: F811
    out = ["--tokens", str(TOKENS), "--out", str(tmp_path), "--device", "cpu", "--json", "--kv", "oscar"]
    argv = ["inspect", str(folder), "--image", files["picture"], "--video", files["a"], *out]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    counts = dict.fromkeys(("text", "image", "video"), 0)
    for run in found["runs"]:
        counts[run["kind"]] += run["count"]
    assert counts["image"] == 24 and counts["video"] == 2 * 24 and sum(counts.values()) == TOKENS
    assert [run["kind"] for run in found["runs"]] == ["text", "image", "text", "video", "text", "video", "text"]
    for layer in found["layers"]:
        assert list(layer["kinds"]) == ["text", "image", "video", modalities.MEETING]
        spreads = [of["spread"] for of in layer["kinds"].values() if "spread" in of]
        assert spreads and all(1 <= of[0] <= of[1] <= of[2] <= of[3] for of in spreads)
        norms = np.array(layer["token_norms"])
        here = next(run for run in found["runs"] if run["kind"] == "image")
        of_pictures = norms[here["first"] : here["first"] + here["count"]]
        assert layer["kinds"]["image"]["norm"][3] == pytest.approx(of_pictures.max(), rel=1e-3)
    assert all(sink["text"] for sink in found["sinks"])
    html = (tmp_path / "report.html").read_text()
    assert "24 of image" in html and "48 of video" in html and html.count("<svg") == len(figures.FIGURES)
    left, right = figures.drawn(figures.kinds, found).axes
    assert [line.get_label() for line in left.lines] == ["text", "image", "video"] and right.lines
    assert sum(len(line.get_xdata()) for line in left.lines) == TOKENS


def test_text_before_a_picture_has_the_keys_that_it_has_without(folder, files) -> None:  # noqa: F811
    """Attention is causal: what is measured of the first tokens does not depend on what follows."""
    same = [{"type": "image", "image": files["picture"]}]
    one, other = (
        inspection.inspect(str(folder), ["oscar"], tokens=TOKENS, device="cpu", media=[*same, *more])
        for more in ([], [{"type": "video", "video": files["b"]}])
    )
    first = next(run["first"] for run in other["runs"] if run["kind"] == "video") - 12
    for a, b in zip(one["layers"], other["layers"], strict=True):
        np.testing.assert_allclose(a["token_norms"][:first], b["token_norms"][:first], rtol=1e-3)


@pytest.mark.parametrize(
    ("model", "more", "why"),
    [(None, ["--video", "a"] * 9, "the media take more than 256 tokens; raise --tokens"),
     (None, ["--image", "none.png"], "none.png"), (None, ["--fps", "1"], "--fps is for --video"),
     ("smollm2-135m", ["--image", "picture"], "this model reads no images")],
)  # fmt: skip
def test_what_cannot_be_drawn_is_said_in_one_line(
    folder, files, capsys, tmp_path, model, more, why  # noqa: F811
) -> None:
    more = [files.get(one, one) for one in more]
    out = ["--tokens", str(TOKENS), "--out", str(tmp_path / "r"), "--device", "cpu"]
    assert main(["inspect", model or str(folder), *more, *out]) == 2
    found = capsys.readouterr()
    assert not found.out and found.err.count("\n") == 1 and why in found.err and not (tmp_path / "r").exists()
