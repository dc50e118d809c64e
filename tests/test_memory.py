"""What a run needs is known before it is allocated, and what is free is what a program may have."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from benchmarks.presets import arrays
from minioscar import machine, memory
from minioscar.batch import Batch
from minioscar.cache import Cache
from minioscar.errors import UserError
from minioscar.generation import Options
from minioscar.ops.reference import Reference
from minioscar.oscar import SCHEMES

from .patience import PATIENCE
from .tiny import MOE, load, write_model

SHAPES = {
    "attention": {},
    "mlp": {"intermediate_size": 768},
    "wide": {"hidden_size": 384},
    "grouped": {"num_attention_heads": 16, "num_key_value_heads": 2},
    "ungrouped": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "vocabulary": {"vocab_size": 60_000},
    "experts": MOE | {"moe_intermediate_size": 256, "num_experts": 2},  # every token at each
    "many experts": MOE | {"num_experts": 300, "num_experts_per_tok": 8},
}


@pytest.mark.parametrize("kv", ["bf16", "int2"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("past", "tokens"), [(0, 1500), (0, 200), (1500, 1), (1500, 100)])
def test_the_work_of_a_pass_is_predicted_within_a_third_of_what_it_allocates(tmp_path, kv, shape, past, tokens):
    engine = load(write_model(tmp_path / "m", 1, max_position_embeddings=2048, **SHAPES[shape]), kv)
    cache = Cache(engine.config, engine.scheme, 1, past + tokens, engine.ops)
    ids = np.zeros(past + tokens, int)
    if past:
        engine.model.forward(ids[:past], cache, cache.batch_for([0], [past]))
    engine.model.tables_for(Batch((0,), (past,), (0,), (tokens,)))  # made once
    tracemalloc.start()
    engine.model.forward(ids[past:], cache, cache.batch_for([0], [tokens]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    predicted = engine.ops.work_bytes(engine.config, tokens, past + tokens)
    assert peak - 200_000 <= predicted * 1.1, (peak, predicted)  # 200 kB: Python's own objects
    if peak > 5_000_000:
        assert predicted <= peak * 4 / 3, (peak, predicted)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return load(write_model(tmp_path_factory.mktemp("memory") / "m", 1, max_position_embeddings=8192), "bf16")


def test_the_message_counts_what_is_needed_and_names_what_fits(engine, monkeypatch):
    config, ops = engine.config, engine.ops
    monkeypatch.setattr(ops, "free_bytes", lambda: 9_000_000)
    with pytest.raises(UserError) as error:
        memory.check(config, engine.scheme, ops, 1, 8192, 100)
    need = memory.needed(config, engine.scheme, ops, 1, 8192, 100)
    message = str(error.value)
    parts = f"bf16 cache {need.cache / 1e6:.1f} MB, work {need.work / 1e6:.1f} MB"
    assert f"context 8192 needs {need.total / 1e6:.1f} MB ({parts})" in message
    assert "but 9.0 MB of cpu memory are free" in message and "\n" not in message
    fits = int(message.split("--ctx ")[1].split()[0])
    assert fits % 128 == 0
    memory.check(config, engine.scheme, ops, 1, fits, 100)
    with pytest.raises(UserError):
        memory.check(config, engine.scheme, ops, 1, fits + 128, 100)


def test_the_message_offers_the_2_bit_cache_where_that_would_fit(engine, monkeypatch):
    need = memory.needed(engine.config, SCHEMES["int2"], engine.ops, 1, 8192, 100)
    monkeypatch.setattr(engine.ops, "free_bytes", lambda: need.total)
    with pytest.raises(UserError, match="so does --kv int2"):
        memory.check(engine.config, engine.scheme, engine.ops, 1, 8192, 100)
    with pytest.raises(UserError, match="3 x context 8192 .* fewer sequences"):
        memory.check(engine.config, engine.scheme, engine.ops, 3, 8192, 100)


def test_a_context_that_cannot_fit_is_refused_before_the_weights_are_read(tmp_path, monkeypatch):
    from minioscar import engine as module

    folder = write_model(tmp_path / "m", 1)
    monkeypatch.setattr(Reference, "free_bytes", lambda self: 1_000_000)
    monkeypatch.setattr(module, "load_weights", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(
        UserError, match=r"context 1024 needs .* \(weights 0\.\d MB, int2 cache .*, work .*\) but 1\.0 MB"
    ):
        module.load(folder, "int2", "cpu", ctx=1024, tokenizer=False)


def test_the_longest_context_of_info_is_the_longest_that_is_not_refused(tmp_path, monkeypatch):
    from minioscar.app import info

    folder = write_model(tmp_path / "m", 1, max_position_embeddings=8192)
    weights = sum(array.nbytes for array in arrays(load(folder).model.weights))
    monkeypatch.setattr(Reference, "free_bytes", lambda self: weights + 18_000_000)
    rows = {row["kv"]: row["longest_context"] for row in info.describe(str(folder), None, 1, "cpu")["schemes"]}
    assert 128 <= rows["bf16"] < rows["int2"] < 8192
    monkeypatch.setattr(Reference, "free_bytes", lambda self: 18_000_000)  # the weights are loaded now
    for kv in ("bf16", "int2"):
        engine = load(folder, kv)
        assert engine.capacity([[1] * rows[kv]], Options(), rows[kv]) == rows[kv]
        with pytest.raises(UserError, match="memory are free; --ctx"):
            engine.capacity([[1] * (rows[kv] + 128)], Options(), rows[kv] + 128)


@pytest.mark.parametrize("kv", ["bf16", "int2"])
def test_without_ctx_the_context_is_what_is_needed_as_far_as_positions_and_memory_go(tmp_path, monkeypatch, kv):
    engine = load(write_model(tmp_path / "m", 1, max_position_embeddings=8192), kv)
    assert engine.capacity([[1] * 300], Options(max_tokens=56), None) == 356
    assert engine.capacity([[1] * 300], Options(max_tokens=10**6), None) == 8192
    free = memory.needed(engine.config, engine.scheme, engine.ops, 1, 1024, 300).total
    monkeypatch.setattr(engine.ops, "free_bytes", lambda: free)
    fits = memory.longest_context(engine.config, engine.scheme, engine.ops, 1, free, 300)
    assert 1024 <= fits < 1300
    assert engine.capacity([[1] * 300], Options(max_tokens=56), None) == 356
    assert engine.capacity([[1] * 300], Options(max_tokens=5000), None) == fits
    result = engine.generate([1] * 300, max_tokens=5000)
    assert (result.finish_reason, result.new_tokens) == ("context", fits - 300 + 1)
    # one that was asked for is not changed
    with pytest.raises(UserError, match=r"context 8192 needs .* --ctx \d+ fits"):
        engine.capacity([[1] * 300], Options(max_tokens=5000), 8192)
    # nor do several share what one could have
    with pytest.raises(UserError, match="2 x context 5300 needs .* fewer sequences"):
        engine.capacity([[1] * 300] * 2, Options(max_tokens=5000), None)


@pytest.mark.parametrize("kv", ["bf16", "int2"])
def test_a_prompt_longer_than_what_fits_is_refused_with_what_does(tmp_path, monkeypatch, kv):
    engine = load(write_model(tmp_path / "m", 1, max_position_embeddings=8192), kv)
    free = memory.needed(engine.config, SCHEMES["int2"], engine.ops, 1, 2000, 2000).total
    monkeypatch.setattr(engine.ops, "free_bytes", lambda: free)
    with pytest.raises(UserError) as error:
        engine.generate([1] * (2000 if kv == "bf16" else 2500))
    found = re.fullmatch(
        rf"the prompt of \d+ tokens needs [\d.]+ MB \({kv} cache .* MB, work .* MB\) but [\d.]+ MB of cpu memory are "
        rf"free; "
        r"(\d+) tokens fit, shorten it(.*)", str(error.value)
    )
    assert found[2] == (", or take --kv int2" if kv == "bf16" else "")
    assert engine.capacity([[1] * int(found[1])], Options(), None) >= int(found[1])
    with pytest.raises(UserError, match=f"{found[1]} tokens fit"):
        engine.capacity([[1] * (int(found[1]) + 128)], Options(), None)


def test_more_answers_than_a_step_has_room_for_are_refused(engine):
    assert engine.capacity([[1, 2]] * 256, Options(max_tokens=2), None) == 4
    for prompts, n in (([[1, 2]] * 257, 1), ([[1, 2]], 257), ([[1, 2]] * 129, 2)):
        with pytest.raises(
            UserError, match=r"25\d answers at a time are more than 256; give fewer prompts at once \(--batch\)"
        ):
            engine.capacity(prompts, Options(max_tokens=2, n=n), None)


def test_a_real_allocation_that_fails_is_one_line_and_exit_code_1(tmp_path):
    """The limit is set after the prediction, so the allocation itself fails, as on a machine that others use too."""
    folder = write_model(tmp_path / "m", 1, max_position_embeddings=100_000)
    code = f"""
