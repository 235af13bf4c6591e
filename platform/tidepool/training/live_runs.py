"""What the runs in a Ray cluster say of themselves now, and what they are asked for. In a process of its own (`cluster_process`),
as whose program this module runs.

That no cluster answers is an answer for who only looks; who asks for something gets a `ClusterError`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tidepool.cluster_process import ask_cluster, last_line
from tidepool.errors import ClusterError, RunError
from tidepool.job_folder import ENTRYPOINT, job_folder, new_job_id
from tidepool.messages import NAMESPACE, Pause, Resize, Stop
from tidepool.training.membership import coordinator_name

_STATUS_TIMEOUT_S = 5


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
        job = new_job_id(spec["run"])
        with job_folder(spec) as folder:
            command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--no-wait", "--submission-id", job]
            command += ["--working-dir", folder, "--", *ENTRYPOINT]
            done = subprocess.run(command, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ClusterError(f"Run {spec['run']} was not submitted: {last_line(done.stderr) or last_line(done.stdout)}")
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
        """What this module's program answers. Raises `ClusterError`, without a full stop."""
        return ask_cluster(self._environment, "tidepool.training.live_runs", *arguments)


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
