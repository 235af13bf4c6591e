"""`tidepool runs`: what it tells of runs that finished, died, train now or never began, on a real store; the cluster is a function."""

import argparse
import asyncio
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import CONFIG, Killed, killer, make_run, prepare_dataset, train_here
from tidepool.checkpoint import claim_incarnation
from tidepool.cli import main
from tidepool.errors import ClusterError, RunError, StoreError, TidepoolError
from tidepool.run_commands import add_run_commands
from tidepool.run_queue import note_wanted, read_queued
from tidepool.specs import RunSpec, parse_spec
from tidepool.storage import ObjectStore, get_json, open_store
from tidepool.training.coordinator import Beginning, Coordinator
from tidepool.training.ledger import Ledger
from tidepool.training.live_runs import Cluster, Look
from tidepool.training.membership import Process, Report, WorkerId
from tidepool.training.pauses import note_paused, note_resumed, paused_step
from tidepool.training.quorum import Rules
from tidepool.training.quorum_events import Claimed

Captured = pytest.CaptureFixture[str]
Ask = Callable[..., str]
SMALL: dict[str, Any] = {"model": {"config": CONFIG}, "training": {"steps": 4}}
SPENT = {"useful_s": 60.0, "spent_s": {"step_s": 70.0, "start_s": 12.34, "commit_s": 8.0}, "quorums": 3, "recomputed_steps": 5}
NOWHERE = Look({}, "no cluster is known here")


def account() -> Mapping[str, Any]:
    """That of a run which began 100 s ago, took 60 s of undisturbed steps, and went through three quorums."""
    now = time.time()
    return Ledger(now, {"started_at": now - 100, **SPENT}).to_json(now)


async def status_now() -> dict[str, Any]:
    """What a coordinator says that has claimed incarnation 2 from step 2, and has heard of two workers that load."""
    coordinator = Coordinator()
    await coordinator.begin(Beginning(2, Claimed(2, None, 0), 2, 1, 3, 0, account(), Rules()))
    for group in (0, 1):
        process = Process(1234 + group, "node", "10.0.0.7", "/library")
        await coordinator.report(Report(WorkerId(group, 0), 1, 1, "10.0.0.7:99", session=2, process=process))
    status = await coordinator.status()
    assert coordinator._ticker is not None
    coordinator._ticker.cancel()
    return status


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    """A store with the runs `done` (finished), `killed` (died after the commit of step 2, claimed again) and `new` (claimed, no more)."""
    folder, url = tmp_path_factory.mktemp("trained"), f"memory://{uuid.uuid4().hex}"
    prepare_dataset(url, folder, letters="a")
    train_here(make_run(url, "done", publish={"model": "tides-model"}, **SMALL), account=account)
    with pytest.raises(Killed):
        train_here(make_run(url, "killed", **SMALL), killer(3), account=account)
    store = open_store(url)
    claim_incarnation(store, "killed", {})
    claim_incarnation(store, "new", {})
    return store


class FakeCluster:
    """Answers what it is given, and notes what it is asked for. A spec lets a run have four groups at most."""

    def __init__(self, seen: Look, asked: list[Any] | None) -> None:
        self._seen, self._asked = seen, asked if asked is not None else []

    def look(self) -> Look:
        return self._seen

    def resize(self, run: str, num_groups: int) -> int:
        self._asked.append((run, num_groups))
        return min(4, num_groups)

    def stop(self, run: str, pause: bool) -> int:
        if run.startswith("lost"):
            raise RunError(f"Run {run} is not being trained in this cluster")
        self._asked.append((run, pause))
        return 7

    def submit(self, spec: Mapping[str, Any]) -> str:
        self._asked.append(spec)
        return "job-1"


@pytest.fixture
def ask(capsys: Captured) -> Ask:
    """Runs a command on a store and what a cluster answers; returns what it prints."""

    def run(store: ObjectStore, *command: str, seen: Look = NOWHERE, asked: list[Any] | None = None) -> str:
        parser = argparse.ArgumentParser()
        add_run_commands(parser.add_subparsers(), lambda _: store, lambda: FakeCluster(seen, asked))
        options = parser.parse_args(command)
        options.run(options)
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


def fields(text: str) -> dict[str, str]:
    """The lines `key  value` of a text."""
    return {key: value for key, is_field, value in (line.strip().partition("  ") for line in text.splitlines()) if is_field}


# --- What there is ---------------------------------------------------------------------------------------------------


