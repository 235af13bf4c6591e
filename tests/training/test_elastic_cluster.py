"""A run as a quorum of replica groups on a real Ray cluster: real signals, and the bits of a run that was left alone.

Each test trains the same run. Its workers wait at step 5 until so many groups as the test wants have loaded (see `gather`),
so that what happens then does not depend on how long a busy machine takes to start processes.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from tests.training.conftest import CONFIG, check_exactly_once, make_run, prepare_dataset, publish_base, train_here
from tests.training.jobs import Job, Status, bits, claims, coordinator
from tests.training.nodes import ADDRESS, GRACE_S, Node, second_node
from tidepool import local_cluster
from tidepool.checkpoint import RunLog, read_manifest, verify
from tidepool.data import find_dataset
from tidepool.local_cluster import LocalCluster
from tidepool.messages import Resize
from tidepool.specs import RunSpec
from tidepool.storage import ObjectStore, open_store
from tidepool.training.outcome import read_result
from tidepool.training.pauses import paused_step
from tidepool.training.replica_groups import ReplicaGroups
from tidepool.training.task import Pins, Task

pytestmark = [pytest.mark.elastic, pytest.mark.chaos, pytest.mark.timeout(600)]
STEPS = 150
TRAINING: dict[str, Any] = {"steps": STEPS, "num_shards": 6, "global_batch_size": 12, "evaluate_every_steps": 50}
LOOP = "tidepool.training.loop:StepLoop"
GATE: dict[str, Any] = {"function": f"{LOOP}._compute", "step": 5, "do": "wait", "always": True}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
DROPOUT: dict[str, dict[str, Any]] = {
    "llama": CONFIG | {"attention_dropout": 0.2},
    "gpt2": GPT2 | dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.2),
}


@pytest.fixture(scope="module")
def store(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    """The cluster's store, with the dataset `tides` and the model `base`."""
    folder = tmp_path_factory.mktemp("prepared")
    publish_base(cluster.store_url, prepare_dataset(cluster.store_url, folder), folder)
    return open_store(cluster.store_url)


@pytest.fixture(scope="module")
def undisturbed(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The bits of the run that one worker computes alone, in this process."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TIDEPOOL_CACHE", str(tmp_path_factory.mktemp("cache")))
        result = train_here(elastic_run(store, "undisturbed")).result
    assert result is not None
    return bits(dict(result))


def elastic_run(store: ObjectStore, run: str, **changes: Any) -> RunSpec:
    changes = {"elastic": {"min": 1, "max": 3}, "checkpoint": {"every_steps": 20, "keep": 3, "max_lag_s": 300}} | changes
    return make_run(store.url, run, **changes | {"training": TRAINING | changes.get("training", {})})


Start = Callable[..., Job]


@pytest.fixture
def start(cluster: LocalCluster, store: ObjectStore, tmp_path: Path) -> Iterator[Start]:
    """Starts jobs with faults; those that still run at the end of the test are killed."""
    jobs: list[Job] = []

    def start(run: str, *faults: dict[str, Any], **changes: Any) -> Job:
        jobs.append(Job(cluster, elastic_run(store, run, **changes), tmp_path, faults=[GATE, *faults]))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
            job.wait()
            wait_until(lambda: states_of_placement_groups() <= {"REMOVED"})  # or the next test finds less room than it counts on


def gather(job: Job, num_workers: int = 3, gate: int = GATE["step"]) -> Status:
    """Let the run go on once so many workers have loaded; returns its status when they take steps together."""

    def has_loaded(worker: dict[str, Any]) -> bool:
        return worker["phase"] == "wait" or worker["step"] == gate

    def is_past_it(worker: dict[str, Any]) -> bool:
        return worker["rank"] is not None and worker["step"] > gate

    job.wait_for_status(lambda status: sum(map(has_loaded, status["workers"])) == num_workers)
    job.open_gate(gate)
    return job.wait_for_status(lambda status: status["is_stepping"] and sum(map(is_past_it, status["workers"])) == num_workers)


def without(*groups: int) -> Callable[[Status], bool]:
    """The run takes steps, and none of these groups is in its quorum."""
    return lambda status: status["is_stepping"] and not set(groups) & set(status["groups"])


def survived_by(*groups: int, killed: int) -> Callable[[Status], bool]:
    """The run takes steps with these groups (one that a busy machine held up may come back first) and without the killed one."""
    return lambda status: status["is_stepping"] and set(groups) <= set(status["groups"]) and killed not in status["groups"]


