"""The README says what the committed measurements say."""

from __future__ import annotations

import importlib.util
import json

from .tiny import write_model


def module(name: str, path):
    spec = importlib.util.spec_from_file_location(name, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_readme_tables_are_rendered_from_their_json(pytestconfig):
    render = module("render", pytestconfig.rootpath / "docs" / "render.py")
    text = (pytestconfig.rootpath / "README.md").read_text()
    assert {block[2] for block in render.BLOCK.finditer(text)} == set(render.TABLES)
    assert render.rendered(text) == text, "run `make results`"


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
