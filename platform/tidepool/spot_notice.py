"""Tells Ray that a cloud is about to take this node back, so that nothing new starts on it: `python -m tidepool.spot_notice`.

It runs beside Ray on each worker node of `cluster.yaml`, asks the instance's metadata service (AWS's IMDSv2, "Spot Instance
interruption notices") every few seconds, drains the node by `ray drain-node` once there is a notice, and ends. On a node
that is not a spot instance it never hears of one. Knows Ray only as a command.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

from tidepool.telemetry import configure_logging

ENDPOINT_VARIABLE = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
_ENDPOINT = "http://169.254.169.254"
_POLL_S = 5.0
_TIMEOUT_S = 2.0
_TOKEN_TTL_S = 60
_logger = logging.getLogger("tidepool.spot_notice")


def main() -> int:
    """Wait for a notice and drain the node; returns the exit status of that."""
    parser = argparse.ArgumentParser(description="Drain this Ray node when its spot instance is about to be taken back.")
    parser.add_argument("--address", required=True, help="HOST:PORT of the cluster's head")
    parser.add_argument("--node-id", help="the node (hex), where several run on one machine; default: this machine's")
    options = parser.parse_args()
    configure_logging()
    endpoint = os.environ.get(ENDPOINT_VARIABLE, _ENDPOINT)
    while True:
        left_s = ask(endpoint)
        if left_s is not None:
            return drain(options.address, options.node_id, left_s)
        time.sleep(_POLL_S)


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


def drain(address: str, node_id: str | None, left_s: int) -> int:
    """Ask Ray to drain the node within `left_s` seconds; returns the command's exit status."""
    _logger.warning("this instance is taken back in %d s: draining the node", left_s)
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={address}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot instance interruption notice"]
    command += [f"--deadline-remaining-seconds={left_s}", *([f"--node-id={node_id}"] if node_id else [])]
    return subprocess.run(command, check=False).returncode


def _request(url: str, method: str, headers: dict[str, str]) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=_TIMEOUT_S) as response:
        text: str = response.read().decode()
    return text


if __name__ == "__main__":
    sys.exit(main())
