"""S3 that misbehaves: a small HTTP server answers what the test tells it to."""

import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tidepool.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreFullError,
    StoreUnreachableError,
)
from tidepool.storage import ObjectStore, append, log, open_store

Answer = tuple[int, bytes]


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `answers` (the last one again and again); notes what was asked."""

    answers: list[Answer]
    asked: list[str]
    stored: dict[str, bytes]


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.command)
        status, text = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        if status == 0:  # do it, and lose the answer
            self.server.stored[self.path] = body
            self.close_connection = True
            return
        if status == 1:  # behave
            status, text = self._behave(body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("ETag", '"e"')
        self.send_header("Last-Modified", "Wed, 01 Jan 2020 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _behave(self, body: bytes) -> Answer:
        if self.command != "PUT":
            return (200, self.server.stored[self.path]) if self.path in self.server.stored else (404, b"")
        if self.path in self.server.stored and self.headers.get("If-None-Match") == "*":
            return 412, b""
        self.server.stored[self.path] = body
        return 200, b""

    do_GET = do_PUT = do_HEAD = do_DELETE = _answer

    def log_message(self, format: str, *_arguments: Any) -> None:
        """Quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), _Handler)
    server.answers, server.asked, server.stored = [(1, b"")], [], {}
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    _set_environment(monkeypatch, server.server_port)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def _set_environment(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret-of-the-test")


def _store(deadline_s: float = 20) -> ObjectStore:
    return open_store("s3://bucket", deadline_s)


def test_an_overloaded_server_is_asked_again(server: Server) -> None:
    server.answers = [(503, b""), (500, b""), (429, b""), (1, b"")]
    _store().put_if_absent("k", b"x")
    assert server.asked == ["PUT"] * 4
    assert _store().get("k") == b"x"


def test_a_put_whose_answer_was_lost_is_known_as_ours(server: Server) -> None:
    server.answers = [(0, b""), (1, b"")]
    _store().put_if_absent("k", b"x")
    assert list(server.stored.values()) == [b"x"]


def test_a_put_whose_answer_was_lost_to_another_writer_is_refused(server: Server) -> None:
    server.stored["/bucket/k"] = b"theirs"
    server.answers = [(503, b""), (1, b"")]
    with pytest.raises(ObjectExistsError):
        _store().put_if_absent("k", b"x")


def test_a_conflict_that_is_not_decided_yet_is_asked_again(server: Server) -> None:
    server.answers = [(409, b"<Error><Code>ConditionalRequestConflict</Code></Error>"), (1, b"")]
    _store().put_if_absent("k", b"x")
    assert server.stored == {"/bucket/k": b"x"}


def test_an_append_whose_answer_was_lost_is_made_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _store()
    monkeypatch.setattr(type(store), "list", lambda *_: iter(()))
    monkeypatch.setattr(log, "require_fit", lambda _: None)  # its race would be answered instead
    server.answers = [(0, b""), (1, b"")]
    assert append(store, "log/", {"x": 1}).number == 1
    assert list(server.stored) == ["/bucket/log/1.json"]


@pytest.mark.parametrize("status", [401, 403])
def test_wrong_credentials_are_told_at_once_and_not_printed(server: Server, status: int) -> None:
    server.answers = [(status, b"<Error><Code>SignatureDoesNotMatch</Code></Error>")]
    store = _store()
    for call in (lambda: store.put_if_absent("k", b""), lambda: store.get("k"), lambda: store.size("k"), lambda: list(store.list(""))):
        server.asked.clear()
        with pytest.raises(StoreAccessError, match=f"status {status}.*AWS_ACCESS_KEY_ID") as caught:
            call()
        assert len(server.asked) == 1
        assert "secret-of-the-test" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (400, "ExpiredToken", "has ended: renew them"),
        (403, "RequestTimeTooSkewed", "clock is not the store's"),
        (403, "InvalidAccessKeyId", "AWS_SESSION_TOKEN"),
    ],
)
def test_why_access_is_refused_is_told(server: Server, status: int, code: str, advice: str) -> None:
    server.answers = [(status, f"<Error><Code>{code}</Code></Error>".encode())]
    with pytest.raises(StoreAccessError, match=rf"\(status {status}, {code}\).*{advice}"):
        _store().put_if_absent("k", b"")


@pytest.mark.parametrize(("status", "code"), [(403, "QuotaExceeded"), (507, "InsufficientStorage")])
def test_a_full_store_is_not_taken_for_wrong_credentials(server: Server, status: int, code: str) -> None:
    server.answers = [(status, f"<Error><Code>{code}</Code></Error>".encode())]
    with pytest.raises(StoreFullError, match=rf"is full: it refused k \({code}\).*make room"):
        _store().put_if_absent("k", b"")
    assert server.asked == ["PUT"]


def test_a_missing_bucket_is_not_a_missing_object(server: Server) -> None:
    server.answers = [(404, b"<Error><Code>NoSuchBucket</Code></Error>")]
    store = _store()
    for call in (lambda: store.put_if_absent("k", b""), lambda: store.get("k"), lambda: list(store.list(""))):
        with pytest.raises(StoreError, match="no bucket for s3://bucket: make it") as caught:
            call()
        assert not isinstance(caught.value, ObjectNotFoundError)


def test_other_refusals_are_told_with_what_the_server_said(server: Server) -> None:
    server.answers = [(400, b"<Error><Code>KeyTooLong</Code></Error>")]
    with pytest.raises(StoreError, match="KeyTooLong"):
        _store().put_if_absent("k", b"")


def test_a_store_that_does_not_answer_ends_within_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        _set_environment(monkeypatch, silent.getsockname()[1])  # refuses connections
        _expect_unreachable()
        silent.listen()  # takes connections and never answers
        _expect_unreachable()


def _expect_unreachable() -> None:
    started = time.monotonic()
    with pytest.raises(StoreUnreachableError, match=r"s3://bucket gave no answer for k within 2 s.*AWS_ENDPOINT_URL"):
        _store(deadline_s=2).get("k")
    assert time.monotonic() - started < 10


@pytest.mark.usefixtures("server")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_client_that_crossed_a_fork_is_refused() -> None:
    store = _store()
    store.put_if_absent("k", b"x")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_error, args=(store, sender))
    child.start()
    assert receiver.poll(30)
    assert "must not cross a fork" in receiver.recv()
    child.join()


def _send_error(store: ObjectStore, sender: Any) -> None:
    try:
        store.get("k")
    except StoreError as error:
        sender.send(str(error))


@pytest.mark.parametrize(
    "url", ["", "x", "ftp://a/b", "file://host/a", "file:relative", "s3://", "memory://", "s3://key:secret@bucket/x", "s3://b/x?y"]
)
def test_urls_of_no_store(url: str) -> None:
    with pytest.raises(StoreError, match="give s3://bucket/prefix"):
        open_store(url)
