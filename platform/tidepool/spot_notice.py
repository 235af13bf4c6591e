"""Has Ray leave this node in time when it is about to end: `python -m tidepool.spot_notice --address HOST:PORT [COMMAND ...]`.

Whoever ends a node says so in one of two ways, and both drain the node by `ray drain-node`, so that nothing new starts on it and what is
there leaves:

- The cloud takes a spot instance back: the instance's metadata service (AWS's IMDSv2, "Spot Instance interruption notices") is asked
  every few seconds. On a node that is not a spot instance it never says so.
- SIGTERM, as a container's first process or a service gets it, if a COMMAND starts Ray (`ray start --block ...`): the node is drained with
  `--grace` seconds, which are waited for as long as Ray runs, and the command is ended then. Beside Ray, without one, SIGTERM ends this
  process and no more: `cluster.yaml` replaces it so.

Knows Ray only as a command.
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

import psutil

from tidepool.telemetry import configure_logging

ENDPOINT_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
_ENDPOINT = "http://169.254.169.254"
_POLL_S = 5.0
_LOOK_EVERY_S = 0.2
_TIMEOUT_S = 2.0
_END_TIMEOUT_S = 20.0
_TOKEN_TTL_S = 60
_logger = logging.getLogger("tidepool.spot_notice")


def main() -> int:
    """Wait for a notice or SIGTERM and drain the node; returns the exit status of the command, or of the draining if there is none."""
    parser = argparse.ArgumentParser(description="Drain this Ray node when it is about to end: spot notices and SIGTERM.")
    parser.add_argument("--address", required=True, help="HOST:PORT of the cluster's head")
    parser.add_argument("--node-id", help="the node (hex), where several run on one machine (default: the command's, or this machine's)")
    parser.add_argument("--grace", type=int, default=25, metavar="SECONDS", help="from SIGTERM to the end (default: %(default)s)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="runs Ray on this node: ray start --block ...")
    options = parser.parse_args()
    configure_logging()
    is_asked_to_end = threading.Event()
    process = None
    if options.command:
        signal.signal(signal.SIGTERM, lambda *_: is_asked_to_end.set())
        process = subprocess.Popen(options.command)
    endpoint = os.environ.get(ENDPOINT_VARIABLE, _ENDPOINT)
    status, is_drained, asked_at = 0, False, float("-inf")
    while not is_asked_to_end.wait(_LOOK_EVERY_S):
        if process is not None and process.poll() is not None:
            return process.returncode
        if not is_drained and time.monotonic() - asked_at >= _POLL_S:
            left_s, asked_at = ask(endpoint), time.monotonic()
            if left_s is not None:
                is_drained = True
                status = drain(options.address, options.node_id or node_of(process), left_s, "this instance is taken back")
        if is_drained and process is None:
            return status
    assert process is not None
    node_id, deadline = options.node_id or node_of(process), time.monotonic() + options.grace
    if node_id is not None and not is_drained:
        status = drain(options.address, node_id, options.grace, "this node is asked to end")
    while status == 0 and time.monotonic() < deadline and node_of(process) is not None:
        time.sleep(_LOOK_EVERY_S)
    end(process)
    return status


def node_of(process: "subprocess.Popen[bytes] | None") -> str | None:
    """The id of the node that a command runs; None if it runs none now."""
    if process is None or process.poll() is not None:
        return None
    for one in psutil.Process(process.pid).children(recursive=True):
        try:
            words = one.cmdline() if one.name() == "raylet" else []
        except psutil.Error:
            continue
        for word in words:
            if word.startswith("--node_id="):
                return str(word.removeprefix("--node_id="))
    return None


def end(process: "subprocess.Popen[bytes]") -> None:
    """End the command, if it has not ended, and what it leaves behind."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, left = psutil.wait_procs([psutil.Process(process.pid), *family], timeout=_END_TIMEOUT_S)
    for one in left:
        one.kill()
    process.wait()


def ask(endpoint: str) -> int | None:
    """Seconds until the instance is taken back, None if nobody has said so. A service that does not answer has not."""
    try:
        token = _request(f"{endpoint}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)})
        notice = _request(f"{endpoint}/latest/meta-data/spot/instance-action", "GET", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code != 404:
            _logger.warning("the metadata service refuses to say whether this instance stays: %s", error)
        return None
    except OSError as error:
        _logger.warning("the metadata service does not answer: %s", error)
        return None
    return seconds_left(notice, datetime.now(UTC))


def seconds_left(notice: str, now: datetime) -> int | None:
    """What an instance-action document says: `{"action": "terminate" | "stop" | "hibernate", "time": "2026-01-31T12:00:00Z"}`.

    None for one that cannot be read.
    """
    try:
        end = datetime.fromisoformat(json.loads(notice)["time"])
        return max(0, int((end - now).total_seconds()))
    except (ValueError, KeyError, TypeError):
        _logger.warning("this notice of the metadata service cannot be read: %s", notice)
        return None


def drain(address: str, node_id: str | None, left_s: int, why: str) -> int:
    """Ask Ray to drain the node within `left_s` seconds; returns the command's exit status."""
    _logger.warning("%s in %d s: draining the node", why, left_s)
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={address}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", f"--reason-message={why}"]
    command += [f"--deadline-remaining-seconds={left_s}", *([f"--node-id={node_id}"] if node_id else [])]
    return subprocess.run(command, check=False).returncode


def _request(url: str, method: str, headers: dict[str, str]) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=_TIMEOUT_S) as response:
        text: str = response.read().decode()
    return text


if __name__ == "__main__":
    sys.exit(main())
