"""What the runs in a Ray cluster say of themselves now, and what they are asked for. In a process of its own, as whose program
this module runs.

Connecting to Ray prints, goes on trying for minutes where nobody answers, and cannot be called off: a process can. That no
cluster answers is an answer for who only looks; who asks for something gets a `ClusterError`.
"""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tidepool
from tidepool.errors import ClusterError, RunError
from tidepool.messages import NAMESPACE, Pause, Resize, Stop
from tidepool.scratch import ScratchFolder
from tidepool.training.cluster_address import listens
from tidepool.training.membership import coordinator_name

_CONNECT_TIMEOUT_S = 2
_STATUS_TIMEOUT_S = 5
_TIMEOUT_S = 30


class Cluster:
    """A Ray cluster, by an environment that names it (`RAY_ADDRESS`)."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def look(self) -> "Look":
        """What trains in it; takes at most half a minute."""
        try:
            return Look(self._call())
        except ClusterError as error:
            return Look({}, str(error))

    def resize(self, run: str, num_groups: int) -> int:
        """Ask a run for so many replica groups; returns how many its spec lets that be. Raises `ClusterError`, `RunError`."""
        return self._tell(Resize(run, num_groups))

    def stop(self, run: str, pause: bool) -> int:
        """Ask a run to commit and to end, or to pause; returns the step that it holds now. Raises as `resize`."""
        return self._tell(Pause(run) if pause else Stop(run))

    def submit(self, spec: Mapping[str, Any]) -> str:
        """Submit a job that trains by a spec (JSON), with this library; returns its id. Raises `ClusterError`."""
        job = f"{spec['run']}-{uuid.uuid4().hex[:8]}"
        with ScratchFolder("submit") as folder:
            shutil.copytree(tidepool.__path__[0], Path(folder) / "tidepool", ignore=shutil.ignore_patterns("__pycache__"))
            (Path(folder) / "spec.json").write_text(json.dumps(spec))
            command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--no-wait", "--submission-id", job]
            command += ["--working-dir", folder, "--", "python", "-m", "tidepool.training.job", "spec.json"]
            done = subprocess.run(command, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ClusterError(f"Run {spec['run']} was not submitted: {_last_line(done.stderr) or _last_line(done.stdout)}")
        return job

    def _tell(self, request: Resize | Pause | Stop) -> int:
        run = request.run
        try:
            answer = self._call(type(request).__name__, json.dumps(asdict(request)))
        except ClusterError as error:
            raise ClusterError(f"Run {run} cannot be asked: {error}.") from error
        if answer is None:
            raise RunError(f"Run {run} is not being trained in this cluster; `tidepool runs list` shows what is.")
        if isinstance(answer, str):
            raise RunError(f"Run {run} refused: {answer}")
        return int(answer)

    def _call(self, *arguments: str) -> Any:
        """What this module's program prints last. Raises `ClusterError`, without a full stop."""
        address = self._environment.get("RAY_ADDRESS", "")
        if not address:
            raise ClusterError("no cluster is known here; set RAY_ADDRESS (to `auto` on a node of it)")
        if not listens(address, _CONNECT_TIMEOUT_S):
            raise ClusterError(f"nothing answers at {address}")
        path = [str(Path(tidepool.__path__[0]).parent), self._environment.get("PYTHONPATH", "")]
        variables = {**self._environment, "PYTHONPATH": os.pathsep.join(part for part in path if part)}
        command = [sys.executable, "-m", "tidepool.training.live_runs", *arguments]
        try:
            done = subprocess.run(
                command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"{address} did not answer within {_TIMEOUT_S} s") from error
        if done.returncode:
            raise ClusterError(f"Ray could not connect to {address} ({_last_line(done.stderr) or f'exit status {done.returncode}'})")
        return json.loads(_last_line(done.stdout))


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.split("\n")) if line.strip()), "")


@dataclass(frozen=True)
class Look:
    """What a cluster answered: `runs` has the `Coordinator.status` of each run that trains in it, by name."""

    runs: Mapping[str, Mapping[str, Any] | None]
    """None for a run that has begun and does not answer yet, or not in time."""
    problem: str = ""
    """Why no cluster was asked, "" if one was."""


def _tell(kind: str, fields: str) -> Any:
    """What a run's coordinator answers to a request, by Ray, or why it refuses; None if there is no such run in `RAY_ADDRESS`'s cluster."""
    import ray  # here and not above: the process that asks does without

    request = {"Resize": Resize, "Pause": Pause, "Stop": Stop}[kind](**json.loads(fields))
    ray.init(os.environ["RAY_ADDRESS"], namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    try:
        coordinator = ray.get_actor(coordinator_name(request.run), NAMESPACE)
        return ray.get(coordinator.ask.remote(request), timeout=_STATUS_TIMEOUT_S)
    except RunError as refused:
        return str(refused)
    except (ValueError, ray.exceptions.RayActorError):  # there is none, or it has ended since
        return None


def _ask() -> dict[str, Any]:
    """The `Look.runs` of the cluster of `RAY_ADDRESS`, by Ray."""
    import ray

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
    print(json.dumps(_tell(*sys.argv[1:]) if sys.argv[1:] else _ask()))
