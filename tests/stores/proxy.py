"""A proxy between a client and an S3 server that loses, cuts, delays, doubles and refuses what passes through it."""

import http.client
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_TIMEOUT_S = 60
_DELAY_S = 0.05


class Fault(Enum):
    """What happens to a request; the server has done what was asked in all but the first three."""

    NONE = auto()
    DROP_BEFORE = auto()
    """The connection ends before the server sees the request."""
    ERROR_BEFORE = auto()
    """503 without asking the server."""
    DROP_AFTER = auto()
    """The connection ends in place of the answer."""
    CUT = auto()
    """The connection ends in the middle of the answer."""
    ERROR_AFTER = auto()
    """500 in place of the answer."""
    DELAY = auto()
    """The request and its answer arrive late."""
    DOUBLE = auto()
    """The server gets the request twice, and the client the second answer."""


@dataclass(frozen=True)
class Request:
    """What passes, the `number`th of the proxy (from 0)."""

    number: int
    method: str
    path: str


def no_faults(_request: Request) -> Fault:
    """Let all pass."""
    return Fault.NONE


def random_faults(seed: int, rate: float) -> Callable[[Request], Fault]:
    """One of the faults, at random, for this share of all requests."""
    chooser = random.Random(seed)
    faults = [fault for fault in Fault if fault is not Fault.NONE]
    return lambda _request: chooser.choice(faults) if chooser.random() < rate else Fault.NONE


class Proxy(ThreadingHTTPServer):
    """`before` chooses the fault of each request, and may block; `after` is called between the server's answer and its return."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, target_url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target_url).netloc
        self.before: Callable[[Request], Fault] = no_faults
        self.after: Callable[[Request], object] = no_faults
        self.num_requests = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """The endpoint to give to the client."""
        return f"http://127.0.0.1:{self.server_port}"


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            request = Request(self.server.num_requests, self.command, self.path)
            self.server.num_requests += 1
        fault = self.server.before(request)
        if fault is Fault.DROP_BEFORE:
            self.close_connection = True
            return
        if fault is Fault.ERROR_BEFORE:
            self._send(_Answer(503, [], b""))
            return
        time.sleep(_DELAY_S if fault is Fault.DELAY else 0)
        answer = self._forward(body)
        if fault is Fault.DOUBLE:
            answer = self._forward(body)
        self.server.after(request)
        if fault is Fault.DROP_AFTER:
            self.close_connection = True
        elif fault is Fault.CUT:
            self._send(answer, cut=True)
        else:
            self._send(_Answer(500, [], b"") if fault is Fault.ERROR_AFTER else answer)

    def _forward(self, body: bytes) -> _Answer:
        connection = http.client.HTTPConnection(self.server.target, timeout=_TIMEOUT_S)
        try:
            # Host and all else as the client signed it.
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "connection":
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return _Answer(answer.status, answer.getheaders(), answer.read())
        finally:
            connection.close()

    def _send(self, answer: _Answer, cut: bool = False) -> None:
        self.send_response_only(answer.status)
        kept = {name: value for name, value in answer.headers if name.lower() not in ("connection", "transfer-encoding")}
        if "content-length" not in {name.lower() for name in kept}:
            kept["Content-Length"] = str(len(answer.body))
        for name, value in kept.items():
            self.send_header(name, value)
        if cut and not answer.body:
            self.close_connection = True  # in the middle of the headers
            self._headers_buffer = self._headers_buffer[:1]
            self.flush_headers()
            return
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if cut else answer.body)
        self.close_connection = self.close_connection or cut

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass

    def log_message(self, format: str, *_arguments: Any) -> None:
        """Quiet."""

    def handle(self) -> None:
        """Serve a connection, to its end or until a client that was killed leaves it."""
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True


@contextmanager
def proxy(target_url: str) -> Iterator[Proxy]:
    """A proxy in front of a server, for the block."""
    server = Proxy(target_url)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