def pids(status: Status) -> dict[int, int]:
    """The process of each group (of one worker) in the quorum."""
    return {worker["group"]: worker["pid"] for worker in status["workers"] if worker["group"] in status["groups"]}


def check_same(job: Job, store: ObjectStore, undisturbed: list[str], num_claims: int = 1) -> dict[str, Any]:
    """The run ends with the bits of the undisturbed one, read each sample once, and went back to a checkpoint so many times less one."""
    result = job.result(store)
    assert bits(result) == undisturbed, job.output
    check_exactly_once(store, job.spec)
    assert len(claims(store, job.spec.run)) == num_claims, job.output
    return result


# --- Failures -----------------------------------------------------------------------------------------------------------


def test_a_killed_worker_costs_the_step_in_flight_and_nobody_else_is_restarted(
    start: Start, store: ObjectStore, undisturbed: list[str]
) -> None:
    job = start("kill")
    before = pids(gather(job))
    os.kill(before[2], signal.SIGKILL)
    after = pids(job.wait_for_status(survived_by(1, 3, killed=2)))
    assert {group: after[group] for group in (1, 3)} == {group: before[group] for group in (1, 3)}
    result = check_same(job, store, undisturbed)
    assert result["recomputed_steps"] == 0
    assert 0 < result["goodput"] <= 1
    assert result["quorum_changes"] >= 2


def test_a_stopped_worker_is_excluded_and_put_back_in_line_when_it_comes_back(
    start: Start, store: ObjectStore, undisturbed: list[str]
) -> None:
    job = start("hang", training={"steps": STEPS})
    before = pids(gather(job))
    os.kill(before[1], signal.SIGSTOP)
    job.wait_for_status(without(1))
    os.kill(before[1], signal.SIGCONT)
    back = job.wait_for_status(lambda status: status["is_stepping"] and 1 in status["groups"])
    assert pids(back)[1] == before[1], "the process that was stopped"
    assert check_same(job, store, undisturbed)["recomputed_steps"] == 0


def test_a_worker_that_stays_stopped_is_killed(start: Start, store: ObjectStore, undisturbed: list[str]) -> None:
    job = start("hang-for-ever", {"function": f"{LOOP}._apply", "group": 2, "step": 20, "do": "stop"})
    stopped = pids(gather(job))[2]
    psutil.wait_procs([psutil.Process(stopped)], timeout=120)
    assert not psutil.pid_exists(stopped)
    check_same(job, store, undisturbed)


def test_a_whole_group_of_two_workers_dies_at_once(start: Start, store: ObjectStore, undisturbed: list[str]) -> None:
    job = start("group", workers={"num_workers": 2}, elastic={"min": 1, "max": 2})
    before = gather(job, 4)
    for worker in before["workers"]:
        if worker["group"] == 2:
            os.kill(worker["pid"], signal.SIGKILL)
    after = job.wait_for_status(without(2))
    survivors = [worker["pid"] for worker in before["workers"] if worker["group"] == 1]
    assert [worker["pid"] for worker in after["workers"] if worker["group"] == 1] == survivors
    assert check_same(job, store, undisturbed)["recomputed_steps"] == 0


DEATHS: dict[str, list[dict[str, Any]]] = {
    "during a join, of the one that joins": [{"function": f"{LOOP}.share", "when": "args[2].rank != args[1]", "do": "kill"}],
    "during a join, of the one that gives its state": [{"function": f"{LOOP}.share", "when": "args[2].rank == args[1]", "do": "kill"}],
    "during a commit": [{"function": "tidepool.checkpoint.protocol:Checkpoints._append", "step": 40, "do": "kill"}],
    "after a commit": [{"function": "tidepool.checkpoint.protocol:Checkpoints.retain", "step": 40, "do": "kill"}],
    "inside the optimizer step": [{"function": "torch.optim:AdamW.step", "step": 30, "do": "kill"}],
    "during another recovery": [
        {"function": f"{LOOP}._compute", "step": 30, "do": "kill"},
        {"function": "tidepool.training.member:Member.connect", "step": 30, "do": "kill"},
    ],
    "while publishing": [{"function": "tidepool.training.worker:_finish", "do": "kill"}],
}


