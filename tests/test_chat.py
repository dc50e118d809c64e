"""The chat command on a pipe and in a terminal (a pseudo-terminal, with real keys and a real Ctrl-C)."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minioscar.app import chat
from minioscar.app.cli import main
from minioscar.storage import hub

from .patience import PATIENCE
from .tiny import write_talker

pty = pytest.importorskip("pty")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("chat") / "model", 5)


def piped(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "-m", "minioscar", "chat", str(folder), "--device", "cpu", "--max-tokens", "20", *options
    ]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    for name, value in (("OMP_NUM_THREADS", "1"), ("XDG_STATE_HOME", str(tmp_path / "state")), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)


# --- a pipe


def test_on_a_pipe_a_line_is_a_message_and_stdout_is_the_answers(folder):
    run = piped(folder, 'the cat\n"""the dog\nsaw"""\nthe \\\nmat\n', "--json")
    messages = json.loads(run.stdout)["messages"]
    assert run.returncode == 0
    assert [m["content"] for m in messages if m["role"] == "user"] == ["the cat", "the dog\nsaw", "the \nmat"]
    plain = piped(folder, "the cat\n")
    assert plain.stdout == messages[1]["content"] + "\n"
    assert re.fullmatch(
        r"\[context \d+ of 1024 \(\d+%\); \d+ tokens read, \d+ written \([\d.]+ a second\)(; cut: .*)?\]\n",
        plain.stderr
    )


@pytest.mark.parametrize(
    ("text", "message"), [('"""one\ntwo', "one\ntwo"), ("one\\", "one"), ("one\\\n", "one"), ("one", "one")]
)
def test_a_message_that_the_end_of_the_input_cuts_short_is_still_said(folder, text, message):
    assert json.loads(piped(folder, text, "--json").stdout)["messages"][0]["content"] == message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_what_windows_writes_into_a_pipe_is_the_same_messages(folder, encoding, newline, monkeypatch, capsys):
    data = f'the cat é{newline}"""one{newline}two"""{newline}{newline}end'.encode(encoding)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data)), "ascii"))
    assert main(["chat", str(folder), "--device", "cpu", "--max-tokens", "3", "--json"]) == 0
    messages = json.loads(capsys.readouterr().out)["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["the cat é", "one\ntwo", "end"]


@pytest.mark.parametrize(
    ("data", "message"), [("the cat".encode("utf-16-le"), "holds zero bytes"), (b"caf\xe9\n", "not valid Unicode")]
)
def test_a_pipe_that_is_no_text_is_refused_in_one_line(folder, data, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))
    assert main(["chat", str(folder), "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_without_a_home_there_is_no_history_and_no_folder_called_tilde(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert chat.Lines().history is None


def test_json_is_one_object(folder):
    report = json.loads(piped(folder, "the cat\n", "--json", "--system", "so", "--kv", "oscar", "--ctx", "256").stdout)
    assert set(report) == {"messages", "kv", "device", "context", "context_used"}
    assert [m["role"] for m in report["messages"]] == ["system", "user", "assistant"]
    assert (report["kv"], report["context"]) == ("oscar", 256) and report["context_used"] > 5


def test_on_a_pipe_an_error_ends_it_with_its_exit_code(folder):
    run = piped(folder, f"the cat\n{'the dog ' * 300}\nnever\n", "--ctx", "128")
    assert run.returncode == 2 and run.stdout.count("\n") >= 1
    assert run.stderr.splitlines()[-1].startswith("minioscar: the conversation would have ")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ctx", "0"], "--ctx 0"),
        (["--temperature", "-1"], "temperature -1"),
        (["--stop", ""], "none of them empty"),
        (["--raw"], "--raw"),
        (["--kv", "int3"], "'int3'"),
    ],
)
def test_wrong_use_is_one_line(folder, options, message, capsys):
    assert main(["chat", str(folder), *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minioscar: ") and err.count("\n") == 1 and message in err


# --- a terminal


class Terminal:
    """`python -m minioscar chat` in a pseudo-terminal."""

    def __init__(self, folder: Path, *options: str, cwd: Path | None = None):
        self.seen, self.at = "", 0
        command = [sys.executable, "-m", "minioscar", "chat", str(folder), "--device", "cpu", *options]
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd or folder)
            os.execv(sys.executable, command)

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, wanted: str, seconds: float = PATIENCE) -> str:
        """Everything since the last wait, up to the wanted pattern."""
        end = time.monotonic() + seconds
        while not (match := re.compile(wanted, re.DOTALL).search(self.seen, self.at)):
            if time.monotonic() > end:
                raise AssertionError(f"no {wanted!r} in {self.seen[self.at:]!r}")
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:  # the other side is gone
                    if not re.compile(wanted, re.DOTALL).search(self.seen, self.at):
                        raise AssertionError(f"it ended without {wanted!r}: {self.seen[self.at:]!r}") from None
        text, self.at = self.seen[self.at : match.end()], match.end()
        return text

    def interrupt(self, wanted: str) -> str:
        """Ctrl-C until it is seen: one that comes while readline is not waiting for a key is noticed with the next key
        only."""
        for _ in range(200):
            self.send("\x03")
            try:
                return self.wait_for(wanted, 3)
            except AssertionError:
                continue
        return self.wait_for(wanted, 1)

    def leave(self) -> int:
        self.send("/exit\r")
        return self.code()

    def code(self, seconds: float = PATIENCE) -> int:
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < end, f"it does not end: {self.seen[self.at:]!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:
                    pass

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.fd)


