"""A spot instance's notice, from the metadata service to Ray's command."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest

from tests.metadata import Metadata
from tidepool.spot_notice import ENDPOINT_VARIABLE, ask, seconds_left

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)


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


def test_a_command_that_ends_by_itself_ends_it_with_its_status() -> None:
    command = [sys.executable, "-m", "tidepool.spot_notice", "--address=127.0.0.1:9", sys.executable, "-c", "raise SystemExit(7)"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 7


def test_beside_ray_sigterm_ends_it_at_once_and_drains_nothing(metadata: Metadata) -> None:
    """As `cluster.yaml` replaces it, on a node that stays."""
    command = [sys.executable, "-m", "tidepool.spot_notice", "--address=127.0.0.1:9"]
    environment = {**os.environ, ENDPOINT_VARIABLE: metadata.url}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not metadata.num_asked:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (-signal.SIGTERM, "")
