"""On a real cluster: drivers that are killed, stopped, or lost with the whole cluster; the arbiter goes on with those that are wanted."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.training.conftest import make_run, prepare_dataset, publish_base
from tests.training.jobs import bits
from tidepool import local_cluster
from tidepool.checkpoint import RunLog
from tidepool.local_cluster import LocalCluster
from tidepool.pool.live_pool import LivePool
from tidepool.run_queue import QueuedRun, read_queued
from tidepool.specs import RunSpec
from tidepool.storage import ObjectStore, open_store
from tidepool.training.live_runs import Cluster
from tidepool.training.outcome import read_result

pytestmark = [pytest.mark.elastic, pytest.mark.chaos, pytest.mark.timeout(600)]
TIMEOUT_S = 240
LONG: dict[str, Any] = {"training": {"steps": 60, "evaluate_every_steps": 100}, "checkpoint": {"every_steps": 1, "keep": 3}}


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    """A store with the dataset `tides` and the model `base`."""
    folder = tmp_path_factory.mktemp("prepared")
    url = (folder / "store").as_uri()
    publish_base(url, prepare_dataset(url, folder), folder)
    return open_store(url)


@pytest.fixture
def start(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], LocalCluster]]:
    """Starts clusters with the store; all are ended."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    running: list[LocalCluster] = []

    def start() -> LocalCluster:
        running.append(local_cluster.start(store.url, num_cpus=2, log=tmp_path / f"ray-{len(running)}.log"))
        return running[-1]

    yield start
    for cluster in running:
        local_cluster.stop(cluster)


