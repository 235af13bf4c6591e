"""A run as a quorum of replica groups on a real Ray cluster: real signals, and the bits of a run that was left alone."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from tests.training.conftest import make_run, prepare_dataset, publish_base, train_here
from tests.training.jobs import TIMEOUT_S, Job, Status, bits, claims, coordinator
from tidepool.data import Dataset, find_dataset
from tidepool.local_cluster import LocalCluster
from tidepool.specs import RunSpec
from tidepool.storage import ObjectStore, open_store
from tidepool.training.batch import shard_samples
from tidepool.training.sample_record import read_record, samples_digest

pytestmark = [pytest.mark.elastic, pytest.mark.chaos]
STEPS = 150
TRAINING: dict[str, Any] = {"steps": STEPS, "num_shards": 6, "global_batch_size": 12, "evaluate_every_steps": 50}
THREE = {"min": 1, "max": 3}
LOOP = "tidepool.training.loop:StepLoop"


@pytest.fixture(scope="module")
def store(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    """The cluster's store, with the dataset `tides` and the model `base`."""
    folder = tmp_path_factory.mktemp("prepared")
    publish_base(cluster.store_url, prepare_dataset(cluster.store_url, folder), folder)
    return open_store(cluster.store_url)


@pytest.fixture(scope="module")
def undisturbed(store: ObjectStore) -> list[str]:
    """The bits of the run that one worker computes alone, in this process."""
    result = train_here(elastic_run(store, "undisturbed")).result
    assert result is not None
    return bits(dict(result))


def elastic_run(store: ObjectStore, run: str, **changes: Any) -> RunSpec:
    changes = {"elastic": THREE, "checkpoint": {"every_steps": 20, "keep": 3}} | changes
    return make_run(store.url, run, **changes | {"training": TRAINING | changes.get("training", {})})


@pytest.fixture
def start(cluster: LocalCluster, store: ObjectStore, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts jobs; those that still run at the end of the test are killed."""
    jobs: list[Job] = []

    def start(run: str, faults: list[dict[str, Any]] | None = None, **changes: Any) -> Job:
        jobs.append(Job(cluster, elastic_run(store, run, **changes), tmp_path, faults=faults))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
            job.wait()


def stepping(num_groups: int, step: int = 1) -> Callable[[Status], bool]:
    """So many groups take steps, and have completed this one."""
    return lambda status: status["is_stepping"] and len(status["groups"]) == num_groups and status["step"] >= step


def members(status: Status) -> dict[int, dict[str, Any]]:
    """The workers of groups of one, by group."""
    return {worker["group"]: worker for worker in status["workers"] if worker["group"] in status["groups"]}


def check_exactly_once(store: ObjectStore, spec: RunSpec) -> None:
    """Every shard of every step read just the samples that are its own."""
    layout = Dataset(store, find_dataset(store, spec.dataset), "train", 1).layout
    record = read_record(store, spec.run)
    assert sorted(record) == list(range(1, spec.training.steps + 1))
    for step, stored in record.items():
        shards = range(spec.training.num_shards)
        expected = [samples_digest(shard_samples(step - 1, shard, spec.training, spec.seed, layout)) for shard in shards]
        assert all(digests == expected for digests in stored), step


def check_same_result(job: Job, store: ObjectStore, undisturbed: list[str]) -> dict[str, Any]:
    result = job.result(store)
    assert bits(result) == undisturbed, job.output
    check_exactly_once(store, job.spec)
    return result


def test_a_killed_worker_costs_the_step_in_flight_and_nobody_else_is_restarted(
    start: Callable[..., Job], store: ObjectStore, undisturbed: list[str]
) -> None:
    job = start("kill")
    before = members(job.wait_for_status(stepping(3)))
    os.kill(before[2]["pid"], signal.SIGKILL)
    after = job.wait_for_status(lambda status: status["is_stepping"] and 2 not in status["groups"])
    assert {1, 3} <= set(after["groups"])
    result = check_same_result(job, store, undisturbed)
    print(job.output)
    assert result["recomputed_steps"] == 0
    assert len(claims(store, "kill")) == 1, "nothing was read from a checkpoint"
