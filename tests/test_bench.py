"""bench.py on a CPU: every command, what its JSON promises, and that a budget is enforced rather than assumed."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import bench
from benchmarks import cases as bench_cases
from benchmarks import loading as bench_loading
from benchmarks import measure, presets, quantized
from benchmarks import memory as bench_memory
from benchmarks import models as bench_models
from benchmarks.measure import copies_of, enough, line, replayed, sustained
from minioscar import engine
from minioscar.cache import blocks_of, cache_bytes
from minioscar.config import Config
from minioscar.errors import UserError
from minioscar.ops.reference import Reference
from minioscar.oscar import SCHEMES
from minioscar.pages import unsupported

from . import simt
from .patience import PATIENCE
from .tiny import CONFIG, MOE, load, write_model, write_talker

MB = 10**6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("bench") / "tiny", 1)


@pytest.fixture(scope="module")
def report(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "b.json"
    argv = (
        f"all --quick --sweep --model {model} --device cpu --kv bf16,oscar,int2 --batch 1,2 --budget 12MB --json "
        f"{file}"
    )
    process = subprocess.run([sys.executable, bench.__file__, *argv.split()], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert f"bench: start needs a tokenizer, and {model} has none; give another --model\n" in process.stderr
    # of a card, of a model with a tokenizer, or not among `all`
    not_here = "skipped", "sustained", "dense", "breakdown", "start", "serve"
    assert all(f"\n{section}\n" in process.stdout for section in bench.SECTIONS if section not in not_here)
    return json.loads(file.read_text())


# --- the JSON


def test_json_has_the_stable_keys(report):
    assert {"card", "driver", "cuda", "versions", "commit", "date", "device", "quick", "command"} <= set(report["meta"])
    assert set(report["ceilings"]) == {"copy_tb_s", "matmul_tflop_s"} and min(report["ceilings"].values()) > 0
    attention = "op kv batch context q_heads kv_heads head_dim us us_spread bytes fraction_of_copy"
    for section, keys in {
        "kernel": attention, "sweep": attention, "decode": "model kv batch context ms tokens_per_s fraction_of_limit",
        "prefill": "model tokens tokens_per_s fraction_of_limit",
        "throughput": "model budget_gb kv context batch tokens_per_s",
        "memory": "kv batch context cache_bytes predicted_bytes ratio_to_bf16 prefill_peak_bytes",
        "load": "model layers bytes s spread first_s gb_s copy_gb_s fraction_of_copy",
        "growth": "over kv points us_per_1000_tokens us_at_0_tokens worst_error bytes_us_per_1000_tokens "
        "times_the_bytes",
    }.items():  # fmt: skip
        assert report[section], section
        for row in report[section]:
            assert set(keys.split()) <= set(row), section
    assert report["skipped"] == report["dense"] == report["start"] == report["serve"] == []


def test_a_run_without_a_gpu_says_so(report):
    assert report["meta"]["device"] == "cpu" and report["meta"]["card"].startswith("no GPU")
    assert "NumPy" in report["meta"]["note"]


def test_times_are_positive_and_fractions_are_those_of_the_bytes(report):
    copy, product = (report["ceilings"][name] * 1e12 for name in ("copy_tb_s", "matmul_tflop_s"))
    for row in report["kernel"] + report["sweep"]:
        assert row["us"] > 0 and row["us_spread"] >= 0
        assert row["fraction_of_copy"] == pytest.approx(row["bytes"] / (row["us"] * 1e-6) / copy)
    for row in report["decode"]:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
        assert row["fraction_of_limit"] == pytest.approx(row["bytes"] / (row["ms"] * 1e-3) / copy)
    for row in report["prefill"]:
        assert row["fraction_of_limit"] == pytest.approx(row["flops"] / row["s"] / product)


def test_every_scheme_batch_and_context_that_was_asked_for_is_there(report):
    pairs = [(kv, batch) for kv in ("bf16", "oscar", "int2") for batch in (1, 2)]
    for section, context in (("decode", 128), ("memory", 256)):
        assert [
            (row["kv"], row["batch"], row["context"]) for row in report[section]
        ] == [(*pair, context) for pair in pairs]
    assert [row["kv"] for row in report["throughput"]] == ["bf16", "oscar", "int2"]
    assert report["prefill"][0]["kv"] == "int2"


def test_the_embedding_counts_as_read_only_where_it_is_the_head(tmp_path):
    untied, tied = (
        engine.load(write_model(tmp_path / str(tie), 1, tie_word_embeddings=tie), "bf16", "cpu", tokenizer=False)
        for tie in (False, True)
    )
    assert bench_models.step_bytes(untied, 1, 128) == bench_models.step_bytes(tied, 1, 128)


@pytest.mark.skipif(simt.missing() is not None, reason=str(simt.missing()))
def test_a_cache_is_filled_alike_on_the_cuda_back_end():
    from .simt.backend import Simt

    config, scheme, ops, reference = Config.from_dict(CONFIG | {"head_dim": 64}), SCHEMES["int2"], Simt(), Reference()
    reference.dtype = ops.dtype
    ours, wanted = (bench_models.filled(config, scheme, back_end, 2, 130) for back_end in (ops, reference))
    assert "pages" in ours.arrays and list(ours.lengths) == [130, 130]
    for slot in (0, 1):
        for name, array in wanted.export_row(slot)[1].items():
            np.testing.assert_array_equal(ours.export_row(slot)[1][name], array, name)


# --- memory


def test_the_whole_tiny_model_is_loaded_and_held_against_a_copy_of_its_bytes(report):
    (row,) = report["load"]
    assert row["layers"] == CONFIG["num_hidden_layers"] and row["bytes"] == 2 * Config.from_dict(CONFIG).parameters()
    assert row["gb_s"] == pytest.approx(row["bytes"] / row["s"] / 1e9) and row["s"] > 0 < row["first_s"]
    assert row["fraction_of_copy"] == pytest.approx(row["gb_s"] / row["copy_gb_s"])


def test_a_checkpoint_to_load_has_the_layers_that_there_is_room_for_in_two_shards(tmp_path):
    config = presets.config_of("qwen3-8b")
    for most in (0, 3 * 10**9, 4 * 10**9, 10**12):
        found = bench_loading.shortened(config, most)
        more = dataclasses.replace(found, num_layers=found.num_layers + 1)
        assert found.num_layers == 1 or 2 * found.parameters() <= most
        assert found.num_layers == config.num_layers or 2 * more.parameters() > most
    tiny = Config.from_dict(CONFIG)
    assert bench_loading.write(tmp_path, tiny) == 2 * tiny.parameters()
    shards = [file.stat().st_size for file in sorted(tmp_path.glob("*.safetensors"))]
    assert len(shards) == 2 and max(shards) < 1.5 * tiny.parameters()


def test_measured_cache_bytes_are_the_predicted_ones(report):
    for row in report["memory"]:
        assert row["cache_bytes"] == row["predicted_bytes"] and row["peak_bytes"] > row["cache_bytes"]
        assert row["ratio_to_bf16"] == row["bf16_bytes"] / row["cache_bytes"]
    assert [row["ratio_to_bf16"] for row in report["memory"] if row["kv"] == "bf16"] == [1, 1]


@pytest.mark.parametrize("kv", [kv for kv, scheme in SCHEMES.items() if not scheme.shaped])
def test_every_scheme_takes_in_memory_what_was_predicted(model, kv):
    row = bench_memory.memory(engine.load(model, kv, "cpu", tokenizer=False), "tiny", 3, 384)
    assert row["cache_bytes"] == row["predicted_bytes"]
    assert row["cache_bytes"] < row["prefill_peak_bytes"] <= row["predicted_prefill_peak_bytes"]
    assert row["ratio_of_codes"] == pytest.approx({"oscar": 16 / 3, "bf16": 1}.get(kv, row["ratio_of_codes"]))


# --- throughput in a budget


BUDGET = """
import sys
from functools import partial
import numpy as np
from benchmarks import memory
from minioscar import engine