@pytest.mark.parametrize("where", DEATHS)
def test_death(start: Start, store: ObjectStore, undisturbed: list[str], where: str) -> None:
    job = start(where.replace(" ", "-").replace(",", ""), *(dict(fault) for fault in DEATHS[where]))
    job.wait_for_status(lambda status: len(status["workers"]) == 3)
    job.open_gate()
    # Where the one that dies is the only one that holds the state, the run goes back to its beginning.
    is_last_holder = where == "during a join, of the one that gives its state"
    result = check_same(job, store, undisturbed)
    assert job.num_faults_done() == len(DEATHS[where]), job.output
    assert (result["recomputed_steps"] > 0) == is_last_holder


def test_death_of_all_who_hold_the_newest_step(start: Start, store: ObjectStore, undisturbed: list[str]) -> None:
    """A worker that was stopped holds an older step, newer than any checkpoint: the others' steps are computed again, from its state."""
    job = start("holders", checkpoint={"every_steps": 1000})
    before = pids(gather(job))
    os.kill(before[3], signal.SIGSTOP)
    newer = job.wait_for_status(lambda status: without(3)(status) and status["step"] > GATE["step"] + 10)
    for group in (1, 2):
        os.kill(before[group], signal.SIGKILL)
    os.kill(before[3], signal.SIGCONT)
    alone = job.wait_for_status(lambda status: status["is_stepping"] and 3 in status["groups"])
    assert pids(alone)[3] == before[3]
    result = check_same(job, store, undisturbed)
    assert 0 < result["recomputed_steps"] <= newer["step"] + 10


def test_death_of_everybody_goes_back_to_the_newest_checkpoint(start: Start, store: ObjectStore, undisturbed: list[str]) -> None:
    job = start("everybody")
    gather(job)
    status = job.wait_for_status(lambda status: status["committed"] >= 20)
    for pid in pids(status).values():
        os.kill(pid, signal.SIGKILL)
    result = check_same(job, store, undisturbed, num_claims=2)
    assert claims(store, "everybody")[1].base is not None
    assert result["recomputed_steps"] <= 40


def test_a_stuck_main_thread_is_found_though_it_is_heard_of(start: Start, store: ObjectStore, undisturbed: list[str]) -> None:
    job = start("stuck", {"function": f"{LOOP}._compute", "group": 2, "step": 30, "do": "hang"})
    stuck = pids(gather(job))[2]
    psutil.wait_procs([psutil.Process(stuck)], timeout=180)
    assert not psutil.pid_exists(stuck)
    check_same(job, store, undisturbed)
    assert "has made no progress in step" in job.output


def test_a_deterministic_error_ends_the_run_with_its_traceback(start: Start) -> None:
    job = start("bug", {"function": f"{LOOP}._check_finite", "step": 30, "do": "raise", "always": True}, elastic={"min": 1, "max": 2})
    gather(job, 2)
    assert job.wait() == 1
    error = job.output[job.output.index("error: ") :]
    assert "failed twice in the same way at step 31" in error
    assert "ValueError: a fault of the test at step 30" in error
    assert "faulty_job.py" in error, "the traceback"


def test_death_of_the_quorum_actor_stops_nobody(start: Start, store: ObjectStore, undisturbed: list[str]) -> None:
    job = start("actor")
    before = gather(job)
    actor = coordinator("actor")
    pid = ray.get(actor.pid.remote())
    os.kill(pid, signal.SIGKILL)
    # A member of which the new one hears late is left out of its first quorum, and taken into the next as it is.
    after = job.wait_for_status(
        lambda status: status["is_stepping"] and status["step"] > before["step"] and status["groups"] == before["groups"]
    )
    assert ray.get(coordinator("actor").pid.remote()) != pid
    assert pids(after) == pids(before)
    assert check_same(job, store, undisturbed)["recomputed_steps"] == 0


def test_death_of_the_driver_is_met_by_submitting_again(start: Start, store: ObjectStore, undisturbed: list[str]) -> None:
    job = start("driver")
    status = gather(job)
    job.wait_for_status(lambda status: status["committed"] >= 20)
    job.process.kill()
    job.process.wait()
    psutil.wait_procs([psutil.Process(pid) for pid in pids(status).values() if psutil.pid_exists(pid)], timeout=60)
    again = start("driver")
    again.open_gate()
    check_same(again, store, undisturbed, num_claims=2)


