"""Runs on a GPU on a real Ray cluster: a worker that is killed goes back to its commit, or costs nobody else anything; no bit changes."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

import tidepool
from tests.conftest import NAMESPACE
from tests.training.conftest import prepare_dataset, publish_base, train_here
from tests.training.jobs import Job, bits
from tests.training.test_elastic_cluster import GATE, check_same, elastic_run, gather, pids, survived_by
from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster
from tidepool.specs import RunSpec
from tidepool.storage import open_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.elastic,
    pytest.mark.chaos,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
GPU = torch.device("cuda", 0)


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalCluster]:
    """A cluster that counts the machine's GPUs, or none of them; this process is connected to it."""
    url = (tmp_path / "store").as_uri()
    publish_base(url, prepare_dataset(url, tmp_path), tmp_path)
    running = local_cluster.start(url, num_cpus=8, log=tmp_path / "ray.log", find_gpus=request.param)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("RAY_ADDRESS", running.address)
            monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
            ray.init(running.address, namespace=NAMESPACE, log_to_driver=False, runtime_env={"py_modules": [tidepool.__path__[0]]})
            yield running
    finally:
        ray.shutdown()
        local_cluster.stop(running)


def alone(spec: RunSpec) -> list[str]:
    """The bits of a run that this process computes by itself on the GPU."""
    result = train_here(spec, device=GPU).result
    torch.use_deterministic_algorithms(False)
    assert result is not None
    return bits(dict(result))


@pytest.mark.parametrize("cluster", [True], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_worker_goes_back_to_the_last_commit_on_the_gpu_that_the_pool_gave_it(
    cluster: LocalCluster, tmp_path: Path, precision: str
) -> None:
    store = open_store(cluster.store_url)
    changes = {"workers": {"gpus_per_worker": 1}, "elastic": {"min": 1, "max": 1}, "training": {"precision": precision}}
    expected = alone(elastic_run(store, "alone", **changes))
    job = Job(cluster, elastic_run(store, "killed", **changes), tmp_path, faults=[GATE])
    gather(job, 1)
    [worker] = job.wait_for(lambda workers: workers[0]["step"] > 25)
    os.kill(worker["pid"], signal.SIGKILL)
    result = check_same(job, store, expected, num_claims=2)
    assert result["recomputed_steps"] < 25, "the commit of step 20 was there"


@pytest.mark.parametrize("cluster", [False], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_group_costs_the_others_no_step_and_no_bit(cluster: LocalCluster, tmp_path: Path, precision: str) -> None:
    """Three groups on the first GPU, of which Ray knows nothing: the pool counts whole ones."""
    store = open_store(cluster.store_url)
    changes = {"training": {"precision": precision}}
    expected = alone(elastic_run(store, "alone", **changes))
    job = Job(cluster, elastic_run(store, "killed", **changes), tmp_path, faults=[GATE], first_gpu=True)
    before = pids(gather(job))
    os.kill(before[2], signal.SIGKILL)
    after = pids(job.wait_for_status(survived_by(1, 3, killed=2)))
    assert {group: after[group] for group in (1, 3)} == {group: before[group] for group in (1, 3)}
    assert check_same(job, store, expected)["recomputed_steps"] == 0
