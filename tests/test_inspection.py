"""`inspect`: its measures on cases with known answers, its findings on a real model, its files."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest

from minioscar import oscar
from minioscar.app.cli import main
from minioscar.cache import BF16, Cache, NewTokens
from minioscar.config import Config
from minioscar.evaluation import contrasts, figures, inspection, report
from minioscar.key_shaping import Shaping
from minioscar.ops.reference import Reference
from minioscar.oscar import SCHEMES, WINDOW, Scheme

from .tiny import CONFIG

KV = ["kivi", "rotation", "scaling", "oscar", "int2"]


@pytest.fixture(scope="module")
def found() -> dict:
    return inspection.inspect("smollm2-135m", KV, tokens=256, device="cpu")


def test_no_token_of_rotated_keys_is_further_off_than_its_bound(seed):
    """And the bound is not idle: keys of one group whose norms differ by 16 come within a factor of four of it."""
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((2, 128, 32)).astype(np.float32)
    k[:, ::7] /= 16
    norms = oscar.token_norms(k.swapaxes(0, 1))
    turned = oscar.rotate(k).reshape(2, 4, 32, 32)
    bound = inspection.bound(norms, turned.max(axis=2) - turned.min(axis=2))
    back, _ = inspection.through_cache(k, k, SCHEMES["rotation"], Config.from_dict(CONFIG), Shaping(None, None))
    errors = np.linalg.norm(back - k, axis=(0, 2)) / norms
    # 1 %: keys pass through BF16, steps through float16
    assert (errors <= bound * 1.01).all() and errors.max() > bound.max() / 4
    assert bound[::7].min() > 4 * np.delete(bound, np.s_[::7]).max()


def test_attention_received_is_that_of_distant_queries_only():
    q, k = np.zeros((1, 1, 300, 8), np.float32), np.zeros((1, 300, 8), np.float32)
    share = inspection.received(q, k)  # equal scores: query i gives each of its i + 1 keys 1 / (i + 1)
    assert share[0] == pytest.approx(np.mean([1 / (i + 1) for i in range(128, 300)]), rel=1e-5)
    assert share[171] == pytest.approx(1 / 300, rel=1e-5) and (share[172:] == 0).all()


def test_stretch_is_the_range_with_the_token_over_the_range_without():
    group = np.array([[[0.0, 1.0], [1.0, 2.0], [3.0, 1.5]]], np.float32)
    np.testing.assert_allclose(inspection.stretch(group, 2), [[3, 1]])


def test_the_first_token_of_smollm2_is_a_sink_with_a_small_key(found):
    sink = found["sinks"][0]
    assert sink["position"] == 0 and sink["layers"] > 20 and sink["attention"] > 0.2 and sink["norm_to_median"] < 0.6


def test_token_norm_imbalance_on_a_real_model(found):
    """Without scaling the error follows the norm spread of the group, within the bound; with it, it does not rise."""
    data = found["imbalance"]
    assert data["spread"][-1] > 3 * data["spread"][0] and sum(data["tokens"]) == 256 * len(found["layers"])
    for name in ("kivi", "rotation"):
        assert data["errors"][name][-1] > 2.5 * data["errors"][name][0]
    assert all(error <= bound for error, bound in zip(data["errors"]["rotation"], data["bound"], strict=True))
    for name in ("scaling", "oscar"):
        assert data["errors"][name][-1] < 1.2 * data["errors"][name][0]
    assert found["errors_by_token"]["kivi"]["keys"][0] > 2 * found["errors_by_token"]["oscar"]["keys"][0]
    assert max(
        found["errors_by_token"]["int2"]["keys"][:32]
    ) < 2**-9 < 0.05 < min(found["errors_by_token"]["int2"]["keys"][32:])  # BF16


def test_scaling_without_rotation_makes_new_outliers(found):
    """The Scaling-Induced Outlier Artifact: the token of lowest norm stretches its group more than before, unless keys
    are rotated."""
    worst = {step: np.mean([layer["stretch"][step][0] for layer in found["layers"]]) for step in inspection.STEPS}
    assert worst["scaled"] > 1.4 * worst["raw"] and worst["scaled"] > 1.5 * worst["rotated and scaled"]
    assert len(found["example"]["keys"]["scaled"]) == 32 and found["example"]["low_norm_token"] == 0


def test_norms_survive_rotation_and_are_one_after_scaling(found):
    for layer in found["layers"]:
        np.testing.assert_allclose(layer["norms"]["k"]["raw"], layer["norms"]["k"]["rotated"], rtol=2e-3)
        np.testing.assert_allclose(layer["norms"]["q"]["raw"], layer["norms"]["q"]["rotated"], rtol=2e-3)
        assert np.array(layer["norms"]["k"]["scaled"]).max() <= 1
        assert np.array(layer["norms"]["v"]["raw"]).shape == (3, len(inspection.QUANTILES))


def test_report_is_two_files_that_need_nothing_else(found, tmp_path):
    files = report.write(found, tmp_path / "new" / "folder")
    assert [file.name for file in files] == ["report.json", "report.html"] and sorted(tmp_path.rglob(".*")) == []
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(found))
    html = files[1].read_text()
    assert html.count("<svg") == len(figures.FIGURES) and html.count("<h2>") == len(figures.FIGURES)
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", html) and "<script" not in html


def test_the_same_numbers_give_the_same_bytes(found):
    _, _, draw = figures.FIGURES[4]
    assert report.svg(draw, found) == report.svg(draw, found)


def test_every_figure_draws_what_was_measured(found):
    for _, text, draw in figures.FIGURES:
        axes = figures.drawn(draw, found).axes
        assert axes and text.endswith(".")
    lines = {line.get_label(): line.get_ydata() for line in figures.drawn(figures.bound, found).axes[0].lines}
    np.testing.assert_array_equal(lines["oscar"], found["imbalance"]["errors"]["oscar"])
    np.testing.assert_array_equal(lines["bound without scaling"], found["imbalance"]["bound"])


def test_command_writes_the_report_and_prints_where(capsys, tmp_path, monkeypatch, found):
    monkeypatch.setattr("minioscar.evaluation.inspection.inspect", lambda *args, **options: found)
    monkeypatch.setattr("minioscar.evaluation.report.FIGURES", figures.FIGURES[:1])
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "to").mkdir()
    (tmp_path / "r").symlink_to("to")
    assert main(["inspect", "smollm2-135m", "--out", "~/r"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'r' / 'report.html'}\n"
    assert (tmp_path / "r" / "report.json").exists()
    assert main(["inspect", "smollm2-135m", "--out", str(tmp_path / "r"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schemes"] == KV


@pytest.mark.parametrize(
    ("options", "mention"),
    [(["--tokens", "1000"], "--tokens 1000"), (["--tokens", "128"], "at least 256")]
    + [(["--tokens", "16384"], "8192"), (["--kv", "foo"], "'foo'")],
)
def test_bad_input_is_one_line(options, mention, capsys, tmp_path):
    assert main(["inspect", "smollm2-135m", "--out", str(tmp_path / "r"), *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and mention in err and not (tmp_path / "r").exists()


def test_a_working_directory_that_is_gone_is_said(capsys, monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["inspect", "smollm2-135m", "--out", "r"]) == 2
    assert "the working directory is gone" in capsys.readouterr().err


def test_a_missing_matplotlib_and_a_bad_folder_are_named_with_the_way_out(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["inspect", "smollm2-135m", "--out", str(tmp_path / "file" / "r")]) == 2
    assert "give another --out" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minioscar.evaluation.inspection.inspect", lambda *_, **__: pytest.fail("it went on"))
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "report.json").mkdir()
    for out, mention in (
        ("file", "is no folder"), ("loop", "is no folder"), ("-", "--out - would be standard output"),
        ("r", "report.json is a folder"),
        ("~nobody-of-this-name/r", "no home folder"), ("", "not the name"),
    ):
        assert main(["inspect", "smollm2-135m", "--out", out]) == 2
        err = capsys.readouterr().err
        assert mention in err and err.count("\n") == 1
    (tmp_path / "report.json").write_text("precious")
    assert main(["inspect", "smollm2-135m", "--out", ".", "--text", "report.json"]) == 2
    assert "would be lost" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", "smollm2-135m"]) == 2
    assert "pip install 'minioscar[plot]'" in capsys.readouterr().err


def test_a_window_of_its_own_scheme_is_what_decoding_reads(seed):
    """Codes for the first P(p) tokens, the others as they are: the same as a cache that is fed token by token."""
    rng = np.random.default_rng(seed)
    config, tokens = replace(Config.from_dict(CONFIG), num_layers=1), 256
    heads, d = config.num_kv_heads, config.head_dim
    k, v = (rng.standard_normal((heads, tokens, d)).astype(BF16).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((WINDOW, config.num_heads, d)).astype(np.float32)
    scheme = Scheme("kept", flush=64, keep=64)
    back = inspection.through_cache(k, v, scheme, config, Shaping(None, None))
    found = contrasts.by_window(q, (k, v), back, scheme)
    cache, out = Cache(config, scheme, 1, tokens, Reference()), []
    for start, end in ((0, 128), *((p, p + 1) for p in range(128, tokens))):
        batch = cache.batch_for([0], [end - start])
        new = NewTokens(k[:, start:end].swapaxes(0, 1), v[:, start:end].swapaxes(0, 1))
        if start:
            out.append(cache.layers[0].attend(q[start - 128 : end - 128], new, batch))
        cache.layers[0].append(new, batch)
        cache.advance(batch)
    exact = inspection.attend(q.reshape(WINDOW, heads, -1, d).transpose(1, 2, 0, 3), k, v)
    exact = exact.transpose(2, 0, 1, 3).reshape(q.shape)
    error, size = (np.square(x).reshape(8, -1).sum(axis=1) for x in (np.concatenate(out) - exact, exact))
    np.testing.assert_allclose(found["64/64"], np.sqrt(error / size), rtol=1e-3)
    assert list(found) == ["64/64", "128/0", "32/96"] and np.mean(found["128/0"]) > np.mean(found["64/64"])


def test_the_window_shows_on_a_real_model(found):
    """Just after a flush of everything attention errs most; a window that is not emptied has no such peak."""
    errors = found["windows"]["errors"]["int2"]
    assert errors["128/0"][0] > 1.2 * errors["128/0"][-1] and errors["128/0"][0] > 1.2 * errors["64/64"][0]
    assert np.mean(errors["32/96"]) < np.mean(errors["128/0"])


def test_feedback_moves_errors_to_pairs_that_queries_weigh_least():
    found = inspection.inspect("smollm2-135m", ["int2"], tokens=256, device="cpu")
    effect = found["feedback"]["int2"]
    plain, shaped, energy = (np.array(effect[name]["pairs"]) for name in ("plain", "shaped", "energy"))
    assert np.all(np.diff(energy) <= 0) and plain.mean() == pytest.approx(1, rel=0.01)
    assert shaped[:4].mean() < 0.8 * plain[:4].mean() and shaped[-8:].mean() > 1.2 * plain[-8:].mean()
    assert effect["shaped"]["logits"] < 0.9 * effect["plain"]["logits"]
    lines = figures.drawn(figures.feedback, found).axes[0].lines
    np.testing.assert_array_equal(lines[1].get_ydata(), effect["shaped"]["pairs"])
