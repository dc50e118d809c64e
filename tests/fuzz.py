"""The command line on mutated model folders, prompt caches and prompts: one line and an exit code is all that may come
of them.

    python -m tests.fuzz --cases 10000 [--seed S] [--json F]     a summary; exit code 1 if a case broke a promise
    python -m tests.fuzz --seed S --case N                       one case again, with all that it prints

Cases run in a worker process that says which one it is at; a worker that dies, or takes longer than LIMIT seconds, is a
failure of that case, and another goes on behind it. Checked of every case: exit code 0, 1 or 2; no traceback, no
"unexpected" error, nothing that a library wrote to stderr by itself; an error is one line; outside the case's folder
nothing was opened (by Python: an audit hook; by anybody: inotify on a decoy that mutations point at), and in it nothing
written but what was asked for.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import io
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minioscar.app import cli

from .mutants import Case, make_originals
from .patience import PATIENCE

LIMIT = 30.0  # seconds of one case
MEMORY = 4 << 30  # address space of a worker


# --- the worker


class Opened:
    """Paths that were opened outside the allowed roots. An audit hook cannot be removed; it looks only while a case
    runs."""

    def __init__(self) -> None:
        self.roots, self.paths = tuple[str, ...](), list[str]()
        package, libraries = str(Path(cli.__file__).parents[1]), str(Path(np.__file__).parents[1])
        self.always = (
            sys.prefix,
            sys.base_prefix,
            package,
            libraries,
            "/proc",
            "/sys",
            "/dev",
            "/usr",
            "/etc/localtime",
        )
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event != "open" or not self.roots or not isinstance(args[0], str | bytes):
            return
        if args[0] in sys.path:  # importlib.metadata opens what is no folder, as a zip file
            return
        path = os.path.realpath(os.fsdecode(args[0]))
        if not path.startswith(self.roots + self.always):
            self.paths.append(path)

    @contextlib.contextmanager
    def within(self, *roots: Path) -> Iterator[None]:
        self.paths, self.roots = [], tuple(os.path.realpath(root) for root in roots)
        try:
            yield
        finally:
            self.roots = ()


class Decoy:
    """A folder with files that look like a model's, in which inotify reports every opening."""

    def __init__(self, folder: Path, model: Path):
        shutil.copytree(model, folder)
        self.fd = None
        with contextlib.suppress(OSError, AttributeError):  # not Linux: the audit hook is all there is
            libc = ctypes.CDLL(None, use_errno=True)
            self.fd = libc.inotify_init1(os.O_NONBLOCK)
            if self.fd < 0 or libc.inotify_add_watch(self.fd, os.fsencode(folder), 0x20) < 0:  # IN_OPEN
                raise OSError(ctypes.get_errno(), "inotify")

    def touched(self) -> bool:
        try:
            return self.fd is not None and bool(os.read(self.fd, 65536))
        except BlockingIOError:
            return False


def run_case(case: Case, opened: Opened, decoy: Decoy) -> tuple[int, list[str]]:
    """Exit code and broken promises."""
    before, streams = listing(case.home), (sys.stdin, sys.stdout, sys.stderr)
    strictness = case.rng.choice(["strict", "surrogateescape"])  # as Python opens it in a UTF-8 locale, in a C locale
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(case.stdin)), encoding="utf-8", errors=strictness)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace") for _ in range(2))
    sys.stdout, sys.stderr, broken, code = out, err, [], -1
    try:
        with opened.within(case.home):
            code = cli.main(case.argv)
    except BaseException as error:
        broken.append(f"{type(error).__name__} came out: {traceback.format_exc(limit=-3)}")
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
    out.flush(), err.flush()
    said = err.buffer.getvalue().decode()
    errors = [line for line in said.splitlines() if line.startswith("minioscar: ")]
    if code not in (0, 1, 2) or "Traceback" in said or "minioscar: unexpected " in said:
        broken.append(f"exit code {code}, stderr {said!r}")
    if (code == 0) != (not errors) or len(errors) > 1 or (errors and said.splitlines()[-1] != errors[0]):
        broken.append(f"exit code {code} with stderr {said!r}")
    if "out of" in said and "memory" in said:
        broken.append(f"a model this small ran out of memory: {said!r}")
    if code == 0 and case.argv[0] in ("info", "generate") and not out.buffer.getvalue():
        broken.append("exit code 0 and nothing on stdout")
    if opened.paths or decoy.touched():
        broken.append(f"opened outside its folder: {opened.paths or 'the decoy'}")
    written = {path for path, size in listing(case.home).items() if before.get(path) != size}
    if not written <= case.writes or (code != 0 and written):
        broken.append(f"wrote {sorted(written)} with exit code {code}")
    return code, broken


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for root, _, files in os.walk(folder):
        for name in files:
            status = os.stat(os.path.join(root, name))
            found[os.path.relpath(os.path.join(root, name), folder)] = (status.st_size, status.st_mtime_ns)
    return found


