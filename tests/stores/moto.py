"""moto's S3 server, a stand-in: it keeps conditional puts, but takes any keys and forgets all when it ends."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.stores.s3 import S3Server

_START_TIMEOUT_S = 60


@contextmanager
def moto(log: Path) -> Iterator[S3Server]:
    """A moto server for the block, on loopback; its output goes to `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        yield S3Server(f"http://127.0.0.1:{port}", "test", "test")
    finally:
        process.kill()
        process.wait()
