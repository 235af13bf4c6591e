"""Asking a Ray cluster in a process of its own: a module of ours is run as a program there, and its last line is the answer, JSON.

Connecting to Ray prints, goes on trying for minutes where nobody answers, and cannot be called off: a process can.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tidepool
from tidepool.cluster_address import listens
from tidepool.errors import ClusterError

_CONNECT_TIMEOUT_S = 2
_TIMEOUT_S = 30


def ask_cluster(environment: Mapping[str, str], module: str, *arguments: str) -> Any:
    """What `module` prints last when it runs with `arguments` beside the cluster of the environment's `RAY_ADDRESS`.

    Takes half a minute at most. Raises `ClusterError` that says why there is no answer, without a full stop.
    """
    address = environment.get("RAY_ADDRESS", "")
    if not address:
        raise ClusterError("no cluster is known here; set RAY_ADDRESS (to `auto` on a node of it)")
    if not listens(address, _CONNECT_TIMEOUT_S):
        raise ClusterError(f"nothing answers at {address}")
    path = [str(Path(tidepool.__path__[0]).parent), environment.get("PYTHONPATH", "")]
    variables = {**environment, "PYTHONPATH": os.pathsep.join(part for part in path if part)}
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(
            command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{address} did not answer within {_TIMEOUT_S} s") from error
    if done.returncode:
        raise ClusterError(f"Ray could not connect to {address} ({last_line(done.stderr) or f'exit status {done.returncode}'})")
    return json.loads(last_line(done.stdout))


def last_line(text: str) -> str:
    """The last that is not empty."""
    return next((line for line in reversed(text.split("\n")) if line.strip()), "")
