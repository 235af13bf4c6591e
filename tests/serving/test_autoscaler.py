"""What Serve's controller is told: what traffic wants as far as the arbiter allows it, without ever waiting for the arbiter."""

import subprocess
import sys
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from tidepool.messages import ARBITER, NAMESPACE
from tidepool.serving import autoscaler
from tidepool.serving.autoscaler import PATIENCE_S, Autoscaler, Bell, Permission
from tidepool.serving.engines import autoscaling
from tidepool.specs import ReplicasSpec

QUESTION = ("tidepool", "Engine-1", "default", 0, 0, 1, 3, 2, 1)


class World:
    """A clock, and an arbiter that answers when it is told to."""

    def __init__(self, is_there: bool = True) -> None:
        self.now, self.is_there = 100.0, is_there
        self.asked: list[tuple[Any, ...]] = []
        self.answers: list[Future[int]] = []
        self.num_looks = 0
        self.permission = Permission(self.find, lambda: self.now)

    def find(self) -> Any:
        self.num_looks += 1
        return self.ask if self.is_there else None

    def ask(self, *question: Any) -> "Future[int]":
        self.asked.append(question)
        self.answers.append(Future())
        return self.answers[-1]

    def allowed(self, after_s: float = 0.25, question: tuple[Any, ...] = QUESTION, num_target: int = 1) -> int | None:
        self.now += after_s
        return self.permission.allowed(question, num_target)


def test_nothing_changes_before_the_first_answer_and_then_as_many_are_allowed_as_it_says() -> None:
    world = World()
    assert world.allowed() == 1
    assert world.asked == [QUESTION]
    assert world.allowed() == 1, "it has not answered"
    assert len(world.asked) == 1, "one question at a time"
    world.answers[0].set_result(2)
    assert world.allowed() == 2
    world.answers[1].set_result(0)
    assert world.allowed() == 0, "what runs may be taken too"


def test_a_new_question_is_asked_at_once_and_the_same_one_not_all_the_time() -> None:
    world = World()
    for _ in range(10):
        world.allowed(0.1)
        world.answers[-1].set_result(1) if not world.answers[-1].done() else None
    assert 4 <= len(world.asked) <= 6
    world.allowed(0.01, question=(*QUESTION[:-1], 7))
    assert world.asked[-1][-1] == 7


def test_traffic_alone_decides_where_there_is_no_arbiter_or_none_that_answers() -> None:
    nobody = World(is_there=False)
    assert [nobody.allowed(0.1) for _ in range(15)] == [None] * 15
    assert nobody.num_looks == 2, "it is looked for now and then"
    nobody.is_there = True
    nobody.allowed(2)
    nobody.answers[0].set_result(3)
    assert nobody.allowed() == 3
    silent = World()
    silent.allowed()
    assert silent.allowed(PATIENCE_S - 0.2) == 1
    assert silent.allowed(0.2) is None
    silent.allowed(2)
    silent.answers[-1].set_result(2)
    assert silent.allowed() == 2, "it is asked again meanwhile"


def test_an_arbiter_that_dies_is_asked_again_and_what_it_said_holds_for_a_while() -> None:
    world = World()
    world.allowed()
    world.answers[-1].set_result(2)
    assert world.allowed() == 2
    world.answers[-1].set_exception(ActorDiedError())
    assert world.allowed(1) == 2
    assert world.num_looks == 2
    assert world.allowed(PATIENCE_S) is None
    world.answers[-1].set_result(1)
    assert world.allowed() == 1


def test_a_bell_tells_once_of_each_time_that_it_was_rung() -> None:
    value: list[bytes | None] = [b"long ago"]
    bell = Bell(lambda: value[0])
    assert not bell.has_rung()
    value[0] = b"now"
    assert [bell.has_rung(), bell.has_rung()] == [True, False]


@dataclass
class Value:
    value: float
    timestamp: float = 0.0


def context(metrics: Any, num: int) -> Any:
    return SimpleNamespace(
        raw_metrics=metrics, current_num_replicas=num, target_num_replicas=num, app_name="tidepool", deployment_name="Engine-1"
    )


def test_serve_is_told_what_traffic_wants_and_the_arbiter_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    monkeypatch.setattr(autoscaler, "find_arbiter", world.find)
    monkeypatch.setattr(autoscaler, "read_bell", lambda *_: None)
    spec = ReplicasSpec.model_validate(
        {"scale": {"min": 0, "max": 4, "up_after_s": 0}, "project": "sea", "priority": 3, "cpus_per_replica": 0.5}
    )
    policy = Autoscaler(**autoscaling(spec).policy.policy_kwargs)
    metrics = {
        "occupancy": {"a": [Value(9.0), Value(0.5)], "b": [Value(2.0)], "c": []},
        "cache_use": {"a": [Value(0.1)], "b": [Value(0.2)]},
        "ttft_s": {"a": [Value(0.1)]},
        "running": {"a": [Value(99.0)]},
    }
    assert policy(context(metrics, 2)) == (2, {})
    assert world.asked == [("tidepool", "Engine-1", "sea", 3, 0, 1, 4, 4, 2)]
    world.answers[0].set_result(3)
    assert policy(context(metrics, 3)) == (3, {})
    world.answers[-1].set_result(9)
    assert policy(context(metrics, 3)) == (4, {}), "what is allowed need not be taken"
    assert policy(context(None, 1))[0] == 4


def test_a_deployment_of_a_fixed_number_asks_for_it_too() -> None:
    kwargs = autoscaling(ReplicasSpec(num_replicas=3, gpus_per_replica=0.5)).policy.policy_kwargs
    assert (kwargs["limits"]["min"], kwargs["limits"]["max"], kwargs["claim"]) == (3, 3, ["default", 0, 1, 1])


def test_the_policy_travels_by_value_and_knows_the_arbiters_name() -> None:
    """Serve's controller may not have this library."""
    carried = autoscaling(ReplicasSpec()).policy.get_serialized_policy_def()
    assert carried is not None
    program = "import sys; sys.modules['tidepool'] = None; from ray import cloudpickle; print(cloudpickle.load(sys.stdin.buffer).__name__)"
    done = subprocess.run([sys.executable, "-c", program], input=carried, capture_output=True, timeout=60, check=False)
    assert done.stdout == b"Autoscaler\n", done.stderr
    assert (autoscaler._ARBITER, autoscaler._NAMESPACE) == (ARBITER, NAMESPACE)
