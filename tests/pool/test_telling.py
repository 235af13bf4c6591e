"""What the arbiter tells people: the same facts as the policy decided on, and all of them JSON."""

import json

from tests.pool.pools import deployment, nodes, run
from tidepool.messages import ClusterView, Reason, Resources, Snapshot, Wait
from tidepool.pool import Rules, decide
from tidepool.pool.telling import tell

NODES = nodes(4, 4)
VIEW = ClusterView(NODES, {"n0": Resources(1, 2)})


def test_the_queue_is_in_the_policy_s_order_with_its_reasons() -> None:
    runs = (
        run("late", 3, 4, submitted_s=90.0, waiting_since_s=90.0),
        run("holds", 1, 6, {f"n0#{n}": 0.0 for n in range(6)}),
        run("early", 9, 9),
    )
    snapshot = Snapshot(100.0, nodes(8), (), runs)
    waits = decide(snapshot, Rules()).waits
    told = tell(snapshot, waits, VIEW, lambda _: None, {}, [])
    assert [(one["place"], one["run"]) for one in told["queue"]] == [(place, wait.name) for place, wait in enumerate(waits, 1)]
    assert [one["reason"] for one in told["queue"]] == [str(wait.reason) for wait in waits]
    assert {one["run"] for one in told["queue"]} <= {"late", "early"}
    [holds] = told["runs"]
    assert (holds["run"], holds["place"], holds["groups"], holds["min"], holds["max"]) == ("holds", None, 6, 1, 6)
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_deployments_and_nodes_are_told_with_what_is_allowed_and_free() -> None:
    wait = Wait("chat", 1, Reason("full", "there is no room"))
    restart = {"run": "dead"}
    told = tell(Snapshot(0.0, NODES, (deployment("chat", 3, ("n0",)),)), [wait], VIEW, {"chat": 2}.get, {"n1": "disk full"}, [restart])
    assert told["deployments"] == [
        {"name": "chat", "project": "serving", "wanted": 3, "allowed": 2, "replicas": 1, "reason": "there is no room"}
    ]
    facts = {"kind": "H100", "gpus": 4, "cpus": 32}
    assert told["nodes"] == [
        {"name": "n0", **facts, "free_gpus": 1, "free_cpus": 2, "quarantined": ""},
        {"name": "n1", **facts, "free_gpus": 4, "free_cpus": 32, "quarantined": "disk full"},
    ]
    assert (told["queue"], told["runs"], told["resubmissions"]) == ([], [], [restart])
