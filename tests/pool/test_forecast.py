from dataclasses import replace

import pytest

from tests.pool.pools import SHORT, deployment, nodes, run
from tidepool.messages import Snapshot, Template
from tidepool.pool import decide
from tidepool.pool.forecast import Future, begin, staying, step


def lived(future: Future, seconds: float) -> Future:
    return step(future, decide(future.snapshot, SHORT), seconds, SHORT.window_s)


def test_a_grant_becomes_a_group_and_the_books_are_kept() -> None:
    later = lived(begin(Snapshot(100.0, nodes(1), runs=(run("r", waiting_since_s=40.0, as_of_s=100.0),))), 30.0)
    r = later.snapshot.runs[0]
    assert (staying(r), r.waiting_since_s, r.started_s, r.resized_s, r.kind) == (1, None, 100.0, 100.0, "H100")
    assert (r.held_s, r.used_gpu_s, r.as_of_s) == (30.0, 30.0, 130.0)


def test_a_group_that_is_asked_back_leaves_within_one_step() -> None:
    wide = run("wide", 1, 2, {"n0": 0.0, "n0#": 5.0})
    future = lived(begin(Snapshot(100.0, nodes(2), (deployment("chat", 1),), (wide,))), 10.0)
    assert [group.leaving for group in future.snapshot.runs[0].groups] == [False, True]
    future = lived(future, 10.0)
    assert len(future.snapshot.runs[0].groups) == 1
    future = lived(future, 10.0)
    assert [replica.state for replica in future.snapshot.deployments[0].replicas] == ["starting"]


def test_serve_drains_what_it_does_not_want_any_more() -> None:
    future = lived(begin(Snapshot(0.0, nodes(2), (deployment("chat", 1, ("n0", "n0")),))), 10.0)
    assert [replica.state for replica in future.snapshot.deployments[0].replicas] == ["running", "draining"]
    assert len(lived(future, 10.0).snapshot.deployments[0].replicas) == 1


def test_launched_nodes_are_up_after_their_start_time_and_leaving_ones_are_gone() -> None:
    template = Template("t", "H100", 4, 32, available=3, start_s=25.0)
    leaves = replace(nodes(1)[0], leaves_at_s=15.0)
    future = lived(begin(Snapshot(0.0, (leaves,), runs=(run("r", 4, 4),), templates=(template,))), 10.0)
    assert (future.snapshot.templates[0].available, future.snapshot.templates[0].launching) == (2, 1)
    future = lived(future, 10.0)
    assert future.snapshot.nodes == ()
    future = lived(future, 10.0)
    assert [(node.gpus, node.kind) for node in future.snapshot.nodes] == [(4, "H100")]
    assert future.snapshot.templates[0].launching == 0
    assert staying(lived(future, 10.0).snapshot.runs[0]) == 4


def test_time_held_leaves_the_window_again() -> None:
    held = run("r", held={"n0": 0.0}, held_s=1800.0, as_of_s=7200.0, kind="H100")
    later = lived(begin(Snapshot(7200.0, nodes(1), runs=(held,))), 100.0)
    assert later.snapshot.runs[0].held_s == pytest.approx(1800.0 + 100.0 - 50.0)