@pytest.fixture(scope="module")
def alone(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of the run that was left alone."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("RAY_ADDRESS", raising=False)
        cluster = local_cluster.start(store.url, num_cpus=2, log=tmp_path_factory.mktemp("alone") / "ray.log")
    try:
        submit(cluster, make_run(store.url, "alone", **LONG))
        return result(store, "alone")  # and the cluster ends before the driver does
    finally:
        local_cluster.stop(cluster)


def submit(cluster: LocalCluster, spec: RunSpec) -> str:
    return Cluster(cluster.environment).submit(spec.model_dump(mode="json"))


def result(store: ObjectStore, run: str) -> dict[str, Any]:
    found: dict[str, Any] = until(lambda: read_result(store, run), f"{run} does not finish: {read_queued(store, run)}")
    return found


def queued(store: ObjectStore, run: str) -> QueuedRun:
    found = read_queued(store, run)
    assert found is not None
    return found


def wait_for_commit(store: ObjectStore, run: str, step: int) -> None:
    def is_there() -> bool:
        commits = RunLog(store, run).visible_commits()
        return bool(commits) and commits[0].step >= step

    until(is_there, f"{run} does not come to step {step}")


def driver(cluster: LocalCluster) -> psutil.Process:
    """The one driver in a cluster."""
    family = psutil.Process(cluster.pid).children(recursive=True)
    [found] = [one for one in family if one.name().startswith("python") and "tidepool.training.job" in one.cmdline()]
    return found


def end_abruptly(cluster: LocalCluster) -> None:
    """As a machine that loses its power ends."""
    top = psutil.Process(cluster.pid)
    for process in (top, *top.children(recursive=True)):
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    local_cluster.stop(cluster)


def test_a_driver_that_is_killed_is_submitted_again_and_the_run_ends_with_the_same_bits(
    start: Callable[[], LocalCluster], store: ObjectStore, alone: dict[str, Any]
) -> None:
    cluster = start()
    job = submit(cluster, make_run(store.url, "killed", **LONG))
    wait_for_commit(store, "killed", 3)
    first = queued(store, "killed")
    assert (first.job, first.state) == (job, "wanted")
    driver(cluster).kill()
    again = until(lambda: (now := queued(store, "killed")).job != job and now.begun_s and now, "nobody submits it again")
    assert again.submitted_s == first.submitted_s
    assert len(again.lives_s) == 1
    assert bits(result(store, "killed")) == bits(alone)
    until(lambda: queued(store, "killed").state == "done", "the list does not know that it is finished")


def test_a_run_that_a_person_stops_is_not_submitted_again(start: Callable[[], LocalCluster], store: ObjectStore) -> None:
    cluster = start()
    endless = {**LONG, "training": {"steps": 100_000, "evaluate_every_steps": 100_001}}
    by_ray, by_name = (make_run(store.url, run, **endless) for run in ("by-ray", "by-name"))
    job = submit(cluster, by_ray)
    wait_for_commit(store, "by-ray", 2)
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", job]
    subprocess.run(command, env=cluster.environment, check=True, capture_output=True, timeout=TIMEOUT_S)
    until(lambda: queued(store, "by-ray").state == "done", "what Ray says is not noted")
    assert queued(store, "by-ray").job == job
    job = submit(cluster, by_name)
    wait_for_commit(store, "by-name", 2)
    Cluster(cluster.environment).stop("by-name", pause=True)
    until(lambda: queued(store, "by-name").state == "done", "the pause is not noted")
    assert (queued(store, "by-name").job, queued(store, "by-name").reason) == (job, "paused")


def test_people_see_the_queue_and_change_it(start: Callable[[], LocalCluster], store: ObjectStore) -> None:
    cluster = start()
    endless = {**LONG, "training": {"steps": 100_000, "evaluate_every_steps": 100_001}}
    submit(cluster, make_run(store.url, "holds", elastic={"min": 2, "max": 2}, **endless))
    wait_for_commit(store, "holds", 1)
    submit(cluster, make_run(store.url, "waits", pool={"project": "sea"}, **endless))

    def tidepool(*command: str) -> str:
        line = [sys.executable, "-m", "tidepool.cli", *command]
        done = subprocess.run(line, env=cluster.environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    [waits] = until(lambda: json.loads(tidepool("queue", "--json"))["queue"], "nobody is in the queue")
    assert (waits["run"], waits["place"], waits["project"], waits["groups"], waits["min"]) == ("waits", 1, "sea", 0, 1)
    assert waits["waiting_since_s"] == pytest.approx(queued(store, "waits").submitted_s)
    assert waits["reason"]
    assert tidepool("runs", "set-priority", "waits", "7") == "Run waits has priority 7 now.\n"
    assert json.loads(tidepool("queue", "--json"))["queue"][0]["priority"] == 7
    shown = json.loads(tidepool("pool", "show", "--json"))
    assert [(run["run"], run["groups"]) for run in shown["runs"]] == [("holds", 2)]
    assert [(node["cpus"], node["free_cpus"]) for node in shown["nodes"]] == [(2, 0)]
    (snapshot := Path(str(store.url).removeprefix("file://")).parent / "snapshot.json").write_text(tidepool("pool", "snapshot"))
    assert "standard, priority 7," in tidepool("pool", "explain", str(snapshot))
    until(lambda: "default" in tidepool("pool", "usage"), "what is used is not written")


def test_after_the_loss_of_the_head_one_command_brings_the_runs_back(
    start: Callable[[], LocalCluster], store: ObjectStore, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEPOOL_POOL", "sea")  # the one that comes back is the same pool
    cluster = start()
    submit(cluster, make_run(store.url, "orphan", **LONG))
    wait_for_commit(store, "orphan", 3)
    end_abruptly(cluster)
    assert read_result(store, "orphan") is None
    LivePool(start().environment).start(store.url)
    assert bits(result(store, "orphan")) == bits(alone)


def test_an_error_of_the_run_s_own_is_not_tried_again(start: Callable[[], LocalCluster], store: ObjectStore) -> None:
    cluster = start()
    job = submit(
        cluster, make_run(store.url, "hot", training={"optimizer": {"learning_rate": 1e30, "clip_norm": None, "schedule": "constant"}})
    )
    until(lambda: read_queued(store, "hot") is not None and queued(store, "hot").state == "done", "the failure is not noted")
    assert queued(store, "hot").job == job
    assert "Lower the learning rate" in queued(store, "hot").reason
