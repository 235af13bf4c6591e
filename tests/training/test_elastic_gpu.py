"""A run whose replica groups share a GPU, on a real Ray cluster: one is killed, one comes, and no bit changes."""

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
from tests.training.test_elastic_cluster import GATE, check_same, elastic_run, gather, pids, without
from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster
from tidepool.storage import open_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.elastic,
    pytest.mark.chaos,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster with the machine's GPUs; this process is connected to it."""
    folder = tmp_path_factory.mktemp("gpu")
    url = (folder / "store").as_uri()
    publish_base(url, prepare_dataset(url, folder), folder)
    running = local_cluster.start(url, num_cpus=8, log=folder / "ray.log", find_gpus=True)
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("RAY_ADDRESS", running.address)
            monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
            ray.init(running.address, namespace=NAMESPACE, log_to_driver=False, runtime_env={"py_modules": [tidepool.__path__[0]]})
            yield running
    finally:
        ray.shutdown()
        local_cluster.stop(running)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_worker_on_a_gpu_costs_no_bit(cluster: LocalCluster, tmp_path: Path, precision: str) -> None:
    store = open_store(cluster.store_url)
    changes = {"workers": {"gpus_per_worker": 0.3}, "training": {"precision": precision}}
    alone = train_here(elastic_run(store, f"gpu-{precision}-alone", **changes), device=GPU).result
    assert alone is not None
    torch.use_deterministic_algorithms(False)
    job = Job(cluster, elastic_run(store, f"gpu-{precision}", **changes), tmp_path, faults=[GATE])
    before = pids(gather(job))
    os.kill(before[2], signal.SIGKILL)
    after = pids(job.wait_for_status(without(2)))
    assert {group: after[group] for group in (1, 3)} == {group: before[group] for group in (1, 3)}
    assert check_same(job, store, bits(dict(alone)))["recomputed_steps"] == 0
