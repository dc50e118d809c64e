"""Files that a user names: how all of them are read, and how all of them are written, whole or not at all."""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import Failure, UserError

MAX_TEXT = 1 << 30  # bytes of a file that is read as text: far above any context, and /dev/zero has an end
MARKS = (  # UTF-32's little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)
DESCRIPTOR = re.compile(r"/dev/std(out|err)|/(?:dev|proc/self)/fd/(\d+)")
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a loop of links"}
ZEROS = "holds zero bytes: no text, or UTF-16 without its byte order mark; convert it to UTF-8"
FULL = (errno.ENOSPC, errno.EDQUOT)


def expand(path: str | Path) -> Path:
    """The path with ~ and ~user expanded. Raises UserError for no name of a file, or a home that there is not."""
    found = os.path.expanduser(path)
    home, slash, _ = found.partition("/")
    if home.startswith("~") and slash and not os.path.isdir(home):
        raise UserError(f"{path}: there is no home folder that {home} could mean; name the folder")
    with contextlib.suppress(UnicodeError):  # half a surrogate pair, from a program
        name = os.fsencode(found)
        if len(name) > 4095 or max(map(len, name.split(b"/"))) > 255:  # Linux's limits
            raise UserError(f"{str(path)[:80]}... cannot be read or written: file name too long; name another")
        if b"\0" not in name and name:
            return Path(found)
    raise UserError(f"{str(path)!r} is not the name of a file, and cannot be read or written; name one")


# --- reading


def read_text(path: str) -> str:
    """A text file, or standard input for -, with \\n at the end of its lines, whether they ended in \\n, \\r\\n or \\r.

    UTF-8, or what a byte order mark says: UTF-16 or UTF-32; the mark is taken off. Raises UserError where it cannot be
    read, is not text in that encoding, or holds zero bytes.
    """
    return decoded(read_bytes(path), path)


def read_lines(path: str) -> list[bytes]:
    """The lines of a file, or of standard input for -, in UTF-8, without ends; what is not UTF-8 comes as it is."""
    data = read_bytes(path)
    if encoding_of(data).startswith("utf-8"):
        return data.removeprefix(codecs.BOM_UTF8).splitlines()
    return decoded(data, path).encode().splitlines()


def read_bytes(path: str) -> bytes:
    """A file, a FIFO or a process substitution, or standard input for -. Raises UserError where it cannot be read."""
    data = bytearray()
    try:
        with contextlib.nullcontext(stdin()) if path == "-" else open(expand(path), "rb") as file:
            while chunk := file.read(1 << 20):
                data += chunk
                if len(data) > MAX_TEXT:
                    raise UserError(f"{path} has more than {MAX_TEXT >> 20} MiB, which no context holds; shorten it")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); name a file") from None
    return bytes(data)


def decoded(data: bytes, name: str) -> str:
    """What `read_text` makes of a file's bytes."""
    encoding = encoding_of(data)
    if encoding == "utf-8" and b"\0" in data:
        raise UserError(f"{name} {ZEROS}")
    try:
        text = data.decode(encoding)
    except UnicodeError as error:
        said = encoding.removesuffix("-sig").upper()
        raise UserError(f"{name} cannot be read as {said} text ({error}); convert it to UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def encoding_of(head: bytes) -> str:
    """Python's name of the encoding that the byte order mark at the beginning of a text says; UTF-8 without one."""
    return next((name for mark, name in MARKS if head.startswith(mark)), "utf-8")


def stdin() -> BinaryIO:
    """Standard input. Raises UserError where the shell closed it."""
    if sys.stdin is None:
        raise UserError("standard input is closed; give it a file or a pipe (< F)")
    return sys.stdin.buffer


def stdin_as_text() -> None:
    """Makes sys.stdin read as `read_text` does, line by line; waits for the first byte. Raises OSError."""
    sys.stdin.reconfigure(encoding=encoding_of(stdin().peek(4)), errors="strict", newline=None)


def check_seekable(path: str | Path) -> Path:
    """The path, expanded, of a file of which parts will be read. Raises UserError for -, for what is no file, or cannot
    be read."""
    found, kind = expand(path), "standard input"
    try:
        if str(path) != "-":
            kind = _kind(status) if not stat.S_ISREG((status := os.stat(found)).st_mode) else ""
        if kind:
            raise UserError(f"{path} is {kind}, of which no parts can be read; name a file")
        open(found, "rb").close()
    except (FileNotFoundError, NotADirectoryError):  # the caller says what makes one
        pass
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); name a file") from None
    return found


def _stat(path: str | Path) -> os.stat_result | None:
    """Of a file, or of standard input for -; None where there is none."""
    try:
        return os.fstat(0) if str(path) == "-" else os.stat(expand(path))
    except (OSError, UserError):
        return None


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _kind(found: os.stat_result) -> str:
    return KINDS.get(stat.S_IFMT(found.st_mode), "a device")


# --- writing


