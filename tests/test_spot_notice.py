"""A spot instance's notice, from the metadata service to Ray's command."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tidepool.spot_notice import ask, seconds_left

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)


class Metadata(ThreadingHTTPServer):
    """AWS's IMDSv2, as far as it speaks of spot instances: no answer without a token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.notice: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        is_token = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200 if is_token else 400, "secret-token")

    def do_GET(self) -> None:
        if self.headers["X-aws-ec2-metadata-token"] != "secret-token":
            self._answer(401, "")
        elif self.path != "/latest/meta-data/spot/instance-action" or self.server.notice is None:
            self._answer(404, "")
        else:
            self._answer(200, self.server.notice)

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: pytest shows what matters."""


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_nothing_is_heard_until_there_is_a_notice(metadata: Metadata) -> None:
    assert ask(metadata.url) is None
    metadata.notice = json.dumps({"action": "terminate", "time": "2199-01-01T00:00:00Z"})
    left_s = ask(metadata.url)
    assert left_s is not None
    assert left_s > 10**9


def test_a_service_that_does_not_answer_or_refuses_says_nothing(metadata: Metadata, caplog: pytest.LogCaptureFixture) -> None:
    assert ask("http://127.0.0.1:9") is None
    assert "does not answer" in caplog.text
    assert ask(f"{metadata.url}/elsewhere") is None
    assert "refuses to say" in caplog.text


@pytest.mark.parametrize(
    ("notice", "left_s"),
    [
        ('{"action": "terminate", "time": "2026-01-31T12:02:00Z"}', 120),
        ('{"action": "stop", "time": "2026-01-31T11:59:00Z"}', 0),
        ('{"action": "terminate"}', None),
        ('{"time": "soon"}', None),
        ('{"time": "2026-01-31T12:02:00"}', None),
        ("[]", None),
        ("<html>", None),
    ],
)
def test_what_a_notice_says(notice: str, left_s: int | None) -> None:
    assert seconds_left(notice, NOW) == left_s