def test_death_of_a_node(cluster: LocalCluster, start: Start, store: ObjectStore, undisturbed: list[str]) -> None:
    with second_node(cluster, num_cpus=2) as node:
        job = start("node", workers={"cpus_per_worker": 2})
        before = gather(job)
        lost = next(worker["group"] for worker in before["workers"] if worker["node_ip"] == ADDRESS)
        node.kill()
        after = job.wait_for_status(without(lost))
        survivors = {group: pid for group, pid in pids(before).items() if group != lost}
        assert {group: pids(after)[group] for group in survivors} == survivors
        assert check_same(job, store, undisturbed)["recomputed_steps"] == 0


def test_death_of_the_head_is_met_by_submitting_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On clusters of its own, one after the other, that share a store."""
    url = (tmp_path / "store").as_uri()
    publish_base(url, prepare_dataset(url, tmp_path), tmp_path)
    alone = train_here(elastic_run(open_store(url), "alone")).result
    assert alone is not None
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    store = open_store(url)
    with one_cluster(url, tmp_path / "first.log") as first:
        job = Job(first, elastic_run(store, "head"), tmp_path)
        wait_until(lambda: any(commit.step >= 20 for commit in RunLog(store, "head").visible_commits()))
        Node(popen_of(first), tmp_path).kill()
        job.process.kill()
        job.wait()
    with one_cluster(url, tmp_path / "second.log") as second:
        check_same(Job(second, elastic_run(store, "head"), tmp_path), store, bits(dict(alone)), num_claims=2)


@contextmanager
def one_cluster(url: str, log: Path) -> Iterator[LocalCluster]:
    running = local_cluster.start(url, num_cpus=2, log=log)
    try:
        yield running
    finally:
        local_cluster.stop(running)


def popen_of(cluster: LocalCluster) -> "subprocess.Popen[bytes]":
    return next(process for process in local_cluster._started if process.pid == cluster.pid)


# --- Growing and shrinking ------------------------------------------------------------------------------------------------


def test_groups_come_and_go_at_step_boundaries(start: Start, store: ObjectStore, undisturbed: list[str]) -> None:
    job = start("resize", elastic={"min": 1, "max": 3}, training={"steps": STEPS})
    before = pids(gather(job))
    ray.get(coordinator("resize").ask.remote(Resize("resize", 2)))
    two = job.wait_for_status(lambda status: status["is_stepping"] and status["groups"] == [1, 2])
    assert pids(two) == {group: before[group] for group in (1, 2)}, "the newest leave first"
    ray.get(coordinator("resize").ask.remote(Resize("resize", 1)))
    alone = job.wait_for_status(lambda status: status["is_stepping"] and status["groups"] == [1])
    assert pids(alone) == {1: before[1]}
    ray.get(coordinator("resize").ask.remote(Resize("resize", 2)))
    result = check_same(job, store, undisturbed)
    assert result["recomputed_steps"] == 0
    assert "failed at step" not in job.output, "leaving is no failure"  # Ray Train may say so of a worker that ends before its controller


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", DROPOUT)
def test_no_bit_depends_on_a_history_of_4_1_3_and_2_groups(
    start: Start, store: ObjectStore, tmp_path: Path, family: str, kind: str
) -> None:
    model: dict[str, Any] = {"config": DROPOUT[family]}
    if kind == "lora":
        info = find_dataset(store, "tides")
        publish_base(store.url, info, tmp_path, name=f"base-{family}", config=DROPOUT[family])
        model = {"base": f"base-{family}", "lora": {"rank": 4, "alpha": 8, "dropout": 0.3}}
    run, shards = f"history-{family}-{kind}", {"num_shards": 8, "global_batch_size": 16}  # 4 groups are faster than 3, and 3 than 2
    changes: dict[str, Any] = {"model": model, "elastic": {"min": 1, "max": 4}, "training": shards}
    alone = train_here(elastic_run(store, f"{run}-alone", **changes)).result
    assert alone is not None
    second_gate = GATE | {"step": 40}
    job = start(run, second_gate, **changes)
    four = pids(gather(job, 4))
    assert len(four) == 4
    for group in (1, 3, 4):
        os.kill(four[group], signal.SIGKILL)
    job.wait_for_status(without(1, 3, 4))
    ray.get(coordinator(run).ask.remote(Resize(run, 1)))
    job.wait_for_status(lambda status: status["groups"] == [2] and status["step"] == second_gate["step"])
    ray.get(coordinator(run).ask.remote(Resize(run, 3)))
    three = pids(gather(job, 3, second_gate["step"]))
    assert len(three) == 3
    assert three[2] == four[2]
    os.kill(three[2], signal.SIGKILL)
    two = pids(job.wait_for_status(lambda status: without(2)(status) and len(status["groups"]) == 2))
    ray.get(coordinator(run).ask.remote(Resize(run, 2)))
    assert set(two.values()) < set(three.values())
    result = check_same(job, store, bits(dict(alone)))
    assert result["recomputed_steps"] == 0


# --- Checkpoints ----------------------------------------------------------------------------------------------------------


def test_the_members_bring_their_parts_of_a_large_state_into_one_commit(start: Start, store: ObjectStore) -> None:
    large = CONFIG | {"hidden_size": 256, "intermediate_size": 1536, "num_hidden_layers": 8}
    changes: dict[str, Any] = {"model": {"config": large}, "training": {"steps": 10}, "checkpoint": {"every_steps": 4, "keep": 9}}
    alone = train_here(elastic_run(store, "large-alone", **changes)).result
    assert alone is not None
    job = start("large", **changes)
    gather(job)
    check_same(job, store, bits(dict(alone)))
    together = next(commit for commit in RunLog(store, "large").visible_commits() if commit.step == 8)
    names = [entry["name"] for entry in read_manifest(store, "large", together)["objects"]]
    assert {"optimizer-0-of-3.safetensors", "optimizer-1-of-3.safetensors", "optimizer-2-of-3.safetensors"} < set(names)
    verify(store, "large", together)


# --- Operations -----------------------------------------------------------------------------------------------------------


def test_a_group_leaves_in_the_middle_of_a_long_step(start: Start, store: ObjectStore, undisturbed: list[str]) -> None:
    long_step = GATE | {"step": 40}
    free = idle_cpus()
    job = start("long-step", long_step)
    before = pids(gather(job))
    job.wait_for_status(lambda status: all(worker["step"] == long_step["step"] for worker in status["workers"]))
    runs(job, "resize", "1")
    asked_at = time.monotonic()
    wait_for_cpus(free - 1)
    print(f"two groups were gone {time.monotonic() - asked_at:.1f} s after they were asked to leave")
    alone = job.wait_for_status(lambda status: status["is_stepping"] and status["groups"] == [1])
    assert (pids(alone), alone["step"]) == ({1: before[1]}, long_step["step"])
    job.open_gate(long_step["step"])
    assert check_same(job, store, undisturbed)["recomputed_steps"] == 0
    assert "failed at step" not in job.output, "leaving is no failure"  # Ray Train may say so of a worker that ends before its controller


def test_a_paused_run_frees_all_it_holds_and_goes_on_in_another_cluster(
    start: Start, store: ObjectStore, undisturbed: list[str], tmp_path: Path
) -> None:
    free = idle_cpus()
    job = start("moved", GATE | {"step": 40}, checkpoint={"every_steps": 1000})
    gather(job)
    job.wait_for_status(lambda status: all(worker["step"] == 40 for worker in status["workers"]))
    runs(job, "pause")
    asked_at = time.monotonic()
    wait_for_cpus(free)
    print(f"all were gone {time.monotonic() - asked_at:.1f} s after the pause was asked for, in the middle of a long step")
    assert job.wait() == 0, job.output
    assert "`tidepool runs resume moved` continues it" in job.output.splitlines()[-1]
    assert paused_step(store, "moved") == 40
    assert [commit.step for commit in RunLog(store, "moved").visible_commits()] == [40]
    job.open_gate(40)
    with one_cluster(store.url, tmp_path / "other.log") as other:
        runs(job, "resume", environment=other.environment)
        wait_until(lambda: read_result(store, "moved") is not None)
    result = read_result(store, "moved")
    assert result is not None
    assert bits(result) == undisturbed
    check_exactly_once(store, job.spec)
    assert result["recomputed_steps"] == 0
    assert paused_step(store, "moved") is None


def test_a_node_that_is_drained_is_left_and_the_state_is_committed_if_nobody_stays(
    cluster: LocalCluster, start: Start, store: ObjectStore, undisturbed: list[str]
) -> None:
    only_there = {"workers": {"cpus_per_worker": 5}, "elastic": {"min": 1, "max": 1}, "checkpoint": {"every_steps": 1000}}
    with second_node(cluster, num_cpus=5) as node:
        job = start("drained", GATE | {"step": 40}, **only_there)
        status = gather(job, 1)
        assert status["workers"][0]["node_ip"] == ADDRESS
        node.drain(cluster, status["workers"][0]["node_id"])
        job.open_gate(40)
        wait_until(lambda: bool(RunLog(store, "drained").visible_commits()))
        newest = job.wait_for_status(lambda status: not status["is_stepping"])["step"]
        assert [commit.step for commit in RunLog(store, "drained").visible_commits()] == [newest]
    runs(job, "stop")  # nothing else has room for it
    assert job.wait() == 143, job.output
    again = start("drained", workers={"cpus_per_worker": 1})
    again.open_gate()
    assert check_same(again, store, undisturbed, num_claims=2)["recomputed_steps"] == 0


def test_a_node_that_gets_sigterm_is_left_before_it_ends(
    cluster: LocalCluster, start: Start, store: ObjectStore, undisturbed: list[str]
) -> None:
    with second_node(cluster, num_cpus=5, notice=True) as node:
        job = start("ended", GATE | {"step": 40}, workers={"cpus_per_worker": 2}, elastic={"min": 1, "max": 3})
        status = gather(job, 3)
        there = [worker["group"] for worker in status["workers"] if worker["node_ip"] == ADDRESS]
        assert there
        job.wait_for_status(lambda status: all(worker["step"] == 40 for worker in status["workers"]))
        node.process.terminate()
        asked_at = time.monotonic()
        assert node.process.wait(2 * GRACE_S) == 0
        print(f"the node had ended {time.monotonic() - asked_at:.1f} s after SIGTERM")
        left = job.wait_for_status(without(*there))
        assert left["step"] == 40
        job.open_gate(40)
        assert check_same(job, store, undisturbed)["recomputed_steps"] == 0
        assert "is dead" not in job.output


def runs(job: Job, command: str, *arguments: str, environment: Mapping[str, str] = os.environ) -> None:
    """`tidepool runs COMMAND` for the run of a job."""
    cli = [sys.executable, "-m", "tidepool.cli", "runs", command, job.spec.run, *arguments]
    store = ["--store", job.spec.store] if command == "resume" else []
    subprocess.run([*cli, *store], env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True, timeout=120)


def test_nothing_is_left_of_a_run_and_nothing_pends(start: Start, store: ObjectStore) -> None:
    free = idle_cpus()
    job = start("pending", elastic={"min": 1, "max": 6}, training={"num_shards": 6})
    job.wait_for_status(lambda status: len(status["workers"]) == 3)
    job.open_gate()
    job.result(store)
    job.wait()
    wait_for_cpus(free)


def test_ending_a_launcher_frees_what_its_group_holds_and_what_it_waits_for(store: ObjectStore) -> None:
    """At the worst moments: Ray Train has a placement group, and no worker in it yet."""
    free, here = idle_cpus(), ((ray.get_runtime_context().get_node_id(), 1),)
    held = replica_groups(elastic_run(store, "held"))
    held.start("grant", here)
    wait_for_cpus(free - 1)
    held.end(1)
    wait_until(lambda: held.wait(0.1) == [] and ray.available_resources()["CPU"] == free)
    pending = replica_groups(elastic_run(store, "pending-group", workers={"cpus_per_worker": 1000}))
    pending.start("grant", here)
    wait_until(lambda: "PENDING" in states_of_placement_groups())
    pending.end(1)
    wait_until(lambda: pending.wait(0.1) == [] and states_of_placement_groups() <= {"REMOVED"})


def replica_groups(spec: RunSpec) -> ReplicaGroups:
    """Groups whose workers only wait."""

    def idle(_: Mapping[str, Any]) -> None:
        threading.Event().wait()

    return ReplicaGroups(idle, Task(spec, Pins("tides", None, None), 1))


def states_of_placement_groups() -> set[str]:
    return {group["state"] for group in ray.util.placement_group_table().values()}


def idle_cpus() -> float:
    """The CPUs of the cluster, once nobody holds any: a run that has just ended may for a moment."""
    num = ray.cluster_resources()["CPU"]
    wait_for_cpus(num)
    return num


def wait_for_cpus(free: float) -> None:
    wait_until(lambda: ray.available_resources().get("CPU", 0) == free)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, (ray.available_resources(), ray.util.placement_group_table())
        time.sleep(0.1)