@contextlib.contextmanager
def replacing(path: str | Path, *, inputs: Iterable[str | Path] = (), mode: int | None = None) -> Iterator[Path]:
    """The path to write to; it becomes `path` when the block ends without an error, its bytes on disk first.

    Symlinks are followed. A file that is replaced keeps its mode, a new one gets `mode`, or what the umask leaves of
    0666. After a crash or kill -9 a `.partial-...` file may be left, never half a `path`; the next write of `path`
    removes it. What is written for - or /dev/stdout goes there at the end. inputs: as in `check_writable`, whose errors
    are raised; Failure where writing failed.
    """
    target = check_writable(path, inputs)
    try:
        if (fd := descriptor(path)) is not None:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder) / "output"
                _write_through(Path(folder) / "output", fd)
            return
        partial = _partial(target)
        try:
            mode = _create(partial, target, mode)
            yield partial
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            with contextlib.suppress(PermissionError):  # a file system without modes
                os.chmod(partial, mode)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except BrokenPipeError:  # whoever read standard output has enough
        raise
    except OSError as error:
        raise Failure(f"{path}: cannot be written: {reason(error)}") from error


def check_writable(path: str | Path, inputs: Iterable[str | Path] = ()) -> Path:
    """The file that `path` means, symlinks followed, if one can be put there; to be asked before long work.

    Raises UserError for what is no file, cannot be written, or is one of `inputs`; Failure for a full disk.
    """
    if (fd := descriptor(path)) is not None:
        _check_descriptor(path, fd)
        return Path(path)
    try:
        target = Path(os.path.realpath(expand(path)))
        found = _lstat(target)
        # realpath takes a last / away
        if found and not stat.S_ISREG(found.st_mode) or os.path.basename(path) in ("", ".", ".."):
            raise UserError(f"{path} is {_kind(found) if found else 'the name of a folder'}; name a file to write")
        if not target.parent.is_dir():
            if target.parent.exists():
                raise UserError(f"{path}: {target.parent} is not a folder; name another file")
            raise UserError(f"{path}: there is no folder {target.parent}; make it first")
        if found and not _may_replace(target, found):
            raise UserError(f"{path} is write-protected; name another file")
        if found and any(other and os.path.samestat(found, other) for other in map(_stat, inputs)):
            raise UserError(f"{path} is what this is made from, and would be lost; name another file")
        _sweep(target)
        _create(_partial(target), target)
        _partial(target).unlink()
    except OSError as error:
        kind = Failure if error.errno in FULL else UserError
        raise kind(f"{path}: cannot be written: {reason(error)}") from None
    return target


def reason(error: BaseException) -> str:
    """Why a file could not be written, and the way out."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split()).rpartition("I/O error: ")[2]
    full = getattr(error, "errno", None) in FULL or "No space left" in text
    return f"{'the disk is full: ' * full}{text}; {'free space or ' * full}name another file"


def descriptor(path: str | Path) -> int | None:
    """The descriptor that - (standard output), /dev/stdout, /dev/stderr or /dev/fd/N (of >(...)) means; else None."""
    if str(path) == "-":
        return 1
    match = DESCRIPTOR.fullmatch(str(path))
    return match and (int(match[2]) if match[2] else 1 + (match[1] == "err"))


def _check_descriptor(path: str | Path, fd: int) -> None:
    import fcntl

    try:
        readable_only = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    except OSError:
        readable_only = True
    if readable_only:
        raise UserError(f"{path}: descriptor {fd} is not open for writing; name a file to write")


def _write_through(source: Path, fd: int) -> None:
    if fd == 1 and sys.stdout is not None:
        sys.stdout.flush()
    opened = contextlib.nullcontext(sys.stdout.buffer) if fd == 1 else open(os.dup(fd), "wb")
    with open(source, "rb") as file, opened as out:
        shutil.copyfileobj(file, out, 1 << 20)
        out.flush()


def _may_replace(target: Path, found: os.stat_result) -> bool:
    """Whether this user may write the file, and rename another over it: in a sticky folder, as /tmp is, only theirs."""
    folder = os.stat(target.parent)
    ours = not folder.st_mode & stat.S_ISVTX or os.geteuid() in (0, found.st_uid, folder.st_uid)
    return os.access(target, os.W_OK) and ours


def _partial(target: Path) -> Path:
    name = os.fsdecode(os.fsencode(target.name)[:200])  # a name may have 255 bytes
    return target.with_name(f".partial-{name}.{os.getpid()}")


def _create(partial: Path, target: Path, mode: int | None = None) -> int:
    """Makes an empty file with `mode`, or with owner and mode of `target` where that exists; returns its mode."""
    partial.unlink(missing_ok=True)
    fd = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else mode)
    try:
        if mode is None and target.exists():
            old = os.stat(target)
            for give, of in ((os.fchown, (old.st_uid, old.st_gid)), (os.fchmod, (stat.S_IMODE(old.st_mode),))):
                with contextlib.suppress(PermissionError):  # only root gives files away; not all disks have modes
                    give(fd, *of)
        return stat.S_IMODE(os.fstat(fd).st_mode)
    finally:
        os.close(fd)


def _sweep(target: Path) -> None:
    """Removes what earlier writers of `target` left behind, unless they are still at it."""
    name = re.compile(re.escape(_partial(target).name.removesuffix(str(os.getpid()))) + r"(\d+)")
    with contextlib.suppress(PermissionError):  # a folder that cannot be listed can be written to
        for path in target.parent.iterdir():
            if (match := name.fullmatch(path.name)) and not _alive(int(match[1])):
                path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
