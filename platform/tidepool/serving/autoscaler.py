"""The policy that Ray Serve's controller asks how many replicas a base model shall have: what traffic wants, and the pool allows.

Traffic decides what is wanted (`serving.scaling`); the arbiter is told of it and answers how many there may be now, so that none waits for
a place where there is no room. It is asked again and again and never waited for, since Serve's controller waits for nothing. While it
has not answered for `PATIENCE_S`, or where there is none, traffic alone decides: serving must never hang on it. Serve itself applies no
delays: they have passed when the arbiter is asked.

Who waits for a deployment without replicas rings its *bell*, a value in Ray's key-value store. (A request of Serve's would start a replica
past this policy, room or not, and keep the policy from being asked until it runs.)

The module imports nothing of ours but `scaling`; Serve carries both to its controller by value.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import RayError
from ray.experimental import internal_kv

from tidepool.serving.scaling import Demand, Limits, latest_loads

PATIENCE_S = 5.0
_ASK_EVERY_S = 0.2
_LOOK_EVERY_S = 1.0
_NAMESPACE, _ARBITER = "tidepool", "tidepool-arbiter"
"""As in `arbiter_handle` and `messages`, which the controller may not have."""

Ask = Callable[..., "Future[int]"]


class Permission:
    """How many replicas the arbiter allows one deployment. `find` returns how to ask it, None where there is none."""

    def __init__(self, find: Callable[[], Ask | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._find, self._clock = find, clock
        self._ask: Ask | None = None
        self._looked_at = self._asked_at = -float("inf")
        self._question: tuple[Any, ...] = ()
        self._answer: Future[int] | None = None  # that is waited for
        self._allowed: int | None = None
        self._hoped_since: float | None = None  # when it answered last, or was there for the first time

    def allowed(self, question: tuple[Any, ...], num_target: int) -> int | None:
        """How many there may be; as many as were asked for last, before a first answer; None: nobody answers."""
        now = self._clock()
        self._listen(now)
        self._speak(question, now)
        if self._hoped_since is None or now - self._hoped_since >= PATIENCE_S:
            return None
        return num_target if self._allowed is None else self._allowed

    def _listen(self, now: float) -> None:
        if self._answer is None:
            return
        if self._answer.done():
            try:
                self._allowed, self._hoped_since = self._answer.result(), now
            except RayError:  # it died, and Ray starts it again
                self._ask = None
            self._answer = None
        elif now - self._asked_at >= PATIENCE_S:
            self._ask = self._answer = None

    def _speak(self, question: tuple[Any, ...], now: float) -> None:
        if self._answer is not None or (question == self._question and now - self._asked_at < _ASK_EVERY_S):
            return
        if self._ask is None and now - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = now
            self._ask = self._find()
        if self._ask is None:
            return
        if self._hoped_since is None:
            self._hoped_since = now
        self._question, self._asked_at, self._answer = question, now, self._ask(*question)


class Bell:
    """Whether it was rung since it was looked at last. `read` returns what whoever rang last left there."""

    def __init__(self, read: Callable[[], bytes | None]) -> None:
        self._read = read
        self._seen = read()

    def has_rung(self) -> bool:
        """Look at it."""
        before, self._seen = self._seen, self._read()
        return self._seen != before


class Autoscaler:
    """The policy as Serve asks for it: built in its controller, called with an `AutoscalingContext` several times a second.

    `limits` are those of `Limits`; `claim` is what the arbiter is told of every replica: project, priority, gpus, cpus.
    """

    def __init__(self, limits: dict[str, Any], claim: list[Any]) -> None:
        self._limits, self._claim = Limits(**limits), claim
        self._demand: Demand | None = None
        self._bell: Bell | None = None
        self._permission = Permission(find_arbiter)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        num_target, num_running = context.target_num_replicas, context.current_num_replicas
        name = context.app_name, context.deployment_name
        if self._demand is None:
            self._demand = Demand(self._limits, num_target)
        demand = self._demand
        demand.update(latest_loads(context.raw_metrics or {}), num_running, time.monotonic(), self._has_rung(name, num_running))
        question = (*name, *self._claim, demand.num_wanted, demand.num_needed, num_target)
        allowed = self._permission.allowed(question, num_target)
        return (demand.num_wanted if allowed is None else min(demand.num_wanted, allowed)), {}

    def _has_rung(self, name: tuple[str, str], num_running: int) -> bool:
        if num_running:
            self._bell = None
            return False
        if self._bell is None:
            self._bell = Bell(lambda: read_bell(*name))
        return self._bell.has_rung()


def find_arbiter() -> Ask | None:
    """How to ask the cluster's arbiter; None where there is none. Starts none."""
    try:
        method = ray.get_actor(_ARBITER, _NAMESPACE).deployment
    except ValueError:
        return None
    return lambda *question: method.remote(*question).future()


def ring_bell(application: str, deployment: str) -> None:
    """Have a deployment without replicas get one."""
    internal_kv._internal_kv_put(_bell_key(application, deployment), str(time.time_ns()), overwrite=True, namespace=_NAMESPACE)


def read_bell(application: str, deployment: str) -> bytes | None:
    """What whoever rang last left there; None if nobody did."""
    value: bytes | None = internal_kv._internal_kv_get(_bell_key(application, deployment), namespace=_NAMESPACE)
    return value


def _bell_key(application: str, deployment: str) -> bytes:
    return f"bell/{application}/{deployment}".encode()