def work(seed: int, first: int, last: int, place: Path) -> None:
    """Runs the cases first ... last - 1; announces each and its result on stdout, a line of JSON each."""
    report = os.fdopen(os.dup(1), "w", buffering=1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(place)
    noise = os.open(place / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.dup2(noise, 2)  # what libraries say by themselves
    os.dup2(noise, 1)
    originals = place / "originals"
    opened, decoy = Opened(), Decoy(place / "decoy", originals / "model")
    os.environ["XDG_STATE_HOME"] = str(place / "state")
    for number in range(first, last):
        home = place / "case"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        report.write(json.dumps({"at": number}) + "\n")
        case = Case(seed, number, home, originals, place / "decoy")
        decoy.touched()
        os.ftruncate(noise, 0)
        code, broken = run_case(case, opened, decoy)
        if os.fstat(noise).st_size:
            broken.append(f"a library wrote {os.pread(noise, 300, 0)!r}")
        report.write(json.dumps({"done": number, "kind": case.kind, "code": code, "broken": broken}) + "\n")


# --- the parent


def fuzz(cases: int, seed: int, progress: bool = False) -> dict[str, Any]:
    """The summary: how many cases, their exit codes by kind, and the failures as {"case", "broken"}."""
    from tqdm import tqdm

    codes: dict[str, collections.Counter] = {kind: collections.Counter() for kind in Case.KINDS}
    start = began = time.monotonic()
    failures, slowest, at = [], (0.0, 0), 0
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-") as place,
        tqdm(total=cases, disable=not progress, leave=False) as bar,
    ):
        make_originals(Path(place) / "originals")
        while at < cases:
            shutil.rmtree(Path(place) / "decoy", ignore_errors=True)
            part = ["--seed", str(seed), "--first", str(at), "--cases", str(cases)]
            command = [sys.executable, "-m", "tests.fuzz", "--worker", place, *part]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
            worker = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], env=environment)
            for line in lines(worker):
                if "at" in line:
                    at, began = line["at"], time.monotonic()
                    continue
                slowest, at = max(slowest, (time.monotonic() - began, line["done"])), line["done"] + 1
                codes[line["kind"]][line["code"]] += 1
                failures += [{"case": line["done"], "broken": line["broken"]}] if line["broken"] else []
                bar.update()
            if at < cases:  # the worker ended or hangs in the middle of a case
                silent = time.monotonic() - began >= LIMIT
                worker.kill()
                last = (Path(place) / "stderr").read_text(errors="replace")[-500:]
                broken = f"hung for {LIMIT} s" if silent else f"the process died with {worker.wait()}: {last}"
                failures.append({"case": at, "broken": [broken]})
                at += 1
                bar.update()
            worker.wait()
    return {
        "cases": cases,
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "slowest_s": round(slowest[0], 2),
        "slowest_case": slowest[1],
        "exit_codes": {kind: {str(code): n for code, n in sorted(found.items())} for kind, found in codes.items()},
        "failures": failures,
    }


def lines(worker: subprocess.Popen) -> Iterator[dict[str, Any]]:
    """What the worker reports, until it ends or is silent for LIMIT seconds, once it has started."""
    fd, rest, limit = worker.stdout.fileno(), b"", PATIENCE
    while select.select([fd], [], [], limit)[0] and (chunk := os.read(fd, 65536)):
        *whole, rest = (rest + chunk).split(b"\n")
        limit = LIMIT
        yield from map(json.loads, whole)


def again(seed: int, number: int) -> None:
    """One case, in this process, printed."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        place = Path(name)
        make_originals(place / "originals")
        (place / "case").mkdir()
        decoy = Decoy(place / "decoy", place / "originals" / "model")
        case = Case(seed, number, place / "case", place / "originals", place / "decoy")
        print(case.kind, case.argv, case.stdin, *sorted(path.name for path in case.home.rglob("*")), sep="\n")
        decoy.touched()
        print(*run_case(case, Opened(), decoy), sep="\n")
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(case.stdin)))
        cli.main([*case.argv, "--debug"])


def main() -> int:
    parser = argparse.ArgumentParser(description="fuzz of the command line")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    parser.add_argument("--json", metavar="F")
    parser.add_argument("--case", type=int, help="run this one again")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.seed, args.first, args.cases, Path(args.worker))
        return 0
    if args.case is not None:
        again(args.seed, args.case)
        return 0
    summary = fuzz(args.cases, args.seed, progress=sys.stderr.isatty())
    text = json.dumps(summary, indent=1)
    if args.json:
        Path(args.json).write_text(text + "\n")
    print(text)
    return 1 if summary["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
