"""What is answered at a server's address while it loads its model."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
import urllib.request

import pytest

from minioscar.serve import server
from minioscar.serve.starting import Starting

from .patience import PATIENCE
from .serving import Server
from .tiny import write_talker


@pytest.fixture
def bound():
    with server.listening("127.0.0.1", 0) as found:
        yield found


def asked(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, dict, dict]:
    wire = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    wire.request(method, path, body, {"content-type": "application/json"} if body else {})
    got = wire.getresponse()
    return got.status, dict(got.getheaders()), json.loads(got.read())


def test_everything_is_503_and_says_when_to_come_back(bound):
    port, starting = bound.getsockname()[1], Starting(bound)
    for request in (("GET", "/health"), ("POST", "/v1/chat/completions", b"{}"), ("POST", "/x", b" " * 1_000_000)):
        status, headers, body = asked(port, *request)
        assert status == 503 and headers["retry-after"] == "2" and body["error"]["code"] == "starting"
    starting.end()


def test_clients_that_say_nothing_or_leave_keep_nobody_waiting_for_long(bound):
    port, starting = bound.getsockname()[1], Starting(bound)
    with socket.create_connection(("127.0.0.1", port)):
        socket.create_connection(("127.0.0.1", port)).close()
        before = time.monotonic()
        assert asked(port, "GET", "/health")[0] == 503
        assert time.monotonic() - before < 10
    starting.end()


def test_who_comes_between_the_two_is_answered_by_the_server(bound):
    port, starting = bound.getsockname()[1], Starting(bound)
    assert asked(port, "GET", "/health")[0] == 503
    starting.end()
    late: list[tuple] = []
    thread = threading.Thread(target=lambda: late.append(asked(port, "GET", "/health")))
    thread.start()
    time.sleep(0.2)

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    async def run():
        async with await asyncio.start_server(answer, sock=bound):
            await asyncio.to_thread(thread.join, PATIENCE)

    asyncio.run(run())
    assert late == [(200, {"content-length": "2"}, {})]


def test_a_server_answers_from_when_its_port_is_taken(tmp_path, monkeypatch):
    """503 while it loads, 200 when it says that it is ready; never a wrong answer in between."""
    pytest.importorskip("uvicorn")
    with server.listening("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    seen, ended = [], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=PATIENCE) as got:
                    seen.append(got.status)
            except urllib.error.HTTPError as error:
                seen.append(error.code)
            except OSError:  # before
                time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    folder = str(write_talker(tmp_path / "m", 1))
    try:
        one = Server(folder, "--port", str(port))
        try:
            time.sleep(0.5)
        finally:
            ended.set()
            thread.join()  # before it ends: from then on it says 503 again
            one.end()
    finally:
        ended.set()
        thread.join()
    assert set(seen) == {503, 200} and seen == sorted(seen, reverse=True)