def test_list_tells_the_state_of_every_run_by_name(trained: ObjectStore, ask: Ask) -> None:
    lines = ask(trained, "list").splitlines()
    rows = [[cell for cell in line.split("  ") if cell] for line in lines[:4]]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells[0] == ["RUN", "STATE", "STEP", "COMMIT", "GROUPS", "GOODPUT", "PUBLISHED"]
    assert [row[:3] for row in cells[1:]] == [
        ["done", "finished", "4 of 4"],
        ["killed", "not running", "2 of 4"],
        ["new", "not running", "0"],
    ]
    assert cells[1][3].startswith("4, ")
    assert cells[1][3].endswith("s ago")
    assert cells[1][4:] == ["-", "60.0%", "tides-model@1"]
    assert cells[2][5:] == ["60.0%", "-"]
    assert lines[-1] == "Whether anything trains now was not asked: no cluster is known here."


def test_list_of_an_empty_store_says_how_a_run_begins(ask: Ask) -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    text = ask(store, "list")
    assert "No run has begun in this store yet" in text
    assert "python jobs/train.py jobs/train.yaml" in text
    assert json.loads(ask(store, "list", "--json"))["runs"] == []


def test_show_of_a_finished_run_has_its_result_and_where_the_time_went(trained: ObjectStore, ask: Ask) -> None:
    shown, document = fields(ask(trained, "show", "done")), get_json(trained, "runs/done/spec.json")
    result = get_json(trained, "runs/done/result.json")
    assert (shown["run"], shown["state"], shown["step"]) == ("done", "finished", "4 of 4")
    assert (shown["spec digest"], shown["dataset"]) == (document["spec_digest"], document["pins"]["dataset"])
    assert (shown["base"], shown["incarnations"]) == ("none: a new model", "1, the newest from the beginning")
    assert shown["goodput"] == "60.0% of 100 s"
    assert shown["the rest"] == "start 12 s, slow steps 10 s, other 9.7 s, commit 8.0 s"
    assert (shown["quorum changes"], shown["recomputed"]) == ("2", "5 steps")
    assert shown["held-out loss"] == f"{result['held_out_loss_before']:.6g} -> {result['held_out_loss_after']:.6g}"
    assert (shown["published"], shown["weights sha256"]) == ("tides-model@1", result["weights_sha256"])


def test_show_of_a_run_that_died_has_its_last_commit_and_its_account_up_to_there(trained: ObjectStore, ask: Ask) -> None:
    shown = fields(ask(trained, "show", "killed"))
    name = shown["commit"].rpartition(" ")[2]
    assert (shown["state"], shown["step"]) == ("not running", "2 of 4")
    assert shown["commit"].startswith("step 2, ")
    assert shown["incarnations"] == f"2, the newest from commit {name}"
    assert shown["goodput"] == "60.0% of 100 s, up to that commit"
    assert "published" not in shown


def test_show_of_a_run_that_only_began_says_so(trained: ObjectStore, ask: Ask) -> None:
    shown = fields(ask(trained, "show", "new"))
    assert (shown["state"], shown["step"], shown["commit"], shown["goodput"]) == ("not running", "0", "none yet", "-")
    assert shown["spec digest"] == "- (no worker has begun yet)"


# --- What trains now -------------------------------------------------------------------------------------------------


def test_a_run_that_trains_is_told_with_its_workers(trained: ObjectStore, ask: Ask) -> None:
    status = asyncio.run(status_now())
    quorum = {"step": 3, "quorum": "0.4", "is_stepping": True, "groups": [0, 1], "wanted_groups": 3}
    stepping = status | quorum | {"workers": [one | {"rank": 1 - one["group"], "phase": "step", "step": 3} for one in status["workers"]]}
    stepping["workers"][1]["score"] = 0.63
    seen = Look({"killed": stepping, "of another store": None})
    text = ask(trained, "show", "killed", seen=seen)
    shown = fields(text)
    assert (shown["state"], shown["step"]) == ("training", "3 of 4")
    assert (shown["quorum"], shown["replica groups"]) == ("0.4, taking steps", "0, 1 (2 of 3 wanted)")
    assert shown["goodput"] == "60.0% of 100 s"
    assert [line.split() for line in text.splitlines()[-3:]] == [
        ["GROUP", "RANK", "NODE", "PID", "PHASE", "STEP", "SCORE"],
        ["0", "1", "10.0.0.7", "1234", "step", "3", "-"],
        ["1", "0", "10.0.0.7", "1235", "step", "3", "0.63"],
    ]
    row = ask(trained, "list", seen=seen).splitlines()[2]
    assert row.startswith("killed  training")
    assert "2 of 3" in row


