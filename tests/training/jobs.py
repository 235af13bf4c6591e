"""`jobs/train.py` on a cluster as a process of this machine, and what its run says of itself."""

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import yaml

from tidepool.checkpoint import Incarnation, RunLog
from tidepool.local_cluster import LocalCluster
from tidepool.messages import NAMESPACE
from tidepool.specs import RunSpec
from tidepool.storage import ObjectStore
from tidepool.training.membership import coordinator_name
from tidepool.training.outcome import read_result

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240
SHAS = ("weights_sha256", "optimizer_sha256", "history_sha256")
Status = dict[str, Any]


class Job:
    """A job by itself, through `ray job submit`, or with faults (see `faulty_job`) in its workers, on the first GPU if asked to."""

    def __init__(
        self,
        cluster: LocalCluster,
        spec: RunSpec,
        folder: Path,
        submit: bool = False,
        faults: list[dict[str, Any]] | None = None,
        first_gpu: bool = False,
    ) -> None:
        self.spec, self.log = spec, folder / f"{spec.run}-{uuid.uuid4().hex[:6]}.log"
        path = folder / f"{spec.run}.yaml"
        path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
        command = [sys.executable, "jobs/train.py", str(path)]
        self._faults = faults or []
        self._folder = folder
        if faults is not None:
            for number, fault in enumerate(faults):
                fault["until"] = str(self._gate(fault.get("step", 0)))
                fault["once"] = str(folder / f"{spec.run}-fault-{number}")
            command = [sys.executable, "tests/training/faulty_job.py", str(path), json.dumps(faults)]
            command += ["--first-gpu"] if first_gpu else []
        if submit:
            self.job_id = f"job-{uuid.uuid4().hex[:8]}"
            cli = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--submission-id", self.job_id, "--working-dir", ".", "--"]
            command = [*cli, "python", "jobs/train.py", str(path)]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=cluster.environment, cwd=ROOT)

    def open_gate(self, step: int = 5) -> None:
        """Let those go on whose fault is to wait at this step."""
        self._gate(step).touch()

    def _gate(self, step: int) -> Path:
        return self._folder / f"{self.spec.run}-gate-{step}"

    def num_faults_done(self) -> int:
        """How many of the faults that happen once have happened."""
        return sum(Path(fault["once"]).exists() for fault in self._faults if not fault.get("always"))

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """The workers, as the run's status has them, once they meet a condition."""
        workers: list[dict[str, Any]] = self.wait_for_status(lambda status: condition(status["workers"]))["workers"]
        return workers

    def wait_for_status(self, condition: Callable[[Status], bool]) -> Status:
        """The status of the run once it meets a condition."""
        deadline = time.monotonic() + TIMEOUT_S
        while (status := self.status()) is None or not condition(status):
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, f"{status}\n{self.output}"
            time.sleep(0.02)
        return status

    def status(self) -> Status | None:
        try:
            status: Status = ray.get(coordinator(self.spec.run).status.remote())
        except (ValueError, ray.exceptions.RayActorError):
            return None
        return status

    def result(self, store: ObjectStore) -> dict[str, Any]:
        assert self.wait() == 0, self.output
        result = read_result(store, self.spec.run)
        assert result is not None
        return result


def coordinator(run: str) -> Any:
    return ray.get_actor(coordinator_name(run), NAMESPACE)


def claims(store: ObjectStore, run: str) -> list[Incarnation]:
    return [entry for entry in RunLog(store, run).read().values() if isinstance(entry, Incarnation)]


def bits(result: dict[str, Any]) -> list[str]:
    return [result[key] for key in SHAS]
