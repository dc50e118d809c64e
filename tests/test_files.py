"""Files that a user names: every encoding is read alike, and nothing but a file is ever replaced."""

from __future__ import annotations

import errno
import io
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minioscar.errors import Failure, UserError
from minioscar.storage import files
from minioscar.storage.files import check_seekable, check_writable, read_bytes, read_lines, read_text, replacing

TEXT = "the cat\nsat on é \U0001f642\n"
ENCODINGS = {
    "utf-8": "", "utf-8-sig": "", "utf-16": "", "utf-16-le": "\ufeff", "utf-16-be": "\ufeff", "utf-32": "",
    "utf-32-le": "\ufeff",
    "utf-32-be": "\ufeff",
}


def write(path: Path, text: str = "new") -> None:
    with replacing(path) as partial:
        partial.write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- reading


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_marks_are_taken_off_and_lines_end_alike_in_every_encoding(tmp_path, encoding, newline, monkeypatch):
    data = (ENCODINGS[encoding] + TEXT.replace("\n", newline)).encode(encoding)
    (tmp_path / "t").write_bytes(data)
    assert read_text(str(tmp_path / "t")) == TEXT
    assert read_lines(str(tmp_path / "t")) == [line.encode() for line in TEXT.splitlines()]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data)), encoding="ascii"))
    files.stdin_as_text()
    assert list(sys.stdin) == TEXT.splitlines(keepends=True)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
    assert read_text("-") == TEXT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"caf\xe9", "cannot be read as UTF-8 text .*convert it"),
        (b"\xef\xbb\xbfcaf\xe9", "cannot be read as UTF-8 text"),
        ("\ufeffabc".encode("utf-16-le") + b"a", "cannot be read as UTF-16 text"),
        ("\ufeff\ud800".encode("utf-16-le", "surrogatepass"), "cannot be read as UTF-16 text"),
        ("\ufeff".encode("utf-32-le") + b"\xff\xff\xff\xff", "cannot be read as UTF-32 text"),
        ("abc".encode("utf-16-le"), "holds zero bytes: no text, or UTF-16 without"),
        (b"\x80\0\1", "holds zero bytes"),
    ],
)
def test_what_is_no_text_is_refused_by_name_and_reason(tmp_path, data, message):
    (tmp_path / "odd").write_bytes(data)
    with pytest.raises(UserError, match=f"odd {message}") as error:
        read_text(str(tmp_path / "odd"))
    assert "\n" not in str(error.value)


def test_a_line_that_is_not_utf8_spoils_no_others(tmp_path):
    (tmp_path / "l").write_bytes(b"\xef\xbb\xbf\"a\"\r\ncaf\xe9\n\"b\"")
    assert read_lines(str(tmp_path / "l")) == [b'"a"', b"caf\xe9", b'"b"']


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b"\xff\xfe"])
def test_an_empty_file_is_empty_with_and_without_a_mark(tmp_path, data):
    (tmp_path / "e").write_bytes(data)
    assert read_text(str(tmp_path / "e")) == ""


def test_a_folder_a_missing_file_and_no_name_are_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "no", tmp_path / "no" / "no", f"{tmp_path}/a\0b", "", f"{tmp_path}/{'n' * 300}"):
        with pytest.raises(UserError, match="cannot be read") as error:
            read_bytes(str(path))
        assert "\n" not in str(error.value)


def test_a_file_of_which_parts_are_read_is_refused_by_its_true_cause(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x")
    for name, reason in (
        ("fifo", "is a FIFO"), ("", "is a folder"), ("loop", "cannot be read .Too many levels of symbolic links")
    ):
        with pytest.raises(UserError, match=reason):
            check_seekable(tmp_path / name)
    for name in ("file", "no", "no/no", "file/no"):  # what is not there is for the caller to say
        assert check_seekable(tmp_path / name) == tmp_path / name


def test_a_fifo_and_a_process_substitution_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"\xff\xfea\0\r\0\n\0",))
    writer.start()
    assert read_text(str(tmp_path / "pipe")) == "a\n"
    writer.join()
    code = (
        "import sys; from minioscar.storage.files import read_text; print([read_text(path) for path in sys.argv[1:]])"
    )
    shell = f"{sys.executable} -c '{code}' <(printf one) /dev/stdin <<< two"
    assert subprocess.run(["bash", "-c", shell], capture_output=True, text=True).stdout == "['one', 'two\\n']\n"


