"""Standard streams as shells leave them: no work is lost for a stream, no error is more than a line, no result is lost
unsaid."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minioscar.app import cli, streams
from minioscar.app.cli import main, run
from minioscar.errors import Failure

from .patience import PATIENCE
from .tiny import write_talker

SAID = re.compile(r"minioscar: [^\n]+\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_talker(tmp_path_factory.mktemp("streams") / "model", 5)


def shell(line: str, **environment: str) -> subprocess.CompletedProcess:
    """A line of bash in which MO is the program, as a real process: 0.4 s each, so only what needs one."""
    command = ["bash", "-c", line.replace("MO", f"{sys.executable} -m minioscar")]
    return subprocess.run(
        command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, timeout=PATIENCE
    )


CLOSED = {
    "stdin": ("MO generate {m} hi --max-tokens 2 <&-", 0, None),
    "stderr": ("MO generate {m} hi --max-tokens 2 2>&-", 0, None),
    "stderr and stdin": ("MO generate {m} hi --max-tokens 2 2>&- <&-", 0, None),
    "stdout": ("MO generate {m} hi --max-tokens 2 >&-", 2, "standard output is closed"),
    "stdin of -": ("MO generate {m} - --max-tokens 2 <&-", 2, "standard input is closed"),
    "stdin of --prompts-file -": ("MO generate {m} --prompts-file - <&-", 2, "standard input is closed"),
    "stdin of a chat": ("MO chat {m} <&-", 2, "standard input is closed"),
    "stdin of a chat that is written to": ("MO chat {m} 0> /dev/null", 2, "standard input cannot be read"),
    "stdin that is written to": ("MO generate {m} - 0> /dev/null", 2, "- cannot be read"),
    "all": ("MO chat {m} <&- >&- 2>&-", 2, ""),
    "stderr of a chat": ("echo the cat | MO chat {m} --max-tokens 2 2>&-", 0, None),
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_stream_costs_no_more_than_what_it_was_for(folder, name):
    line, code, message = CLOSED[name]
    done = shell(line.format(m=folder))
    assert done.returncode == code
    if message is None:
        assert done.stdout and b"minioscar:" not in done.stderr
    elif message:
        assert SAID.fullmatch(done.stderr.decode()) and message in done.stderr.decode() and done.stdout == b""


def test_a_file_that_is_opened_later_does_not_become_a_standard_stream():
    code = "from minioscar.app.streams import prepared\nimport os\nwith prepared(): print(os.open('/dev/null', 0) > 2)"
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" <&- 2>&-'], capture_output=True)
    assert done.stdout == b"True\n"


@pytest.mark.parametrize(
    "line", ["generate {m} hi --max-tokens 2", "--help", "generate {m} --prompts-file {p} --max-tokens 2"]
)
def test_a_result_that_cannot_be_written_is_a_failure_in_one_line(folder, tmp_path, line):
    (tmp_path / "p").write_text('"a"\n"b"\n')
    done = shell(f"MO {line.format(m=folder, p=tmp_path / 'p')} > /dev/full")
    assert done.returncode == 1
    full = "standard output cannot be written: No space left on device; redirect it elsewhere"
    assert done.stderr.decode() == f"minioscar: {full}\n"


def test_a_reader_that_leaves_ends_the_work_quietly(folder, tmp_path):
    (tmp_path / "p").write_text('"the cat"\n' * 50)
    done = shell(
        f"MO generate {folder} --prompts-file {tmp_path}/p --batch 1 --max-tokens 40 | head -c 1; echo "
        f"${{PIPESTATUS[0]}}"
    )
    assert done.stdout == b"{0\n" and done.stderr == b""
    done = shell(f"MO cache {folder} --prompt-file {tmp_path}/p --out - | head -c 1 | wc -c; echo ${{PIPESTATUS[0]}}")
    assert done.stdout == b"1\n0\n" and b"Traceback" not in done.stderr


@pytest.mark.parametrize("stderr", ["2> /dev/full", "2> >(exec <&-; sleep 0)"])
def test_messages_that_cannot_be_written_cost_no_result(folder, tmp_path, stderr):
    (tmp_path / "p").write_text('"a"\n"b"\n')
    done = shell(f"MO generate {folder} --prompts-file {tmp_path}/p --max-tokens 2 {stderr}; echo $?")
    assert [*map(len, done.stdout.splitlines())][2:] == [1] and done.stdout.endswith(b"\n0\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "ascii:strict", "utf-8", "utf-16"])
def test_what_an_encoding_lacks_is_replaced_and_nothing_is_lost(encoding, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding.split(":")[0], errors="strict")
    monkeypatch.setattr("sys.stdout", out)
    assert run("minioscar", lambda _: print("Δ é \U0001f642 \udce9 end"), [], lambda error: (1, str(error))) == 0
    text = out.buffer.getvalue().decode(out.encoding)
    assert text.endswith("end\n") and len(text) == len("Δ é x x end\n") and ("é" in text or "ascii" in encoding)


def test_an_answer_that_the_terminal_cannot_show_is_written_all_the_same(folder):
    done = shell(f"MO generate {folder} 'é 🙂' --raw --max-tokens 12", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 0 and done.stdout.isascii() and len(done.stdout) > 3 and b"minioscar" not in done.stderr
    done = shell(f"MO generate {folder} 'é 🙂' --raw --max-tokens 12 --json", PYTHONIOENCODING="ascii")
    assert "\ufffd" in json.loads(done.stdout)["text"]


class Broken(io.StringIO):
    def __init__(self, error: OSError):
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def test_every_error_of_stdout_is_a_failure_and_none_of_stderr_is():
    for number in (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG):
        with pytest.raises(Failure, match=f"standard output cannot be written: {os.strerror(number)}"):
            print("x", file=streams.Stream(Broken(OSError(number, os.strerror(number))), needed=True))
        print("x", file=streams.Stream(Broken(OSError(number, os.strerror(number))), needed=False))
    with pytest.raises(BrokenPipeError):
        print("x", file=streams.Stream(Broken(BrokenPipeError()), needed=True))


def test_a_second_ctrl_c_changes_nothing_of_the_first(folder, tmp_path):
    os.mkfifo(tmp_path / "in")
    command = [sys.executable, "-m", "minioscar", "generate", str(folder), "--prompt-file", str(tmp_path / "in")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        for _ in range(10_000):  # until it waits for somebody who writes
            time.sleep(0.05)
            try:
                held = os.open(tmp_path / "in", os.O_WRONLY | os.O_NONBLOCK)
                break
            except OSError:
                continue
        time.sleep(0.2)
        for _ in range(3):
            process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert process.stderr.read() == b"minioscar: interrupted\n"
        os.close(held)


def test_streams_are_put_back(capsys):
    before = sys.stdout, sys.stderr
    assert main(["info", "no-such-model"]) == 2 and (sys.stdout, sys.stderr) == before
    assert SAID.fullmatch(capsys.readouterr().err)


def test_ctrl_c_in_an_import_is_not_an_import_error(tmp_path):
    swallows = (
        "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: raise ImportError"
    )
    (tmp_path / "swallows.py").write_text(swallows)
    code = "import signal; from minioscar.app import cli; signal.signal(signal.SIGINT, cli.interrupt); import swallows"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert (done.returncode, done.stderr) == (130, b"minioscar: interrupted\n")
    with pytest.raises(KeyboardInterrupt):
        cli.interrupt()


def test_a_job_in_the_background_is_not_interrupted(folder):
    line = "MO generate {m} hi --max-tokens 3 & pid=$!; sleep 0.3; kill -INT $pid; wait $pid; echo $?"
    done = shell(f"trap '' INT; {line.format(m=folder)}")
    assert done.stdout.endswith(b"0\n") and b"interrupted" not in done.stderr
