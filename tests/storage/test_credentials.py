"""Keys to S3 from the node: the environment, the shared file, the instance's role; and what a node without any is told."""

import json
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tidepool.errors import ObjectNotFoundError, StoreAccessError
from tidepool.storage import open_store
from tidepool.storage.credentials import ask_node


class _Recorder(ThreadingHTTPServer):
    """An S3 server that has nothing, and the metadata service of an instance with a role; remembers who signed what."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.signatures: list[tuple[str, str | None]] = []
        self.role: dict[str, str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: _Recorder

    def do_GET(self) -> None:
        if self.path.startswith("/latest/meta-data/iam/security-credentials/"):
            self._answer_metadata()
            return
        self.server.signatures.append((str(self.headers["Authorization"]), self.headers["x-amz-security-token"]))
        self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def do_PUT(self) -> None:
        self._answer(200, b"metadata-token")

    def _answer_metadata(self) -> None:
        name = self.path.rpartition("/")[2]
        if self.server.role is None:
            self._answer(404, b"")
        else:
            self._answer(200, json.dumps(self.server.role).encode() if name else b"tidepool-node")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: pytest shows what matters."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[_Recorder]:
    """The recorder, in an environment that names it and holds no keys."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with _Recorder() as one:
        monkeypatch.setenv("AWS_ENDPOINT_URL", one.url)
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", one.url)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        yield one
        one.shutdown()
        thread.join()


def signer(server: _Recorder) -> tuple[str, str, str | None]:
    """The access key, region and session token that a new store signs with."""
    with pytest.raises(ObjectNotFoundError):
        open_store("s3://bucket", deadline_s=5).get("key")
    signature, token = server.signatures[-1]
    key, _, region = signature.partition("Credential=")[2].split("/")[:3]
    return key, region, token


def test_keys_of_the_environment_come_first(server: _Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = FILE\naws_secret_access_key = s\n")
    for name, value in {"ACCESS_KEY_ID": "ENV", "SECRET_ACCESS_KEY": "s", "SESSION_TOKEN": "t", "REGION": "eu-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    assert signer(server) == ("ENV", "eu-1", "t")


def test_keys_and_region_of_the_shared_files_and_their_profile(server: _Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = "[{}]\naws_access_key_id = {}\naws_secret_access_key = s\n"
    (tmp_path / "credentials").write_text(keys.format("default", "FILE") + keys.format("tides", "PROFILE"))
    (tmp_path / "config").write_text("[default]\nregion = eu-2\n[profile tides]\nregion = eu-3\n")
    assert signer(server) == ("FILE", "eu-2", None)
    monkeypatch.setenv("AWS_PROFILE", "tides")
    assert signer(server) == ("PROFILE", "eu-3", None)


def test_a_rotated_file_is_noticed_by_the_same_process(server: _Recorder, tmp_path: Path) -> None:
    del server
    for key in ("OLD", "NEW"):
        (tmp_path / "credentials").write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n")
        given = ask_node()
        assert given["access_key_id"] == key
        assert datetime.now(UTC) < given["expires_at"] <= datetime.now(UTC) + timedelta(minutes=5)


def test_keys_of_the_instances_role(server: _Recorder) -> None:
    end = datetime.now(UTC) + timedelta(hours=6)
    server.role = {"Code": "Success", "AccessKeyId": "ROLE", "SecretAccessKey": "s", "Token": "role-token"}
    server.role |= {"Type": "AWS-HMAC", "Expiration": end.strftime("%Y-%m-%dT%H:%M:%SZ")}
    assert signer(server)[::2] == ("ROLE", "role-token")


def test_a_node_without_keys_is_told_at_once(server: _Recorder) -> None:
    with pytest.raises(StoreAccessError, match=r"no credentials.*AWS_ACCESS_KEY_ID"):
        open_store("s3://bucket", deadline_s=30).get("key")
    assert server.signatures == []


def test_a_profile_that_is_not_there_is_named(server: _Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    del server
    monkeypatch.setenv("AWS_PROFILE", "tide")
    with pytest.raises(StoreAccessError, match=r"profile \(tide\) could not be found.*Correct AWS_PROFILE"):
        open_store("s3://bucket")
