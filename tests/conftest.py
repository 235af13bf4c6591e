"""What all tests share: an S3 server, and a Ray cluster for those marked `cluster`. Both start when first asked for."""

import logging
import os
import subprocess
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import tidepool
from tests.metadata import Metadata
from tests.stores.ceph import Ceph, ceph
from tests.stores.moto import moto
from tests.stores.s3 import S3Server, is_ceph, set_environment
from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster

NAMESPACE = "tidepool"

# The same examples each time, as Hypothesis has it in CI by itself; how long one takes says nothing on a busy machine.
settings.register_profile("tidepool", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tidepool")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--elastic", action="store_true", help="run the tests marked elastic too, which take minutes each on a busy machine")
    parser.addoption("--autoscaling", action="store_true", help="run the tests on a cluster that Ray's autoscaler grows and shrinks too")
    parser.addoption("--s3", choices=["moto", "ceph"], default="moto", help="the S3 server of the tests; ceph is a real one and needs root")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests out that need a real Ceph, where there is none, and those of a suite apart, unless it is asked for."""
    apart = {name: config.getoption(f"--{name}") for name in ("elastic", "autoscaling")}
    left_out = {name for name, is_wanted in {"ceph": is_ceph(config), **apart}.items() if not is_wanted}
    without = [item for item in items if left_out.isdisjoint(marker.name for marker in item.iter_markers())]
    config.hook.pytest_deselected(items=[item for item in items if item not in without])
    items[:] = without


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """Undoes `configure_logging` after a test that runs a job in this process: its handler writes to that test's output."""
    logger = logging.getLogger("tidepool")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.fixture(scope="session")
def ceph_cluster() -> Iterator[Ceph]:
    """A Ceph cluster of this session, if it runs with `--s3 ceph`."""
    with ceph() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def s3_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The S3 server of this session."""
    if is_ceph(request.config):
        yield request.getfixturevalue("ceph_cluster").server
        return
    with moto(tmp_path_factory.mktemp("moto") / "log") as server:
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server) -> Iterator[str]:
    """A prefix of a new bucket at the S3 server, with the environment that opens it."""
    bucket = f"b{uuid.uuid4().hex}"
    s3_server.create_bucket(bucket)
    with pytest.MonkeyPatch.context() as monkeypatch:  # its own, as tests may undo theirs on the way
        set_environment(monkeypatch, s3_server)
        yield f"s3://{bucket}/some/prefix"


@pytest.fixture(params=["file", "memory", "s3"])
def any_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    return _new_store_url(request, request.param, tmp_path)


@pytest.fixture
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store for tests that need one of any kind: in memory, but with `--s3 ceph` there."""
    return _new_store_url(request, "s3" if is_ceph(request.config) else "memory", tmp_path)


@pytest.fixture
def shared_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store that other processes reach too: a directory, but with `--s3 ceph` there."""
    return _new_store_url(request, "s3" if is_ceph(request.config) else "file", tmp_path)


def _new_store_url(request: pytest.FixtureRequest, kind: str, folder: Path) -> str:
    if kind == "file":
        return (folder / "store").as_uri()
    if kind == "memory":
        return f"memory://{uuid.uuid4().hex}"
    url: str = request.getfixturevalue("s3_url")
    return url


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    """A metadata service of this test."""
    with Metadata() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB of its own; a test that asks for it is skipped where nothing can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """The Ray cluster of this session, with a store in a local directory, or with `--s3 ceph` there; this process is connected to it."""
    import ray

    folder = tmp_path_factory.mktemp("cluster")
    url = (folder / "store").as_uri()
    if is_ceph(request.config):
        server, bucket = request.getfixturevalue("s3_server"), f"b{uuid.uuid4().hex}"
        server.create_bucket(bucket)
        os.environ.update(server.environment)  # for the cluster's processes, which inherit it, and for the rest of the session
        url = f"s3://{bucket}/cluster"
    os.environ.update({"RAY_worker_niceness": "0"})  # Ray's workers yield to everything else (15), and on a busy machine then hardly run
    running = local_cluster.start(url, num_cpus=4, log=folder / "ray.log")
    try:
        os.environ.update({"RAY_ADDRESS": running.address, "RAY_AUTH_MODE": "disabled"})
        ray.init(running.address, namespace=NAMESPACE, log_to_driver=False, runtime_env={"py_modules": [tidepool.__path__[0]]})
        yield running
    finally:
        ray.shutdown()
        local_cluster.stop(running)
