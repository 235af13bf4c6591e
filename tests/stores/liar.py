"""A small S3 server in memory that keeps its promises, except for the ones it is told to break."""

import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

from tests.stores.s3 import S3Server

LIES = {
    "condition": "ignores If-None-Match",
    "look-first": "keeps If-None-Match, but looks first and writes after: racing writers all win",
    "stale": "remembers that an object was not there, for its next reader",
    "parts": "loses the last part of an upload in parts",
    "range": "answers a range with the bytes before it",
    "page": "has no second page of a listing",
    "delete": "says it deleted, and did not",
}
_PAGE = 1000
_MODIFIED = "2026-01-01T00:00:00.000Z"
_RACED = re.compile(r"/checks/\w+/(one-winner/)?\d+$")
_Answer = tuple[int, bytes, dict[str, str]]


class Liar(ThreadingHTTPServer):
    """`objects` by path, `lies` of `LIES`, and the number of requests."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.lies: set[str] = set()
        self.num_requests = 0
        self.lock = threading.Lock()
        self.missed: set[str] = set()
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.together = threading.Barrier(8)

    @property
    def server(self) -> S3Server:
        """How it is reached."""
        return S3Server(f"http://127.0.0.1:{self.server_port}", "any", "any")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Liar

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        self._query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        with self.server.lock:
            self.server.num_requests += 1
        status, text, headers = getattr(self, f"_{self.command.lower()}")(url.path, body)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), "ETag": '"e"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}.items():
            self.send_header(name, headers.pop(name, value))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _put(self, path: str, body: bytes) -> _Answer:
        server = self.server
        if "partNumber" in self._query:
            server.uploads[self._query["uploadId"]][int(self._query["partNumber"])] = body
            return 200, b"", {}
        is_conditional, is_overwriting = self.headers.get("If-None-Match") == "*", "condition" in server.lies
        if "look-first" in server.lies and is_conditional and _RACED.search(path) and path not in server.objects:
            try:
                server.together.wait(timeout=2)  # all eight have looked before one writes
            except threading.BrokenBarrierError:
                server.together.reset()
            is_overwriting = True
        with server.lock:
            if is_conditional and path in server.objects and not is_overwriting:
                return 412, b"<Error><Code>PreconditionFailed</Code></Error>", {}
            server.objects[path] = body
        return 200, b"", {}

    def _post(self, path: str, body: bytes) -> _Answer:
        server = self.server
        if "delete" in self._query:
            return self._delete_many(path, body)
        if "uploads" in self._query:
            upload = uuid.uuid4().hex
            server.uploads[upload] = {}
            return 200, f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>".encode(), {}
        parts = [part for _, part in sorted(server.uploads.pop(self._query["uploadId"]).items())]
        content = b"".join(parts[:-1] if "parts" in server.lies else parts)
        with server.lock:
            server.objects[path] = content
        return 200, b"<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>", {}

    def _get(self, path: str, _body: bytes) -> _Answer:
        server = self.server
        if "list-type" in self._query:
            return self._list(path)
        if path not in server.objects or path in server.missed:
            if path in server.missed:
                server.missed.remove(path)
            elif "stale" in server.lies:
                server.missed.add(path)
            return 404, b"<Error><Code>NoSuchKey</Code></Error>", {}
        content = server.objects[path]
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 200, content, {"Content-Length": str(len(content))}
        start, end = int(match[1]), int(match[2] or len(content) - 1)
        if start >= len(content):
            return 416, b"<Error><Code>InvalidRange</Code></Error>", {}
        end = min(end, len(content) - 1)
        shift = 1 if "range" in server.lies and start else 0
        return 206, content[start - shift : end + 1 - shift], {"Content-Range": f"bytes {start}-{end}/{len(content)}"}

    _head = _get

    def _list(self, bucket: str) -> _Answer:
        start = f"{bucket.rstrip('/')}/"
        with self.server.lock:
            paths = sorted(path for path in self.server.objects if path.startswith(start + self._query.get("prefix", "")))
        paths = [path for path in paths if path > self._query.get("continuation-token", "")]
        page, is_cut = paths[:_PAGE], len(paths) > _PAGE and "page" not in self.server.lies
        entries = "".join(
            f"<Contents><Key>{escape(path.removeprefix(start))}</Key><LastModified>{_MODIFIED}</LastModified><ETag>e</ETag>"
            f"<Size>{len(self.server.objects[path])}</Size></Contents>"
            for path in page
        )
        more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if is_cut else ""
        flag = "true" if is_cut else "false"
        return 200, f"<ListBucketResult><IsTruncated>{flag}</IsTruncated>{more}{entries}</ListBucketResult>".encode(), {}

    def _delete_many(self, bucket: str, body: bytes) -> _Answer:
        keys = re.findall(r"<Key>(.*?)</Key>", body.decode())
        if "delete" not in self.server.lies:
            with self.server.lock:
                for key in keys:
                    self.server.objects.pop(f"{bucket.rstrip('/')}/{key}", None)
        deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        return 200, f"<DeleteResult>{deleted}</DeleteResult>".encode(), {}

    do_GET = do_PUT = do_HEAD = do_POST = _answer

    def log_message(self, format: str, *_arguments: Any) -> None:
        """Quiet."""


@contextmanager
def liar() -> Iterator[Liar]:
    """A server for the block, without lies at first."""
    server = Liar()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
