"""Training on a real Ray cluster: jobs, killed workers, stops, names in use."""

import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

import tidepool
from tests.training.conftest import CONFIG, make_run, prepare_dataset, publish_base
from tidepool.checkpoint import Incarnation, RunLog
from tidepool.local_cluster import LocalCluster
from tidepool.specs import RunSpec
from tidepool.storage import ObjectStore, open_store
from tidepool.training.ray_worker import NAMESPACE, coordinator_name
from tidepool.training.worker import read_result

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240


@pytest.fixture(scope="module")
def store(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    """The cluster's store, with the dataset `tides` and the model `base`."""
    folder = tmp_path_factory.mktemp("prepared")
    publish_base(cluster.store_url, prepare_dataset(cluster.store_url, folder), folder)
    return open_store(cluster.store_url)


class Job:
    """`jobs/train.py` on the cluster, as a process of this machine or through `ray job submit`."""

    def __init__(self, cluster: LocalCluster, spec: RunSpec, folder: Path, submit: bool = False) -> None:
        self.spec, self.log = spec, folder / f"{spec.run}-{uuid.uuid4().hex[:6]}.log"
        path = folder / f"{spec.run}.yaml"
        path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
        command = [sys.executable, "jobs/train.py", str(path)]
        if submit:
            self.job_id = f"job-{uuid.uuid4().hex[:8]}"
            cli = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--submission-id", self.job_id, "--working-dir", ".", "--"]
            command = [*cli, "python", "jobs/train.py", str(path)]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=cluster.environment, cwd=ROOT)

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """The workers' heartbeats once they meet a condition."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition(workers := heartbeats(self.spec.run)):
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)
        return workers


def heartbeats(run: str) -> list[dict[str, Any]]:
    try:
        actor = ray.get_actor(coordinator_name(run), NAMESPACE)
        workers: list[dict[str, Any]] = ray.get(actor.status.remote())["workers"]
    except (ValueError, ray.exceptions.RayActorError):
        return []
    return workers


@pytest.fixture
def start(cluster: LocalCluster, store: ObjectStore, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts jobs; those that still run at the end of the test are killed."""
    jobs: list[Job] = []

    def start(run: str, submit: bool = False, **changes: Any) -> Job:
        jobs.append(Job(cluster, make_run(store.url, run, **changes), tmp_path, submit))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
            job.wait()


def result_of(job: Job, store: ObjectStore) -> dict[str, Any]:
    assert job.wait() == 0, job.output
    result = read_result(store, job.spec.run)
    assert result is not None
    return result


def claims(store: ObjectStore, run: str) -> list[Incarnation]:
    return [entry for entry in RunLog(store, run).read().values() if isinstance(entry, Incarnation)]


def bits(result: dict[str, Any]) -> list[str]:
    return [result["weights_sha256"], result["optimizer_sha256"], result["history_sha256"]]


def at_step(step: int) -> Callable[[list[dict[str, Any]]], bool]:
    return lambda workers: bool(workers) and max(worker["step"] for worker in workers) >= step


def test_killing_a_worker_changes_no_bit_and_neither_does_the_number_of_workers(start: Callable[..., Job], store: ObjectStore) -> None:
    training = {"steps": 60}
    lone = start("lone", training=training)
    job = start("killed", training=training, workers={"num_workers": 2}, publish={"model": "tides-bot"})
    workers = job.wait_for(lambda workers: len(workers) == 2 and at_step(25)(workers))
    psutil.Process(workers[1]["pid"]).kill()
    killed_result, lone_result = result_of(job, store), result_of(lone, store)
    assert "starting another" in job.output
    incarnations = claims(store, "killed")
    assert len(incarnations) == 2
    assert incarnations[1].base is not None, "it went on from a commit"
    assert bits(killed_result) == bits(lone_result)
    assert "published tides-bot@1" in job.output.splitlines()[-1]
    library = Path(workers[0]["library"])
    assert library != Path(tidepool.__path__[0]), "the workers use the copy that was shipped to them"


def test_ray_job_stop_commits_first_and_a_second_job_goes_on(start: Callable[..., Job], store: ObjectStore, cluster: LocalCluster) -> None:
    changes: dict[str, Any] = {"training": {"steps": 4000, "evaluate_every_steps": 5000}, "checkpoint": {"every_steps": 5000}}
    job = start("stopped", submit=True, **changes)
    job.wait_for(at_step(3))
    cli = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", job.job_id]
    subprocess.run(cli, env=cluster.environment, check=True, capture_output=True, timeout=TIMEOUT_S)
    job.wait()
    commits = RunLog(store, "stopped").visible_commits()
    assert len(commits) == 1, job.output
    again = start("stopped", **changes)
    workers = again.wait_for(at_step(1))
    assert min(worker["step"] for worker in workers) >= commits[0].step
    again.process.send_signal(signal.SIGTERM)
    assert again.wait() == 143, again.output
    assert "Submit the same spec again to continue it" in again.output.splitlines()[-1]
    assert len(RunLog(store, "stopped").visible_commits()) == 2


def test_a_run_name_in_use_is_told_and_disturbs_nobody(start: Callable[..., Job], store: ObjectStore) -> None:
    first = start("taken", training={"steps": 4000, "evaluate_every_steps": 5000}, checkpoint={"every_steps": 5000})
    first.wait_for(at_step(1))
    second = start("taken", training={"steps": 4000, "evaluate_every_steps": 5000}, checkpoint={"every_steps": 5000})
    assert second.wait() == 1
    assert "error: Run taken is being trained in this cluster already" in second.output.splitlines()[-1]
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 143, first.output
    assert len(claims(store, "taken")) == 1


def test_a_finished_run_is_not_trained_again(start: Callable[..., Job], store: ObjectStore) -> None:
    result = result_of(start("once", model={"config": CONFIG}, training={"steps": 2}), store)
    assert result_of(start("once", model={"config": CONFIG}, training={"steps": 2}), store) == result
    assert len(claims(store, "once")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "tide"}, "there are: tides"),
        ({"model": {"base": "bose"}}, "did you mean base"),
        ({"training": {"optimizer": {"learning_rate": 1e30, "clip_norm": None, "schedule": "constant"}}}, "Lower the learning rate"),
    ],
)
def test_errors_of_the_spec_end_the_job_at_once_with_one_message(
    start: Callable[..., Job], store: ObjectStore, changes: dict[str, Any], message: str
) -> None:
    run = f"bad-{uuid.uuid4().hex[:6]}"
    job = start(run, **changes)
    assert job.wait() == 1
    last = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert len(last) == 1
    assert message in job.output[job.output.index("error: ") :]
    assert len(claims(store, run)) <= 1, "nobody started the workers again"


def test_nothing_is_left_of_a_run(start: Callable[..., Job], store: ObjectStore) -> None:
    before = dict(ray.available_resources())
    result_of(start("clean", training={"steps": 2}, model={"config": CONFIG}), store)
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != before.get("CPU"):
        assert time.monotonic() < deadline, "CPUs are still held"
        time.sleep(0.1)
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor(coordinator_name("clean"), NAMESPACE)
