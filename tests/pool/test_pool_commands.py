"""`tidepool pool explain` and `what-if` on recorded snapshots, through the command line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from tests.pool.pools import SHORT, after, deployment, nodes, pools, run
from tidepool.cli import main
from tidepool.errors import SpecError
from tidepool.messages import Snapshot
from tidepool.pool.recording import snapshot_from_json, snapshot_to_json

SPEC = """
run: mine
store: file:///nowhere
dataset: d
model: {base: some-model}
training: {steps: 10, num_shards: 8}
workers: {num_workers: 1, gpus_per_worker: 1}
"""
WIDE = run("wide", 1, 4, {"n0": 0.0, "n0#": 10.0, "n0##": 20.0, "n0###": 30.0}, started_s=0.0)
FULL = Snapshot(100_000.0, nodes(4), (deployment("chat", 0),), (WIDE,))


def recorded(folder: Path, snapshot: Snapshot, **changes: Any) -> str:
    path = folder / "snapshot.json"
    path.write_text(json.dumps(snapshot_to_json(snapshot) | changes))
    return str(path)


def spec(folder: Path, text: str = SPEC) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["pool", *arguments])
    shown = capsys.readouterr()
    return status, shown.out + shown.err


@settings(max_examples=30, deadline=None)
@given(pools())
def test_a_snapshot_that_is_recorded_reads_back_the_same(pool: Snapshot) -> None:
    lived = after(pool, 3, SHORT)
    text = json.dumps(snapshot_to_json(lived), allow_nan=False)
    assert snapshot_from_json(json.loads(text), "recorded") == lived


def test_explain_says_who_holds_what_what_is_done_and_who_waits_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waits = run("new", waiting_since_s=99_990.0, submitted_s=99_990.0)
    status, shown = command(capsys, "explain", recorded(tmp_path, replace(FULL, runs=(*FULL.runs, waits))))
    assert status == 0
    assert "1 nodes, 4 GPUs (CPUs where a node has none): 4 train, 0 serve" in shown
    assert "deployment chat: wants 0 replicas; none there" in shown
    assert "holds 4 groups, min 1, max 4" in shown
    assert "ask wide for wide/3: new needs room; from 4 to 3 groups (its min is 1) wide loses 33% of its speed" in shown
    assert "new waits: room for 1 more is being made" in shown


def test_explain_of_one_run_says_nothing_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown = command(capsys, "explain", recorded(tmp_path, replace(FULL, runs=(WIDE, run("other", 9, 9)))), "wide")
    assert status == 0
    assert "run wide" in shown
    assert "nothing is to be done" in shown
    assert "other" not in shown


def test_what_if_says_what_a_run_would_get_when_and_who_would_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown = command(capsys, "what-if", spec(tmp_path), "--snapshot", recorded(tmp_path, FULL))
    assert status == 0
    lines = shown.splitlines()
    assert lines[0].startswith("after 0 s  ask wide for wide/3: mine needs room")
    assert any(line.startswith("after 20 s  mine gets 1 group on n0 and holds 1") for line in lines)


def test_what_if_counts_on_nodes_that_can_be_launched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = {"name": "big", "kind": "H100", "gpus": 8, "cpus": 64, "available": 2, "start_s": 95.0}
    path = recorded(tmp_path, replace(FULL, runs=()), templates=[template])
    status, shown = command(capsys, "what-if", spec(tmp_path), "--snapshot", path, "--min", "8", "--max", "8")
    assert status == 0
    assert "after 0 s  launch 1 of big: 8 of mine have no room" in shown
    assert "after 100 s  mine gets 8 groups on" in shown


def test_what_if_says_so_if_a_run_would_get_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown = command(capsys, "what-if", spec(tmp_path), "--snapshot", recorded(tmp_path, FULL), "--min", "8", "--max", "8")
    assert status == 0
    assert "mine waits: 8 more of 1 workers do not fit" in shown
    assert "mine gets nothing within 72 hours" in shown


def test_what_if_honours_the_tier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = replace(FULL, runs=(run("weak", 4, 4, {f"n0{'#' * i}": 0.0 for i in range(4)}, tier="basic", as_of_s=100_000.0),))
    _, shown = command(capsys, "what-if", spec(tmp_path), "--snapshot", recorded(tmp_path, held), "--tier", "premium")
    assert "after 0 s  ask weak for weak/0: mine (" in shown
    _, shown = command(capsys, "what-if", spec(tmp_path), "--snapshot", recorded(tmp_path, held), "--tier", "basic")
    assert "after 0 s  mine waits: 1 more of 1 workers do not fit" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodez": []}, "nodez: unknown key; did you mean `nodes`?"),
        ({"runs": [{"name": "r", "projct": "p"}]}, "runs[0].projct: unknown key; did you mean `project`?"),
        ({"runs": [{"name": "r"}]}, "runs[0].min_groups: missing, and it has no default"),
        ({"now_s": "noon"}, "now_s: must be a number (got 'noon')"),
        ({"nodes": [{"name": "n", "kind": "H100", "gpus": True, "cpus": 1}]}, "nodes[0].gpus: must be a whole number (got True)"),
        ({"nodes": {}}, "nodes: must be a list"),
        ({"runs": [7]}, "runs[0]: must hold keys and values"),
        ({"nodes": [{"name": "n", "kind": "k", "gpus": 1, "cpus": 1}] * 2}, "nodes: the name 'n' stands 2 times"),
        ({"deployments": [{"name": "d", "project": "p", "wanted": -1}]}, "deployments.d: wanted must not be negative"),
    ],
)
def test_a_snapshot_that_cannot_be_read_is_refused_with_the_place_and_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    status, shown = command(capsys, "explain", recorded(tmp_path, FULL, **changes))
    assert status == 1
    assert message in shown
    assert "Traceback" not in shown


def test_every_problem_of_a_snapshot_is_named_at_once() -> None:
    bad = {"now_s": 0, "nodes": [], "runs": [snapshot_to_json(FULL)["runs"][0] | {"tier": "gold", "min_groups": 1.5}]}
    with pytest.raises(SpecError) as raised:
        snapshot_from_json(bad, "bad.json")
    assert "runs[0].tier: must be one of premium, standard, basic (got 'gold')" in str(raised.value)
    assert "runs[0].min_groups: must be a whole number (got 1.5)" in str(raised.value)


def test_a_run_that_no_pool_can_have_is_refused() -> None:
    run_of = snapshot_to_json(FULL)["runs"][0]
    for wrong in ({"min_groups": 5}, {"shards": 0}, {"speeds": [[1, 0.0]]}, {"worker": {"gpus": -1}}, {"worker": {"gpus": 0, "cpus": 0}}):
        with pytest.raises(SpecError):
            snapshot_from_json({"now_s": 0, "nodes": [], "runs": [run_of | wrong]}, "bad.json")


def test_missing_and_broken_files_give_a_message_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown = command(capsys, "explain", str(tmp_path / "none.json"))
    assert (status, "Cannot read the snapshot" in shown) == (1, True)
    (tmp_path / "broken.json").write_text("{")
    status, shown = command(capsys, "explain", str(tmp_path / "broken.json"))
    assert (status, "is not JSON" in shown) == (1, True)
    snapshot = recorded(tmp_path, FULL)
    assert "has no run or deployment 'x'; it has: wide, chat" in command(capsys, "explain", snapshot, "x")[1]
    assert "already" in command(capsys, "what-if", spec(tmp_path, SPEC.replace("mine", "wide")), "--snapshot", snapshot)[1]
    assert "1 <= --min <= --max" in command(capsys, "what-if", spec(tmp_path), "--snapshot", snapshot, "--min", "9", "--max", "8")[1]
    half = spec(tmp_path, SPEC.replace("gpus_per_worker: 1", "gpus_per_worker: 0.5"))
    assert "whole GPUs" in command(capsys, "what-if", half, "--snapshot", snapshot)[1]