import resource, sys
from minioscar import engine
from minioscar.app.cli import explained
e = engine.load({str(folder)!r}, "bf16", "cpu", tokenizer=False)
new_cache = e.new_cache
def limited(*args):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 40_000_000, resource.RLIM_INFINITY))
    return new_cache(*args)
e.new_cache = limited
try:
    e.generate([1] * 20_000, max_tokens=2)
except Exception as error:
    print(explained(error))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
e.new_cache = new_cache
print(e.generate([1] * 2000, max_tokens=2).new_tokens)
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT}, timeout=PATIENCE)
    said, after = run.stdout.splitlines()
    assert said.startswith(
        "(1, 'out of cpu memory (Unable to allocate"
    ) and "MB was freed); by its arithmetic --ctx" in said, run
    assert after == "2" and run.stderr == ""


def test_free_memory_counts_what_linux_could_free():
    fields = dict(
        line.split(":", 1) for line in open("/proc/meminfo").read().splitlines()
    ) if sys.platform == "linux" else {}
    if "MemAvailable" not in fields:
        pytest.skip("no /proc/meminfo here")
    available = int(fields["MemAvailable"].split()[0]) * 1024
    assert abs(machine._machine() - available) < 2e9
    assert machine.host_bytes() <= machine._machine()


@pytest.mark.parametrize("names", machine.CGROUPS)
def test_a_containers_limit_counts_and_its_file_cache_does_not(tmp_path, names):
    limit, use, cached = names
    assert machine._cgroup(tmp_path) == 2**63
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text("1000000\n")
    (tmp_path / use).write_text("700000\n")
    (tmp_path / use).with_name("memory.stat").write_text(f"anon 5\n{cached} 200000\nfile 3\n")
    assert machine._cgroup(tmp_path) == 500_000
    (tmp_path / limit).write_text("max\n")
    assert machine._cgroup(tmp_path) == 2**63


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
