"""What the runs in a Ray cluster say of themselves now. Asks in a process of its own, as whose program this module runs.

Connecting to Ray prints, goes on trying for minutes where nobody answers, and cannot be called off: a process can. Nothing
here raises because of a cluster: that none answers is an answer.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tidepool
from tidepool.training.cluster_address import listens
from tidepool.training.membership import NAMESPACE, coordinator_name

_CONNECT_TIMEOUT_S = 2
_STATUS_TIMEOUT_S = 5
_TIMEOUT_S = 30


@dataclass(frozen=True)
class Look:
    """What a cluster answered: `runs` has the `Coordinator.status` of each run that trains in it, by name."""

    runs: Mapping[str, Mapping[str, Any] | None]
    """None for a run that has begun and does not answer yet, or not in time."""
    problem: str = ""
    """Why no cluster was asked, "" if one was."""


def look(environment: Mapping[str, str]) -> Look:
    """Ask the cluster that `RAY_ADDRESS` of an environment names; takes at most half a minute."""
    address = environment.get("RAY_ADDRESS", "")
    if not address:
        return Look({}, "no cluster is known here; set RAY_ADDRESS (to `auto` on a node of it)")
    if not listens(address, _CONNECT_TIMEOUT_S):
        return Look({}, f"nothing answers at {address}")
    path = [str(Path(tidepool.__path__[0]).parent), environment.get("PYTHONPATH", "")]
    variables = {**environment, "PYTHONPATH": os.pathsep.join(part for part in path if part)}
    command = [sys.executable, "-m", "tidepool.training.live_status"]
    try:
        done = subprocess.run(
            command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Look({}, f"{address} did not answer within {_TIMEOUT_S} s")
    lines = (done.stderr if done.returncode else done.stdout).split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    if done.returncode:
        return Look({}, f"Ray could not connect to {address} ({last or f'exit status {done.returncode}'})")
    return Look(json.loads(last))


def _ask() -> dict[str, Any]:
    """The `Look.runs` of the cluster of `RAY_ADDRESS`, by Ray."""
    import ray  # here and not above: the process that calls `look` does without

    ray.init(os.environ["RAY_ADDRESS"], namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    prefix = coordinator_name("")
    named = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
    asked: dict[str, Any] = {}
    for name in named:
        if name.startswith(prefix):
            try:
                asked[name.removeprefix(prefix)] = ray.get_actor(name, NAMESPACE).status.remote()
            except ValueError:  # it has ended since
                continue
    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=_STATUS_TIMEOUT_S)
    runs: dict[str, Any] = {}
    for run, status in asked.items():
        try:
            runs[run] = ray.get(status, timeout=0)
        except ray.exceptions.GetTimeoutError:
            runs[run] = None
        except ray.exceptions.RayActorError:  # it has ended since
            continue
    return runs


if __name__ == "__main__":
    print(json.dumps(_ask()))
