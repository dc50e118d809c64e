"""README, docs and figures say what the committed measurements say."""

from __future__ import annotations

import html
import importlib.util
import json
import re

from .tiny import write_model


def module(name: str, path):
    spec = importlib.util.spec_from_file_location(name, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_tables_are_rendered_from_their_json(pytestconfig):
    render, used = module("render", pytestconfig.rootpath / "docs" / "render.py"), set()
    for page in render.PAGES:
        text = (pytestconfig.rootpath / page).read_text()
        used |= {block[2] for block in render.BLOCK.finditer(text)}
        assert render.rendered(text) == text, f"{page}: run `make results`"
    assert used == set(render.TABLES)


def test_pareto_plot_shows_the_committed_numbers(pytestconfig):
    pareto = module("pareto", pytestconfig.rootpath / "docs" / "pareto.py")
    description = re.search(r"<dc:description>(.*?)</dc:description>", (pareto.RESULTS / "pareto.svg").read_text(), re.DOTALL)
    assert json.loads(html.unescape(description[1])) == pareto.points(), "run `make results`"
    assert pareto.front({"a": [3, 0.2, 0], "b": [2, 0.5, 0], "c": [2.5, 0.6, 0], "d": [4, 0.1, 0]}) == [(2, 0.5), (3, 0.2), (4, 0.1)]


def test_bench_runs_without_a_gpu_and_writes_the_stable_keys(pytestconfig, tmp_path):
    bench = module("bench", pytestconfig.rootpath / "bench.py")
    model, file = write_model(tmp_path / "tiny", 1), tmp_path / "b.json"
    argv = f"all --model {model} --device cpu --kv bf16,int2 --context 128 --tokens 64 --steps 3 --json {file}"
    assert bench.main(argv.split()) == 0
    report = json.loads(file.read_text())
    assert set(report) == {"meta", "ceilings", "kernel", "decode", "prefill"} and set(report["ceilings"]) == {"copy_tb_s", "matmul_tflop_s"}
    assert {"card", "driver", "cuda", "versions", "commit", "date"} <= set(report["meta"])
    assert [(row["kv"], row["context"]) for row in report["decode"]] == [("bf16", 128), ("int2", 128)]
    assert all(row["ms"] > 0 and row["fraction_of_limit"] > 0 for row in report["decode"])
    assert bench.main(["decode", "--model", "nowhere"]) == 2
    assert bench.main(["kernel", "--device", "cpu"]) == 2
