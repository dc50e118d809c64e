"""What a server answers before it is ready: 503, on the socket that it listens at later."""

from __future__ import annotations

import socket
import threading

from ..storage import strict_json as json
from .errors import ApiError

LOOK, PATIENCE = 0.1, 0.5  # seconds until `end` is seen, and for a request
WHY = ApiError(503, "the server is starting; try again later", code="starting", headers=(("retry-after", "2"),))


def response() -> bytes:
    body = json.dumps(WHY.body).encode()
    headers = {"content-type": "application/json", "content-length": len(body), "connection": "close"}
    headers |= dict(WHY.headers)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 503 Service Unavailable\r\n{lines}\r\n".encode() + body


class Starting:
    """From now on until `end`, on a thread of its own. bound: a socket that nobody can connect to yet."""

    def __init__(self, bound: socket.socket):
        self.bound, self.ended = bound, threading.Event()
        bound.listen()
        bound.settimeout(LOOK)
        self.thread = threading.Thread(target=self._run, name="starting", daemon=True)
        self.thread.start()

    def end(self) -> None:
        """Connections that come later wait for whoever listens then."""
        self.ended.set()
        self.thread.join()

    def _run(self) -> None:
        while not self.ended.is_set():
            try:
                connection, _ = self.bound.accept()
                with connection:
                    self._answer(connection)
            except OSError:  # nobody came, or they left
                continue

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE)
        connection.recv(1 << 16)
        connection.sendall(response())
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):  # closing earlier would take the answer away from who still sends
            pass