MB = 10**6
e = engine.load(sys.argv[1], "bf16", "cpu", tokenizer=False)
weights = memory.weight_bytes(e.model.weights)
attempt, outside = memory.limited(e, weights + 64 * MB, weights)
assert outside == 0

def take(size, pieces):
    return {"bytes": sum(array.nbytes for array in [np.ones(size // pieces, np.uint8) for _ in range(pieces)])}

for pieces in (1, 100):  # one array, and many that malloc takes from its heap
    assert attempt(partial(take, 48 * MB, pieces)) == {"bytes": 48 * MB}
    assert attempt(partial(take, 68 * MB, pieces)) is None
assert np.ones(68 * MB, np.uint8).all()  # the limit was the attempts' alone
"""


def test_a_budget_gives_memory_up_to_itself_and_no_more(model, pytestconfig):
    """In a process as bench.py has it: the heap of hundreds of tests has holes that belong to no budget."""
    command = [sys.executable, "-c", BUDGET, str(model)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=pytestconfig.rootpath)
    assert process.returncode == 0, process.stderr


def test_work_that_blas_cannot_survive_is_an_attempt_that_failed(model):
    e = engine.load(model, "bf16", "cpu", tokenizer=False)
    attempt, _ = bench_memory.limited(e, 2 * MB, 0)
    assert attempt(lambda: os.kill(os.getpid(), signal.SIGKILL)) is None
    assert attempt(lambda: ctypes.CDLL(None).exit(1)) is None


def test_an_error_that_is_not_about_memory_is_not_taken_for_a_batch_too_large(model):
    e = engine.load(model, "bf16", "cpu", tokenizer=False)
    attempt, _ = bench_memory.limited(e, 100 * MB, 0)
    with pytest.raises(bench_memory.Failure, match="ZeroDivisionError"):
        attempt(lambda: 1 / 0)


def test_the_batch_is_the_largest_that_runs_in_the_budget(report, model):
    for row in report["throughput"]:
        e = engine.load(model, row["kv"], "cpu", tokenizer=False)
        batch, context, room = row["batch"], row["context"], round(row["budget_gb"] * 1e9) - row["weight_bytes"]
        each = cache_bytes(e.config, e.scheme, 1, context + 1)
        assert row["weight_bytes"] == bench_memory.weight_bytes(e.model.weights)
        assert row["cache_bytes"] == batch * each < room
        assert row["tokens_per_s"] == pytest.approx(batch / row["ms"] * 1e3)
        assert all(ran == (int(n) <= batch) for n, ran in row["tried"].items()) and row["tried"][str(batch)]
        assert str(batch + 1) in row["tried"] or (batch + 1) * each > room
        assert room - batch * each < 4 * MB  # what a step takes besides, and malloc's fragments
    bf16, int2 = (next(row["batch"] for row in report["throughput"] if row["kv"] == kv) for kv in ("bf16", "int2"))
    assert bf16 < int2


def test_a_budget_that_holds_no_sequence_is_a_row_that_says_so(model):
    e = engine.load(model, "bf16", "cpu", tokenizer=False)
    row = bench_memory.throughput(e, "tiny", bench_memory.weight_bytes(e.model.weights) + MB // 10, 512, 1)
    assert row["batch"] == 0 and row["ms"] is None and row["tokens_per_s"] == 0


@pytest.mark.parametrize("answer", [0, 1, 2, 63, 64])
def test_largest_finds_the_border(answer):
    asked = []
    assert bench_memory.largest(lambda n: asked.append(n) or n <= answer, 64) == answer
    assert answer in (0, *asked) and answer + 1 in (*asked, 65) and len(asked) <= 7


# --- shapes, bytes and growth of the GPU's cases


def test_moved_bytes_are_the_cache_without_half_of_its_window():
    for case in bench_cases.cases(False) + bench_cases.sweep(False) + bench_cases.small_sweep(False):
        scheme, h = case.scheme, case.heads
        token = h.kv_heads * h.head_dim * 4
        window = case.batch * (scheme.ring - case.window if scheme.quantized else case.window) * token
        blocks = case.batch * blocks_of(case.context)  # none of tokens in the window
        whole = cache_bytes(bench_cases.layer(h), scheme, case.batch, case.context, blocks)
        assert bench_cases.moved_bytes(case) == (whole - window if scheme.quantized else whole + window)
        assert not scheme.quantized or unsupported(scheme, h.head_dim) is None or h == bench_cases.SMALL


def test_schemes_that_are_asked_for_are_the_only_ones(tmp_path, capsys):
    kvs = ["k4v2", "oscar"]
    for found in bench_cases.cases(False, kvs), bench_cases.sustained(kvs), bench_cases.sweep(False, kvs):
        assert [case.kv for case in found if (case.batch, case.context, case.group) == (1, 131072, None)] == kvs
        assert {case.kv for case in found} == set(kvs)
    assert bench.main(["kernel", "--quick", "--kv", "k4v2", "--device", "cpu", "--json", str(tmp_path / "k.json")]) == 0
    report = json.loads((tmp_path / "k.json").read_text())
    assert {row["kv"] for row in report["kernel"]} == {"k4v2"}
    assert bench.main(["kernel", "--quick", "--kv", "k4v2,quarot", "--device", "cpu"]) == 2
    assert "quarot: key groups run along the channels" in capsys.readouterr().err


def test_sweeps_cover_what_they_say_once():
    found = bench_cases.sweep(False)
    assert len(set(found)) == len(found)
    for kv in bench_cases.SWEPT:
        own = [case for case in found if case.kv == kv and case.group is None]
        assert [1024 << i for i in range(9)] == sorted(case.context for case in own if case.batch == 1)
        assert [1 << i for i in range(9)] == sorted(case.batch for case in own if case.context == 4096)
    assert {(case.kv, case.scheme.group) for case in found} >= {
        (kv, group) for kv in ("kivi", "oscar", "int2") for group in (32, 64)
    }
    assert set(bench_cases.sweep(True)) < set(found)


def test_caches_that_take_turns_are_larger_than_l2():
    for case in bench_cases.cases(False) + bench_cases.sweep(False):
        size = bench_cases.moved_bytes(case)
        assert (copies_of(size) - 1) * size > 128 << 20
        assert bench_cases.allocated_bytes(case) > copies_of(size) * size


def test_the_rest_of_a_step_is_that_of_qwen3_8b():
    config = presets.config_of("qwen3-8b")
    qkv, o, gate_up, down, head = bench_cases.DENSE
    assert (qkv.size, qkv.rows) == (config.hidden_size, config.q_size + 2 * config.kv_size)
    assert (o.size, o.rows) == (config.q_size, config.hidden_size)
    assert (down.size, down.rows) == (config.intermediate_size, config.hidden_size)
    assert (gate_up.size, gate_up.rows) == (config.hidden_size, 2 * config.intermediate_size)
    assert (head.size, head.rows) == (config.hidden_size, config.vocab_size)
    assert bench_cases.pairs(5, 3) == sum(len(range(5 + t + 1)) for t in range(3))


@pytest.mark.gpu
def test_kernels_are_measured_on_a_card(tmp_path):
    assert bench.main(["kernel", "--quick", "--json", str(tmp_path / "k.json")]) == 0
    report = json.loads((tmp_path / "k.json").read_text())
    assert report["kernel"] and report["dense"]
    for row in report["kernel"] + report["dense"]:
        assert 0 < row.get("fraction_of_copy", row.get("fraction_of_limit")) < 1.2


def test_a_case_too_large_for_the_card_is_skipped_with_the_reason():
    case = bench_cases.Case("bf16", 256, 4096)
    assert bench_cases.too_large(case, 80 * 10**9) is None
    assert re.fullmatch(r"needs \d+\.\d GB, but 4\.0 GB are free", bench_cases.too_large(case, 4 * 10**9))


def test_growth_is_the_line_that_the_times_were_made_of():
    cases = [bench_cases.Case("int2", 1, 1024 << i) for i in range(9)] + [
        bench_cases.Case("int2", 1 << i, 4096) for i in range(1, 9)
    ]
    cases += [bench_cases.Case("int2", 1, 131072, group=64), bench_cases.Case("kivi", 1, 131072)]
    rate = 4e12
    rows = []
    for case in cases:
        slope = 0.25 if case.group is None else 99  # another group size is not on the line
        us = 7 + slope * case.batch * case.context / 1000
        rows.append(bench_cases.entry("decode_attention", case, us, 0.01, bench_cases.moved_bytes(case), rate))
    for row, over in zip(bench_cases.growth(rows, rate), ("context", "batch"), strict=True):
        assert (row["over"], row["kv"], row["points"]) == (over, "int2", 9)
        assert row["us_per_1000_tokens"] == pytest.approx(0.25) and row["us_at_0_tokens"] == pytest.approx(7)
        assert row["worst_error"] < 1e-9
        assert row["times_the_bytes"] == pytest.approx(0.25 / row["bytes_us_per_1000_tokens"])
    per_token = SCHEMES["int2"].bits_per_element(128) / 8 * 2 * 8 * 128 + 4
    assert bench_cases.growth(rows, rate)[0]["bytes_us_per_1000_tokens"] == pytest.approx(per_token * 1000 / rate * 1e6)


def test_a_line_says_how_far_its_worst_point_is():
    slope, intercept, worst = line([1, 2, 3], [10.0, 20.0, 36.0])
    assert (slope, intercept) == pytest.approx((13, -4)) and worst == pytest.approx(0.1)
    with pytest.raises(ValueError):
        line([2, 2], [1, 1])


# --- the command line


@pytest.mark.parametrize(
    "argv, said",
    [
        ("all --quick --model nowhere", "nowhere"),
        ("decode --context 500", "multiples of 128"),
        ("decode --context x", "multiples of 128"),
        ("decode --context 1024", "1024 positions"),
        ("prefill --tokens 0", "positive"),
        ("decode --batch 1,-2", "positive"),
        ("decode --batch 99999999", "memory"),
        ("decode --steps 0", "at least 1"),
        ("memory --kv int9", "not a scheme"),
        ("throughput --budget 24", "24GB,48GB"),
        ("throughput --budget 0.1MB", "weights"),
        ("throughput --budget 99999GB", "free"),
        ("kernel --peers", "GPU"),
        ("decode --breakdown", "GPU"),
        ("kernel --json nowhere/b.json", "no folder"),
        ("kernel --json .", "is a folder"),
        ("kernel --json /dev/null", "is a device"),
        ("kernel --json /dev/fd/99", "not open for writing"),
        ("decode --random-weights {folder}/config.json --json {folder}/config.json", "would be lost"),
        ("decode --random-weights qwen9", "qwen3-0.6b"),
        ("juggle", "invalid choice"),
        ("start", "start needs a tokenizer, and"),
        (
            "start --random-weights qwen3-0.6b",
            "start needs the files of a model; give --model in place of --random-weights"
        ),
        ("start --model nowhere-at-all", "nowhere-at-all"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_measured(argv, said, model, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ceilings", lambda *_: pytest.fail("it went on"))
    argv = argv.format(folder=model)
    chosen = [] if "--model" in argv or "--random" in argv else ["--model", str(model)]
    assert bench.main([*argv.split(), *chosen, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and re.fullmatch(r"bench: [^\n]*\n", err)


def test_kernel_fetches_no_model(capsys):
    assert bench.main("kernel --quick --device cpu --model nowhere".split()) == 0
    assert "decode_attention" in capsys.readouterr().out


def test_json_to_standard_output_is_all_there_and_tables_make_room(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "ceilings", lambda *_: {"copy_tb_s": 1.0, "matmul_tflop_s": 1.0})
    monkeypatch.setattr(bench, "measured", lambda *_: iter(()))
    assert bench.main(["kernel", "--device", "cpu", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert set(json.loads(out)) > {"meta", "ceilings", "kernel"} and "copy 1 TB/s" in err
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bench.main(["kernel", "--device", "cpu", "--json", "~/b.json"]) == 0
    assert "copy 1 TB/s" in capsys.readouterr().out and json.loads((tmp_path / "b.json").read_text())["kernel"] == []


def test_random_weights_need_no_files_and_have_all_positions(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 256}))
    argv = f"decode --random-weights {tmp_path / 'config.json'} --kv int2 --context 512 --steps 1 --quick --device cpu"
    assert bench.main(argv.split()) == 0
    assert "1 x 512" in capsys.readouterr().out


def test_a_start_is_timed_from_the_process_to_the_first_text(tmp_path, capsys):
    folder = write_talker(tmp_path / "talker", 1)
    argv = f"start --quick --model {folder} --kv bf16,int2 --device cpu --json {tmp_path / 'b.json'}"
    assert bench.main(argv.split()) == 0
    (row,) = json.loads((tmp_path / "b.json").read_text())["start"]
    assert row["model"] == str(folder) and row["kv"] == "int2" and row["starts"] == 2
    assert 0.05 < row["s"] < 60 and 0.05 < row["first_s"] and row["spread"] >= 0
    assert f"\nstart\n{'model':24}" in capsys.readouterr().out


def test_a_start_that_fails_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.start, "PROMPT", "")
    assert bench.main(f"start --quick --model {write_talker(tmp_path / 'talker', 1)} --device cpu".split()) == 1
    said = "bench: a start ended with exit code 2: minioscar: the prompt is empty; give it some text\n"
    assert capsys.readouterr().err.endswith(said)


def test_what_a_start_waits_for_is_the_first_byte():
    slow = "import time; time.sleep(0.3); print('a', end='', flush=True); time.sleep(1); print('b')"
    before = time.perf_counter()
    first = bench.start.first_text([sys.executable, "-c", slow])
    assert 0.3 < first < time.perf_counter() - before - 0.5


def test_ctrl_c_shows_what_there_is_and_leaves_no_file(model, tmp_path):
    argv = f"all --quick --model {model} --device cpu --steps 10000000 --json {tmp_path / 'b.json'}"
    command, pipe = [sys.executable, bench.__file__, *argv.split()], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            while not process.stderr.readline().startswith(f"kernel: decode_attention         {bench_cases.SHOWN[-1]}"):
                assert process.poll() is None
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()  # 10,000,000 steps would go on
    assert process.returncode == 130 and err == "bench: interrupted; --json is not written\n"
    assert out.count("decode_attention") == len(bench_cases.SHOWN) and not list(tmp_path.iterdir())


def test_a_step_reads_the_experts_that_its_tokens_take(tmp_path):
    e = load(write_model(tmp_path / "m", 3, **MOE, num_hidden_layers=3), "bf16")
    one, many = (bench_models.experts_taken(e, batch) for batch in (1, 200))
    assert one == 2 and many == 6 and bench_models.experts_taken(load(write_model(tmp_path / "d", 3), "bf16"), 2) == 0
    expert, cache = 3 * 3 * 64 * 24 * 4, cache_bytes(e.config, e.scheme, 5, 128)
    whole = bench_models.weight_bytes(e.model.weights) - e.model.weights.embed.nbytes
    assert bench_models.step_bytes(e, 5, 128, 6) == whole + cache
    assert bench_models.step_bytes(e, 5, 128, 2.5) == whole - round(3.5 * expert) + cache
    row = bench_models.decode(e, "tiny", 1, 128, {"copy_tb_s": 1.0}, 1)
    assert row["experts"] == 2 and row["bytes"] == bench_models.step_bytes(e, 1, 128, 2)


def test_short_launches_are_replayed_more_often():
    assert not enough([], 20, 25) and not enough([3000.0] * 24, 20, 25) and enough([3000.0] * 25, 20, 25)
    assert not enough([2.0] * 399, 20, 25) and enough([2.0] * 400, 20, 25)  # 16 ms, but 16 times as many
    assert not enough([20.0] * 49, 20, 25) and enough([20.0] * 50, 20, 25)  # 20 ms


def test_a_card_is_also_measured_without_rests_unless_quick(monkeypatch):
    kernels = SimpleNamespace(
        measure=lambda wanted, *_, rest=True: [{"us": len(wanted), "rest": rest}],
        **dict.fromkeys(("writing", "flushing"), lambda *_: []),
    )
    nothing = SimpleNamespace(measure=lambda *_: [])
    for name, module in (("kernels", kernels), ("dense", nothing), ("experts", nothing)):
        monkeypatch.setitem(sys.modules, f"benchmarks.{name}", module)
        monkeypatch.setattr(f"benchmarks.{name}", module, raising=False)
    for quick, wanted in ((True, []), (False, [("sustained", {"us": len(bench_cases.sustained()), "rest": False})])):
        args = SimpleNamespace(quick=quick, peers=False, sweep=False, kv=None)
        rows = list(bench.kernel_rows(args, SimpleNamespace(name="cuda"), {"copy_tb_s": 4.0, "matmul_tflop_s": 800.0}))
        assert [row for row in rows if row[0] != "kernel"] == wanted and rows[0][1]["rest"]


def test_the_card_rests_between_replays_or_never(monkeypatch):
    """A made-up card: a replay of 20 launches takes 2 ms, and twice as long when it has not rested for 3 times that."""
    clock = [0.0, 0.0]  # now; when the last replay ended
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def once() -> float:
        us = 100.0 if clock[0] - clock[1] >= 0.006 else 200.0
        clock[0] += 2 * 20 * us * 1e-6  # two replays, of which the second is timed
        clock[1] = clock[0]
        return us

    assert set(replayed(once, 20, 25)) == {100.0} and len(replayed(once, 20, 25)) == 25
    clock[:] = 1.0, 1.0
    assert set(sustained(once)) == {200.0} and 2.99 < clock[0] < 3.02


@pytest.mark.parametrize("name", quantized.NAMES)
def test_weights_in_4_and_8_bits_are_measured_and_named(name, tmp_path, model):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    file = tmp_path / "b.json"
    argv = ["decode", "--random-weights", str(tmp_path / "config.json"), "--weights", name, "--context", "128"]
    bench.run([*argv, "--quick", "--kv", "int2", "--device", "cpu", "--json", str(file)])
    (row,) = json.loads(file.read_text())["decode"]
    assert row["model"].endswith(f"config.json, {name}") and row["ms"] > 0
    if name in quantized.FORMS:
        with pytest.raises(UserError, match=f"--weights {name} is for --random-weights"):
            bench.run(["decode", "--model", str(model), "--weights", name, "--device", "cpu", "--quick"])