def test_a_run_whose_workers_load_and_one_that_does_not_answer_are_training_too(trained: ObjectStore, ask: Ask) -> None:
    seen = Look({"killed": asyncio.run(status_now()), "new": None})
    text = ask(trained, "show", "killed", seen=seen)
    shown = fields(text)
    assert (shown["state"], shown["step"], shown["quorum"]) == ("training", "2 of 4", "none yet")
    assert shown["replica groups"] == "none (0 of 3 wanted)"
    assert text.splitlines()[-1].split() == ["1", "-", "10.0.0.7", "1235", "load", "0", "-"]
    assert fields(ask(trained, "show", "new", seen=seen))["state"] == "training"
    assert [row.split()[:2] for row in ask(trained, "list", seen=seen).splitlines()[2:]] == [["killed", "training"], ["new", "training"]]


# --- As JSON ---------------------------------------------------------------------------------------------------------

SUMMARY = {"name", "state", "step", "steps", "commit", "groups", "wanted_groups", "goodput", "published"}
DETAILS = SUMMARY | {"script", "spec_digest", "pins", "incarnations", "account", "result", "live"}


def test_json_has_the_same_keys_for_every_run_and_nothing_else_beside_it(trained: ObjectStore, ask: Ask) -> None:
    seen = Look({"killed": asyncio.run(status_now())})
    listed = json.loads(ask(trained, "list", "--json", seen=seen))
    assert (listed["store"], listed["cluster"]) == (trained.url, {"asked": True, "problem": None})
    assert [run["name"] for run in listed["runs"]] == ["done", "killed", "new"]
    assert all(run.keys() == SUMMARY for run in listed["runs"])
    shown = {name: json.loads(ask(trained, "show", name, "--json", seen=seen))["run"] for name in ("done", "killed", "new")}
    assert all(run.keys() == DETAILS for run in shown.values())
    assert [{key: shown[run["name"]][key] for key in SUMMARY - {"commit"}} for run in listed["runs"]] == [
        {key: run[key] for key in SUMMARY - {"commit"}} for run in listed["runs"]
    ]
    result = get_json(trained, "runs/done/result.json")
    assert shown["done"]["result"] == {key: result[key] for key in shown["done"]["result"]}
    assert shown["done"]["account"]["rest"] == result["rest"]
    assert shown["done"]["commit"].keys() == {"name", "step", "incarnation", "committed_at", "age_s"}
    assert shown["killed"]["incarnations"] == [{"number": 1, "base": None}, {"number": 2, "base": shown["killed"]["commit"]["name"]}]
    assert [worker["pid"] for worker in shown["killed"]["live"]["workers"]] == [1234, 1235]
    assert (shown["new"]["account"], shown["new"]["result"], shown["new"]["live"]) == (None, None, None)


# --- What cannot be told ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [("kiled", "did you mean killed?"), ("zzz", "there are: done, killed, new."), ("done/log", "did you mean done?")],
)
def test_an_unknown_run_is_told_with_near_names(trained: ObjectStore, ask: Ask, name: str, hint: str) -> None:
    with pytest.raises(RunError, match=f"No run '{name}' in memory://") as refused:
        ask(trained, "show", name)
    assert str(refused.value).endswith(hint)


def test_a_damaged_document_is_told_by_its_key(ask: Ask) -> None:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    store.put_if_absent("runs/torn/result.json", b'{"steps"')
    with pytest.raises(StoreError, match=r"runs/torn/result.json in memory://\w+ is damaged"):
        ask(store, "list")


