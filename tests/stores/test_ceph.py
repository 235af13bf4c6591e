"""The Ceph of the tests leaves nothing, however it ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.ceph, pytest.mark.chaos]
ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 120
_COMMAND = "import os, time; print(os.environ['AWS_ENDPOINT_URL'], flush=True); time.sleep(600)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_it_is_asked_to_end_or_killed(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/stores/ceph.py"), sys.executable, "-c", _COMMAND]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}", "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        children = psutil.Process(process.pid).children(recursive=True)
        daemons = [child for child in children if child.name().startswith(("ceph-", "radosgw"))]
        commands = [child for child in children if child not in daemons]
        assert len(daemons) == 3
        process.send_signal(number)
        for child in commands:  # its own child: it is waited for, or left behind where the script was killed
            child.kill()
        process.wait(_TIMEOUT_S)
    wait_for(lambda: all(not child.is_running() or child.status() == psutil.STATUS_ZOMBIE for child in daemons))
    wait_for(lambda: not listens(port))  # a killed process is a zombie a moment before its last thread lets go of the port
    assert bool(list(tmp_path.glob("tidepool-ceph-*"))) == (number == signal.SIGKILL), "nobody is left to remove it"


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
