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

import tidepool
from tests.training.conftest import CONFIG, make_run, prepare_dataset, publish_base
from tests.training.jobs import TIMEOUT_S, Job, bits, claims
from tidepool.checkpoint import RunLog
from tidepool.local_cluster import LocalCluster
from tidepool.messages import NAMESPACE
from tidepool.storage import ObjectStore, open_store
from tidepool.training.membership import coordinator_name

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def store(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    """The cluster's store, with the dataset `tides` and the model `base`."""
    folder = tmp_path_factory.mktemp("prepared")
    publish_base(cluster.store_url, prepare_dataset(cluster.store_url, folder), folder)
    return open_store(cluster.store_url)


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


def at_step(step: int) -> Callable[[list[dict[str, Any]]], bool]:
    return lambda workers: bool(workers) and max(worker["step"] for worker in workers) >= step


def test_killing_a_worker_changes_no_bit_and_neither_does_the_number_of_workers(start: Callable[..., Job], store: ObjectStore) -> None:
    training = {"steps": 60}
    lone = start("lone", training=training)
    job = start("killed", training=training, workers={"num_workers": 2}, publish={"model": "tides-bot"})
    workers = job.wait_for(lambda workers: len(workers) == 2 and at_step(25)(workers))
    psutil.Process(workers[1]["pid"]).kill()
    killed_result, lone_result = job.result(store), lone.result(store)
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


@pytest.mark.long
def test_a_run_name_in_use_is_told_and_disturbs_nobody(start: Callable[..., Job], store: ObjectStore) -> None:
    first = start("taken", training={"steps": 4000, "evaluate_every_steps": 5000}, checkpoint={"every_steps": 5000})
    first.wait_for(at_step(1))
    second = start("taken", training={"steps": 4000, "evaluate_every_steps": 5000}, checkpoint={"every_steps": 5000})
    assert second.wait() == 1
    assert "error: Run taken is being trained in this cluster already" in second.output.splitlines()[-1]
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 143, first.output
    assert len(claims(store, "taken")) == 1


@pytest.mark.long
def test_a_finished_run_is_not_trained_again(start: Callable[..., Job], store: ObjectStore) -> None:
    result = start("once", model={"config": CONFIG}, training={"steps": 2}).result(store)
    assert start("once", model={"config": CONFIG}, training={"steps": 2}).result(store) == result
    assert len(claims(store, "once")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "tide"}, "there are: tides"),
        ({"model": {"base": "bose"}}, "did you mean base"),
        pytest.param(
            {"training": {"optimizer": {"learning_rate": 1e30, "clip_norm": None, "schedule": "constant"}}},
            "Lower the learning rate",
            marks=pytest.mark.long,
        ),
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
    start("clean", training={"steps": 2}, model={"config": CONFIG}).result(store)
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != before.get("CPU"):
        assert time.monotonic() < deadline, "CPUs are still held"
        time.sleep(0.1)
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor(coordinator_name("clean"), NAMESPACE)