def test_what_has_no_end_is_refused(monkeypatch):
    monkeypatch.setattr(files, "MAX_TEXT", 1 << 22)
    with pytest.raises(UserError, match="/dev/zero has more than 4 MiB"):
        read_text("/dev/zero")


def test_a_closed_standard_input_is_said(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="standard input is closed"):
        read_text("-")


# --- ~


def test_tilde_is_the_home_folder_and_never_one_to_be_made(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    write("~/a", TEXT)
    assert names(home) == ["a"] and names(tmp_path) == ["home"] and read_text("~/a") == TEXT
    nobody = "~nobody-of-this-name/b"
    for use in (read_text, check_writable):
        with pytest.raises(UserError, match="no home folder that ~nobody"):
            use(nobody)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    for use in (read_text, check_writable):
        with pytest.raises(UserError, match="no home folder that ~ "):
            use("~/b")
    assert names(tmp_path) == ["home"]
    (tmp_path / "~nobody-of-this-name").mkdir()  # whoever made it means it
    write(nobody)
    assert read_text(nobody) == "new"


# --- writing


def test_links_are_followed_and_kept(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "second")
    (tmp_path / "a" / "second").symlink_to("../b/file")
    for text in ("dangling", "there"):
        write(tmp_path / "a" / "link", text)
        assert (tmp_path / "b" / "file").read_text() == text
    assert (tmp_path / "a" / "link").is_symlink() and (tmp_path / "a" / "second").is_symlink()
    assert names(tmp_path / "a") == ["link", "second"] and names(tmp_path / "b") == ["file"]


def odd_targets(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    links = {
        "one": "two", "two": "one", "to null": "/dev/null", "to fifo": "fifo", "far": "no/file", "to folder": "folder"
    }
    for link, to in links.items():
        (folder / link).symlink_to(to)
    (folder / "file").write_text("x")
    return {
        "folder": (folder / "folder", "is a folder"),
        "link to a folder": (folder / "to folder", "is a folder"),
        "fifo": (folder / "fifo", "is a FIFO"),
        "link to a fifo": (folder / "to fifo", "is a FIFO"),
        "socket": (folder / "socket", "is a socket"),
        "null": (Path("/dev/null"), "is a device"),
        "full": (Path("/dev/full"), "is a device"),
        "link to null": (folder / "to null", "is a device"),
        "loop": (folder / "one", "is a loop of links"),
        "dangling into nowhere": (folder / "far", "there is no folder"),
        "no folder": (folder / "no" / "file", "there is no folder"),
        "parent is a file": (folder / "file" / "x", "is not a folder"),
        "name too long": (folder / ("n" * 256), "name too long"),
        "path too long": (folder / "/".join(["n" * 200] * 30), "name too long"),
        "zero byte": (folder / "a\0b", "not the name of a file"),
        "half a character": (folder / "a\ud800", "not the name of a file"),
        "proc": (Path("/proc/file"), "cannot be written"),
    }


def modes(path: Path) -> int | None:
    try:
        return os.lstat(path).st_mode
    except (OSError, ValueError):
        return None


def test_what_is_no_file_is_refused_before_the_work_and_stays_what_it_is(tmp_path):
    for name, (path, message) in odd_targets(tmp_path).items():
        before = names(tmp_path), modes(path)
        for use in (check_writable, write):
            with pytest.raises(UserError, match=f"(?i){message}") as error:
                use(path)
            assert "\n" not in str(error.value), name
        assert before == (names(tmp_path), modes(path)), name


@pytest.mark.parametrize("name", ["new/", "new/.", "new//", "folder/"])
def test_the_name_of_a_folder_is_no_file_to_be_made(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder; name a file to write"):
        check_writable(f"{tmp_path}/{name}")
    assert names(tmp_path) == ["folder"]


def test_a_name_as_long_as_names_may_be_is_written(tmp_path):
    for name in ("n" * 255, "é" * 127):
        write(tmp_path / name)
        assert (tmp_path / name).read_text() == "new"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_of_the_umask_and_an_old_one_keeps_its_own(tmp_path, umask):
    (tmp_path / "old").write_text("old")
    (tmp_path / "old").chmod(0o640)
    before = os.umask(umask)
    try:
        for name in ("new", "old"):
            with replacing(tmp_path / name) as partial:
                partial.unlink()  # a library that makes a file of its own
                with open(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
                    file.write("x")
        with replacing(tmp_path / "private", mode=0o600) as partial:
            partial.write_text("x")
    finally:
        os.umask(before)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert found == {"new": 0o666 & ~umask, "old": 0o640, "private": 0o600}


def test_inputs_are_not_overwritten_by_any_name(tmp_path):
    (tmp_path / "text").write_text("precious")
    (tmp_path / "link").symlink_to("text")
    os.link(tmp_path / "text", tmp_path / "hard")
    for name in ("text", "link", "hard", "./text"):
        with pytest.raises(UserError, match="what this is made from"):
            check_writable(f"{tmp_path}/{name}", inputs=["-", tmp_path / "gone", tmp_path / "text"])
    check_writable(tmp_path / "other", inputs=[tmp_path / "text"])
    with open(tmp_path / "text") as file:
        code = "from minioscar.storage.files import check_writable; check_writable('text', inputs=['-'])"
        done = subprocess.run([sys.executable, "-c", code], stdin=file, capture_output=True, cwd=tmp_path)
    assert b"what this is made from" in done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_called_a_full_disk_and_leaves_the_old_file(tmp_path, number, monkeypatch):
    (tmp_path / "f").write_text("old")
    with pytest.raises(Failure, match="f: cannot be written: the disk is full: .*free space"):
        with replacing(tmp_path / "f") as partial:
            partial.write_text("ha")
            raise OSError(number, os.strerror(number))
    assert (tmp_path / "f").read_text() == "old" and names(tmp_path) == ["f"]
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with pytest.raises(Failure, match="the disk is full"):
        check_writable(tmp_path / "g")


def test_write_protection_is_respected_also_where_a_rename_would_not(tmp_path, monkeypatch):
    (tmp_path / "f").write_text("old")
    monkeypatch.setattr(os, "access", lambda path, how: Path(path) != tmp_path / "f")  # root may write everything
    with pytest.raises(UserError, match="f is write-protected"):
        check_writable(tmp_path / "f")
    monkeypatch.undo()
    tmp_path.chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)  # somebody else, in a sticky folder
    with pytest.raises(UserError, match="f is write-protected"):
        check_writable(tmp_path / "f")


def through(path: str, redirect: str, tmp_path: Path) -> subprocess.CompletedProcess:
    code = (
        f"from minioscar.storage.files import replacing\nprint(1)\nwith replacing('{path}') as p: "
        "p.write_bytes(bytes(range(256)))"
    )
    code += "\nprint(2)"
    (tmp_path / "code.py").write_text(code)
    return subprocess.run(["bash", "-c", f"{sys.executable} {tmp_path}/code.py {redirect}"], capture_output=True)


@pytest.mark.parametrize("path", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_is_written_through_in_order(tmp_path, path):
    want = b"1\n" + bytes(range(256)) + b"2\n"
    assert through(path, "", tmp_path).stdout == want
    through(path, f"> {tmp_path}/out", tmp_path)
    assert (tmp_path / "out").read_bytes() == want


def test_a_process_substitution_is_written_through_and_a_closed_descriptor_refused(tmp_path):
    assert through("/dev/fd/7", f"7> >(cat > {tmp_path}/sub); wait", tmp_path).returncode == 0
    for _ in range(10_000):
        if (tmp_path / "sub").exists() and (tmp_path / "sub").stat().st_size == 256:
            break
        time.sleep(0.05)
    assert (tmp_path / "sub").read_bytes() == bytes(range(256))
    for redirect in ("7>&-", "7< /dev/null"):
        assert b"descriptor 7 is not open for writing" in through("/dev/fd/7", redirect, tmp_path).stderr


def test_what_a_dead_writer_left_is_removed_and_what_a_living_one_has_is_not(tmp_path):
    (tmp_path / f".partial-f.{2**22 + 1}").write_text("dead")
    (tmp_path / ".partial-f.1").write_text("alive")
    write(tmp_path / "f")
    assert names(tmp_path) == [".partial-f.1", "f"]