def test_the_command_refuses_in_one_line_and_prints_nothing_else(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("TIDEPOOL_STORE", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    for command, message in (
        (["list", "--json"], "Which store? Give --store"),
        (["show", "tides", "--json", "--store", tmp_path.as_uri()], "there are: none yet."),
        (["show", "../tides", "--store", tmp_path.as_uri()], "No run '../tides'"),
    ):
        assert main(["runs", *command]) == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("error: ")
        assert message in err


def test_nobody_is_asked_where_no_cluster_is_known_or_listens() -> None:
    assert "set RAY_ADDRESS" in Cluster({}).look().problem
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: a connection is refused
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert Cluster({**os.environ, "RAY_ADDRESS": address}).look() == Look({}, f"nothing answers at {address}")


def test_what_ray_says_of_an_address_that_it_cannot_use_is_the_problem() -> None:
    seen = Cluster({**os.environ, "RAY_ADDRESS": "nowhere"}).look()
    assert seen.runs == {}
    assert seen.problem.startswith("Ray could not connect to nowhere (ValueError: ")


# --- What is asked for ------------------------------------------------------------------------------------------------


def test_a_run_is_asked_for_another_size_a_pause_and_an_end(trained: ObjectStore, ask: Ask) -> None:
    asked: list[Any] = []
    assert "Run killed is to have 1 replica group." in ask(trained, "resize", "killed", "1", asked=asked)
    told = ask(trained, "resize", "killed", "9", asked=asked)
    assert "is to have 4 replica groups (its spec's `elastic` allows no other number near 9)" in told
    assert "now at step 7, commits at its next step and leaves the cluster" in ask(trained, "pause", "killed", asked=asked)
    assert "submitting it again continues it" in ask(trained, "stop", "killed", asked=asked)
    assert asked == [("killed", 1), ("killed", 9), ("killed", True), ("killed", False)]
    with pytest.raises(RunError, match="at least one replica group"):
        ask(trained, "resize", "killed", "0")


def test_a_run_that_does_not_train_is_submitted_as_it_was_resolved(trained: ObjectStore, ask: Ask) -> None:
    asked: list[Any] = []
    assert "Run killed goes on as job job-1" in ask(trained, "resume", "killed", seen=Look({}), asked=asked)
    [spec] = asked
    assert parse_spec(spec, RunSpec) == make_run(trained.url, "killed", **SMALL)


def test_a_run_without_a_driver_is_called_off_and_resumed_by_the_spec_of_the_queue(store_url: str, ask: Ask) -> None:
    store, asked = open_store(store_url), list[Any]()
    spec = make_run(store.url, "lost", **SMALL)
    note_wanted(store, spec, 1)
    assert "Run lost has no driver now, and the pool starts none any more" in ask(store, "stop", "lost", seen=Look({}))
    queued = read_queued(store, "lost")
    assert queued is not None
    assert (queued.state, queued.reason) == ("done", "stopped")
    with pytest.raises(RunError, match="not being trained in this cluster"):
        ask(store, "stop", "lost", seen=Look({}))
    assert "Run lost goes on as job job-1" in ask(store, "resume", "lost", seen=Look({}), asked=asked)
    assert [parse_spec(one, RunSpec) for one in asked] == [spec]


def test_a_run_that_refuses_is_not_called_off(store_url: str, ask: Ask) -> None:
    store = open_store(store_url)
    note_wanted(store, make_run(store.url, "lost", **SMALL), 1)
    with pytest.raises(RunError, match="not being trained in this cluster"):
        ask(store, "pause", "lost", seen=Look({"lost": None}))
    queued = read_queued(store, "lost")
    assert queued is not None
    assert queued.state == "wanted"


@pytest.mark.parametrize(
    ("run", "seen", "message"),
    [
        ("done", Look({}), "Run done is finished"),
        ("new", Look({}), "stopped before its first worker had begun: submit its spec again"),
        ("kiled", Look({}), "did you mean killed"),
        ("killed", Look({"killed": None}), "is being trained in this cluster already"),
        ("killed", NOWHERE, "cannot be resumed: no cluster is known here"),
    ],
)
def test_what_cannot_be_resumed_is_told_why(trained: ObjectStore, ask: Ask, run: str, seen: Look, message: str) -> None:
    with pytest.raises(TidepoolError, match=message):
        ask(trained, "resume", run, seen=seen)


def test_a_paused_run_is_told_as_such_until_it_is_trained_again(trained: ObjectStore, ask: Ask) -> None:
    def state() -> str:
        return str(json.loads(ask(trained, "show", "killed", "--json"))["run"]["state"])

    assert state() == "not running"
    note_resumed(trained, "killed")
    assert paused_step(trained, "killed") is None
    note_paused(trained, "killed", 2)
    assert (state(), paused_step(trained, "killed")) == ("paused", 2)
    note_resumed(trained, "killed")
    assert state() == "not running"


def test_asking_where_no_cluster_is_says_so() -> None:
    for ask_it in (lambda one: one.resize("r", 2), lambda one: one.stop("r", pause=True)):
        with pytest.raises(ClusterError, match="Run r cannot be asked: no cluster is known here; set RAY_ADDRESS"):
            ask_it(Cluster({}))


def test_what_a_run_refuses_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "_call", lambda *_: "The run is being started: ask again in a moment.")
    with pytest.raises(RunError, match="Run r refused: The run is being started: ask again in a moment"):
        Cluster({}).stop("r", pause=True)