STATUS = r"\[context \d+ of \d+ \(\d+%\); (\d+) tokens read, (\d+) written \([\d.]+ a second\)[^\]]*\]"


def test_a_conversation_with_its_commands(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    with Terminal(folder, "--max-tokens", "12", cwd=tmp_path) as terminal:
        terminal.wait_for("1024 tokens of context, int2 cache; /help lists the commands.*>>> ")
        terminal.send("the cat sat\r")
        terminal.wait_for(STATUS + ".*>>> ")
        terminal.send("and the dog?\r")
        said = terminal.wait_for(STATUS + ".*>>> ")
        assert int(re.search(STATUS, said)[1]) < 40  # only what is new was read
        terminal.send("/stats\r")
        said = terminal.wait_for(">>> ")
        assert "context " in said and "4 messages" in said and "x less than bf16" in said and "memory free" in said
        terminal.send("/save talk.json\r")
        terminal.wait_for(r"\[saved talk.json, .*>>> ")
        terminal.send("/save talk.kv.safetensors\r")
        terminal.wait_for(r"\[saved talk.kv.safetensors, .*>>> ")
        terminal.send("/save ~/home.json\r")
        terminal.wait_for(r"\[saved ~/home.json, .*>>> ")
        terminal.send("/save talk.txt\r")
        terminal.wait_for(r"minioscar: /save talk.txt: name a file that ends in .safetensors .*>>> ")
        terminal.send("/fly\r")
        terminal.wait_for("minioscar: there is no /fly; /help lists the commands.*>>> ")
        terminal.send("/undo 2\r")
        terminal.wait_for("minioscar: /undo takes nothing behind it; .*>>> ")
        terminal.send("/help\r")
        assert "Ctrl-C" in terminal.wait_for(">>> ")
        terminal.send("/retry\r")
        said = terminal.wait_for(STATUS + ".*>>> ")
        assert "temperature 0 is greedy: the answer will be the same" in said and int(re.search(STATUS, said)[1]) < 40
        terminal.send("/undo\r")
        terminal.wait_for(r"\[taken back; 2 messages are left\].*>>> ")
        terminal.send("/undo\r")
        terminal.wait_for(r"\[taken back; 0 messages are left\].*>>> ")
        for command in ("/undo", "/retry"):
            terminal.send(f"{command}\r")
            terminal.wait_for("minioscar: there is no answer yet to .*>>> ")
        terminal.send("so\r")
        terminal.wait_for(STATUS + ".*>>> ")
        terminal.send("/reset\r")
        terminal.wait_for(r"\[begun anew; context 0 of 1024 \(0%\)\].*>>> ")
        terminal.send("/stats\r")
        assert "0 messages" in terminal.wait_for(">>> ")
        assert terminal.leave() == 0
    messages = json.loads((tmp_path / "talk.json").read_text())
    assert json.loads((tmp_path / "home" / "home.json").read_text()) == messages and not (tmp_path / "~").exists()
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2 and messages[2]["content"] == "and the dog?"
    with Terminal(folder, "--cache", str(tmp_path / "talk.kv.safetensors"), "--max-tokens", "5") as terminal:
        terminal.wait_for(">>> ")
        terminal.send("so?\r")
        said = terminal.wait_for(STATUS + ".*>>> ")
        assert int(re.search(STATUS, said)[1]) < 40  # the rest was in the file
        terminal.send("\x04")  # Ctrl-D
        assert terminal.code() == 0


def test_messages_of_several_lines_by_quotes_backslash_and_paste(folder, tmp_path):
    with Terminal(folder, "--max-tokens", "3", cwd=tmp_path) as terminal:
        terminal.wait_for(">>> ")
        terminal.send('"""one\r')
        terminal.wait_for(r"\.\.\. ")
        terminal.send('two"""\r')
        terminal.wait_for(STATUS + ".*>>> ")
        terminal.send("three\\\r")
        terminal.wait_for(r"\.\.\. ")
        terminal.send("four\r")
        terminal.wait_for(STATUS + ".*>>> ")
        terminal.send("/save a.json\r")
        terminal.wait_for("saved.*>>> ")
        assert terminal.leave() == 0
    said = [m["content"] for m in json.loads((tmp_path / "a.json").read_text()) if m["role"] == "user"]
    assert said == ["one\ntwo", "three\nfour"]


def test_ctrl_c_at_the_prompt_drops_the_line_and_not_the_conversation(folder):
    with Terminal(folder, "--max-tokens", "3") as terminal:
        terminal.wait_for(">>> ")
        terminal.send("half a li")
        terminal.wait_for("half a li")
        terminal.interrupt(r"\(Ctrl-D or /exit leaves\).*>>> ")
        terminal.send('"""one\r')
        terminal.wait_for(r"\.\.\. ")
        terminal.interrupt(r"\(Ctrl-D or /exit leaves\).*>>> ")
        terminal.send("/stats\r")
        assert "0 messages" in terminal.wait_for(">>> ")
        assert terminal.leave() == 0


def test_history_comes_back_with_the_arrow_key_in_the_next_conversation(tmp_path):
    folder = write_talker(tmp_path / "m", 5)
    with Terminal(folder, "--max-tokens", "3") as terminal:
        terminal.wait_for(">>> ")
        terminal.send("the dog saw\r")
        terminal.wait_for(STATUS + ".*>>> ")
        assert terminal.leave() == 0
    history = tmp_path / "state" / "minioscar" / "history"
    assert "the dog saw" in history.read_text() and history.stat().st_mode & 0o77 == 0
    with Terminal(folder, "--max-tokens", "3") as terminal:
        terminal.wait_for(">>> ")
        terminal.send("\x1b[A\x1b[A")  # past /exit
        terminal.wait_for("the dog saw")
        terminal.send("\r")
        terminal.wait_for(STATUS + ".*>>> ")
        assert terminal.leave() == 0


def test_ctrl_c_in_the_middle_of_an_answer_stops_it_and_the_conversation_goes_on():
    """On the real model, whose answers take long enough to be interrupted."""
    folder = hub.resolve("smollm2-135m")
    with Terminal(folder, "--max-tokens", "400", "--ctx", "1024", cwd=Path("/")) as terminal:
        terminal.wait_for(">>> ")
        terminal.send("Tell me a long story about a river.\r")
        terminal.wait_for("ancient")
        terminal.send("\x03")
        said = terminal.wait_for(STATUS + ".*>>> ")
        assert "; stopped]" in said and "Traceback" not in terminal.seen
        written = int(re.search(STATUS, said)[2])
        assert 3 < written < 400
        terminal.send("What is the capital of France?\r")
        said = terminal.wait_for(STATUS + ".*>>> ")
        assert "Paris" in said
        assert int(re.search(STATUS, said)[1]) < 30  # neither the first question nor the half answer was read again
        assert terminal.leave() == 0


# --- pieces


def test_stop_asks_first_and_interrupts_on_the_second_time():
    with chat.Stop() as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # nothing is written yet: a prefill
        stop.writing = True
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_paste_keeps_its_lines_where_readline_can(folder, tmp_path):
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit has no bracketed paste")
    with Terminal(folder, "--max-tokens", "3", cwd=tmp_path) as terminal:
        terminal.wait_for(">>> ")
        terminal.send("\x1b[200~one\rtwo\x1b[201~\r")
        terminal.wait_for(STATUS + ".*>>> ")
        terminal.send("/save a.json\r")
        terminal.wait_for("saved.*>>> ")
        assert terminal.leave() == 0
    assert json.loads((tmp_path / "a.json").read_text())[0]["content"] == "one\ntwo"
