"""A server in a process of its own, as users start it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .patience import PATIENCE

ROOT = Path(__file__).parents[1]


class Server:
    """url: with /v1. lines: what it has said on stderr so far."""

    def __init__(self, *args: str, seconds: float = PATIENCE, **environment: str):
        command = [sys.executable, "-m", "minioscar", "serve", "--port", "0", "--device", "cpu", *args]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, env=env, cwd=ROOT, **pipes)
        self.lines: list[str] = []
        self.said = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()
        self.url = self._ready(seconds)

    def _listen(self) -> None:
        for line in self.process.stderr:
            with self.said:
                self.lines.append(line)
                self.said.notify()
        with self.said:
            self.lines.append("")
            self.said.notify()

    def _ready(self, seconds: float) -> str:
        end = time.monotonic() + seconds
        with self.said:
            while not (found := re.search(r"at (http://[^ ]*/v1):", "".join(self.lines))):
                assert "" not in self.lines and time.monotonic() < end, self.lines
                self.said.wait(1)
        return found[1]

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + path, timeout=PATIENCE) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        return float(re.search(rf"^minioscar_{name} (\S+)$", self.get("/metrics"), re.M)[1])

    def end(self, how: signal.Signals = signal.SIGTERM, seconds: float = PATIENCE) -> int:
        self.process.send_signal(how)
        return self.process.wait(seconds)


@contextmanager
def server(*args: str, kind: type[Server] = Server, **how: Any) -> Iterator[Any]:
    """how: of `Server`."""
    one = kind(*args, **how)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()
