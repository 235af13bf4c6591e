"""`tidepool queue`, `tidepool runs set-priority` and `tidepool pool`: what they tell and keep; the arbiter is an object that answers."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tidepool import cli
from tidepool.cli import main
from tidepool.errors import ClusterError
from tidepool.messages import Node, Quota, Snapshot
from tidepool.pool.live_pool import LivePool
from tidepool.pool.quotas import read_quotas
from tidepool.pool.recording import snapshot_to_json
from tidepool.pool.usage_log import Holding, UsageLog
from tidepool.run_queue import note_wanted, read_priority
from tidepool.specs import RunSpec, parse_spec
from tidepool.storage import open_store

Captured = pytest.CaptureFixture[str]
WAITS = {"run": "big", "place": 1, "project": "sea", "tier": "premium", "priority": 3, "groups": 0, "min": 2, "max": 8, "reason": "no room"}
HOLDS = {"run": "small", "place": None, "project": "lake", "tier": "basic", "priority": 0, "groups": 3, "min": 1, "max": 4, "reason": ""}
NODES = [
    {"name": "n0", "kind": "H100", "gpus": 8, "cpus": 64, "free_gpus": 2, "free_cpus": 16, "quarantined": ""},
    {"name": "n1", "kind": "H100", "gpus": 8, "cpus": 64, "free_gpus": 8, "free_cpus": 64, "quarantined": "disk full"},
]
RESTART = {"run": "dead", "project": "sea", "deaths": 2, "is_given_up": False, "job": "job-1", "reason": "its driver died"}
VIEW: dict[str, Any] = {
    "queue": [WAITS],
    "runs": [HOLDS | {"waiting_since_s": None}],
    "deployments": [{"name": "app/chat", "project": "lake", "wanted": 3, "allowed": 2, "replicas": 2, "reason": "full"}],
    "nodes": NODES,
    "resubmissions": [
        RESTART,
        RESTART | {"run": "gone", "is_given_up": True, "deaths": 7, "next_s": None},
    ],
}
IDLE: dict[str, Any] = {"queue": [], "runs": [], "deployments": [], "nodes": [], "resubmissions": []}


SNAPSHOT = Snapshot(100.0, (Node("n0", "H100", 4, 32),))


class FakePool:
    """Answers what it is given, or that nobody answers; notes what it is told."""

    def __init__(self) -> None:
        now_s = time.time()
        VIEW["queue"][0]["waiting_since_s"], VIEW["resubmissions"][0]["next_s"] = now_s - 300, now_s + 18_000
        self.answer: dict[str, Any] | None = VIEW
        self.has_driver = True
        self.told: list[Any] = []

    def view(self) -> dict[str, Any]:
        return self._answered()

    def snapshot(self) -> dict[str, Any]:
        self._answered()
        return snapshot_to_json(SNAPSHOT)

    def set_priority(self, run: str, priority: int) -> bool:
        self._answered()
        self.told.append((run, priority))
        return self.has_driver

    def start(self, store_url: str) -> None:
        self._answered()
        self.told.append(store_url)

    def _answered(self) -> dict[str, Any]:
        if self.answer is None:
            raise ClusterError("The pool cannot be asked: nothing answers at 10.0.0.1:6379.")
        return self.answer


@pytest.fixture(autouse=True)
def pool(shared_store_url: str, monkeypatch: pytest.MonkeyPatch) -> FakePool:
    monkeypatch.setenv("TIDEPOOL_STORE", shared_store_url)
    fake = FakePool()
    monkeypatch.setattr(cli, "_pool", lambda: fake)
    return fake


def said(capsys: Captured, *command: str) -> str:
    """What a command prints when it succeeds."""
    status = main(command)
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out


def refusal(capsys: Captured, *command: str) -> str:
    """What a command says, in one line, when it refuses."""
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err.removeprefix("error: ")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def begin(url: str, run: str) -> None:
    values = {"run": run, "store": url, "dataset": "d", "model": {"base": "b"}, "training": {"steps": 4}}
    note_wanted(open_store(url), parse_spec(values, RunSpec), 1)


# --- The queue -------------------------------------------------------------------------------------------------------


def test_the_queue_is_told_with_places_and_reasons(capsys: Captured) -> None:
    lines = said(capsys, "queue").splitlines()
    assert cells(lines[0]) == ["PLACE", "RUN", "PROJECT", "TIER", "PRIORITY", "GROUPS", "WAITS", "WHY"]
    assert cells(lines[1]) == ["1", "big", "sea", "premium", "3", "0 (2 to 8)", "5 min", "no room"]
    assert cells(lines[3]) == ["RUN WITHOUT A DRIVER", "PROJECT", "DEATHS", "NEXT", "WHY"]
    assert cells(lines[4]) == ["dead", "sea", "2", "in 5 h", "its driver died"]
    assert cells(lines[5]) == ["gone", "sea", "7", "given up", "its driver died"]


def test_an_empty_queue_says_so(capsys: Captured, pool: FakePool) -> None:
    pool.answer = IDLE
    assert said(capsys, "queue") == "No run waits: each has at least its min.\n"


def test_the_queue_as_json(capsys: Captured) -> None:
    assert json.loads(said(capsys, "queue", "--json")) == {key: VIEW[key] for key in ("queue", "resubmissions")}


def test_where_nobody_answers_that_is_the_answer(capsys: Captured, pool: FakePool) -> None:
    pool.answer = None
    for command in (["queue"], ["pool", "show"], ["pool", "snapshot"], ["pool", "start"]):
        assert refusal(capsys, *command) == "The pool cannot be asked: nothing answers at 10.0.0.1:6379.\n"


# --- Priorities ------------------------------------------------------------------------------------------------------


def test_a_priority_is_kept_and_told(capsys: Captured, pool: FakePool, shared_store_url: str) -> None:
    begin(shared_store_url, "big")
    assert said(capsys, "runs", "set-priority", "big", "7") == "Run big has priority 7 now.\n"
    assert pool.told == [("big", 7)]
    pool.has_driver = False
    assert said(capsys, "runs", "set-priority", "big", "-1") == "Run big has priority -1 when it is submitted next.\n"
    assert read_priority(open_store(shared_store_url), "big") == -1


def test_a_priority_is_kept_where_no_pool_answers(capsys: Captured, pool: FakePool, shared_store_url: str) -> None:
    begin(shared_store_url, "big")
    pool.answer = None
    text = said(capsys, "runs", "set-priority", "big", "2")
    assert text.startswith("Run big has priority 2 when it is submitted next. Whether it waits now was not asked: The pool cannot be asked")
    assert read_priority(open_store(shared_store_url), "big") == 2


def test_an_unknown_run_has_no_priority(capsys: Captured, pool: FakePool) -> None:
    assert "No run 'bog'" in refusal(capsys, "runs", "set-priority", "bog", "2")
    assert "No run '../x'" in refusal(capsys, "runs", "set-priority", "../x", "2")
    assert pool.told == []


# --- The pool --------------------------------------------------------------------------------------------------------


def test_who_holds_what_is_told(capsys: Captured) -> None:
    nodes, runs, deployments = said(capsys, "pool", "show").split("\n\n")
    assert [cells(line) for line in nodes.splitlines()[1:]] == [
        ["n0", "H100", "8", "2", "64", "16", "in use"],
        ["n1", "H100", "8", "8", "64", "64", "quarantined: disk full"],
    ]
    assert cells(runs.splitlines()[1]) == ["small", "lake", "basic", "0", "3 (1 to 4)"]
    assert cells(deployments.splitlines()[1]) == ["app/chat", "lake", "2", "3", "2", "full"]


def test_the_pool_as_json_and_empty(capsys: Captured, pool: FakePool) -> None:
    assert json.loads(said(capsys, "pool", "show", "--json")) == {key: VIEW[key] for key in ("nodes", "runs", "deployments")}
    pool.answer = IDLE
    assert said(capsys, "pool", "show") == "The cluster has no nodes yet.\n"


def test_the_pool_is_told_the_store(capsys: Captured, pool: FakePool, shared_store_url: str) -> None:
    assert f"goes on with the runs that are wanted in {shared_store_url}" in said(capsys, "pool", "start")
    assert pool.told == [shared_store_url]


def test_what_was_decided_on_can_be_recorded_and_explained(capsys: Captured, tmp_path: Path) -> None:
    path = tmp_path / "snapshot.json"
    path.write_text(said(capsys, "pool", "snapshot"))
    assert "1 nodes, 4 GPUs" in said(capsys, "pool", "explain", str(path))


def test_nobody_is_asked_where_no_cluster_is_known() -> None:
    with pytest.raises(ClusterError, match=r"The pool cannot be asked: no cluster is known here; set RAY_ADDRESS .*\.$"):
        LivePool({}).view()


# --- Quotas and usage ------------------------------------------------------------------------------------------------


def test_a_quota_is_set_changed_told_and_removed(capsys: Captured, shared_store_url: str) -> None:
    assert said(capsys, "pool", "quota") == "No project has a quota.\n"
    assert "has no quota: it may hold what there is" in said(capsys, "pool", "quota", "sea")
    lines = said(capsys, "pool", "quota", "sea", "--training", "8").splitlines()
    assert [cells(line) for line in lines] == [["PROJECT", "TRAINING", "SERVING"], ["sea", "8", "-"]]
    said(capsys, "pool", "quota", "sea", "--serving", "2")
    said(capsys, "pool", "quota", "lake", "--serving", "0")
    assert read_quotas(open_store(shared_store_url)) == (Quota("lake", 0, None), Quota("sea", 2, 8))
    said(capsys, "pool", "quota", "sea", "--training", "none")
    assert read_quotas(open_store(shared_store_url)) == (Quota("lake", 0, None), Quota("sea", 2, None))
    assert "Project sea has no quota" in said(capsys, "pool", "quota", "sea", "--remove")
    assert [cells(line)[0] for line in said(capsys, "pool", "quota").splitlines()] == ["PROJECT", "lake"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--training", "8"], "Whose quota? Give the project"),
        (["sea", "--remove", "--training", "8"], "--remove takes both limits away"),
        (["Sea", "--training", "8"], "'Sea' cannot be a project: a name is 1 to 64 of the characters"),
    ],
)
def test_a_quota_that_makes_no_sense_is_refused(capsys: Captured, shared_store_url: str, command: list[str], message: str) -> None:
    assert message in refusal(capsys, "pool", "quota", *command)
    assert read_quotas(open_store(shared_store_url)) == ()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["quota", "sea", "--training", "-1"], "invalid limit '-1'"),
        (["quota", "sea", "--training", "many"], "invalid limit 'many': give a whole number, or `none`"),
        (["usage", "--since", "yesterday"], "invalid day 'yesterday': give one as 2026-11-26"),
    ],
)
def test_numbers_and_days_that_are_none_are_refused(capsys: Captured, command: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["pool", *command])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_what_was_used_is_told_by_project_and_since_a_day(capsys: Captured, shared_store_url: str) -> None:
    assert said(capsys, "pool", "usage") == "Nothing was held that this store knows of.\n"
    log, noon_s = UsageLog(open_store(shared_store_url)), 1_795_694_400.0  # 26 November 2026, 12:00 UTC
    for second in range(0, 7201, 60):
        log.step((Holding("sea", "training", gpus=3), Holding("lake", "serving", cpus=1)), noon_s + second)
    lines = said(capsys, "pool", "usage").splitlines()
    assert [cells(line) for line in lines[:3]] == [
        ["PROJECT", "FOR", "GPU HOURS", "CPU HOURS WITHOUT GPU"],
        ["lake", "serving", "0.00", "2.00"],
        ["sea", "training", "6.00", "0.00"],
    ]
    assert lines[-1] == "From 2026-11-26 to 2026-11-26T14:00:00+00:00."
    told = json.loads(said(capsys, "pool", "usage", "--project", "sea", "--json"))
    assert told["projects"] == [{"project": "sea", "purpose": "training", "gpu_s": 21600.0, "cpu_s": 0.0}]
    assert said(capsys, "pool", "usage", "--since", "2026-11-27") == "Nothing was held that this store knows of.\n"
    assert said(capsys, "pool", "usage", "--project", "pond") == "Nothing was held by pond that this store knows of.\n"
