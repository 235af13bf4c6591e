"""The checks of the cluster's nodes, carried out: what `pool.health` wants is begun on the nodes, what they answer is taken in. A shell.

A check is a task of Ray's of 0 CPUs, pinned to its node, around a process of its own (`pool.checks`), which ends with the task. Nothing
here waits. What must outlive this process (quarantines, and which nodes have been checked) lies in Ray's internal key-value store: it
dies with the head, as the nodes' ids do.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import tidepool
from tidepool.messages import ClusterView, RunReport
from tidepool.pool.checks import free_port
from tidepool.pool.health import CallOff, Check, Decision, Health, Rules, Word

_logger = logging.getLogger(__name__)
_KEY, _KV_NAMESPACE = b"tidepool-health", b"tidepool"  # the only place of Ray's for a few bytes that outlive an actor
_HIDES_GPUS = ("CUDA_VISIBLE_DEVICES",)
"""What Ray sets where a task asked for none."""


_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""So that rates compare between nodes with more cores and fewer."""


@dataclass
class _Running:
    """A check that was begun; of one between two nodes, first the one that finds out where to meet."""

    check: Check
    tasks: "list[ray.ObjectRef[Any]]"
    is_meeting: bool = False


class Inspector:
    """One for the life of the arbiter. `step` is to be called about twice a second, by one thread at a time."""

    def __init__(self, rules: Rules | None = None) -> None:
        self._health = _remembered(rules)
        self._running: dict[int, _Running] = {}
        self._written = ""
        self._quarantined: Mapping[str, str] = {}

    def quarantined(self) -> Mapping[str, str]:
        """Why nobody is to be on these nodes, by their ids."""
        return self._quarantined

    def unchecked(self) -> frozenset[str]:
        """The nodes that have joined and whose check has not ended yet: nobody is to come to them before that."""
        return self._health.unchecked

    def step(self, view: ClusterView, used: frozenset[str], reports: Iterable[RunReport], now_s: float) -> None:
        """Take in how things are, begin and call off checks, take in what has ended. `used` nodes have somebody on them, or soon will."""
        decisions: list[Decision] = []
        for number, running in list(self._running.items()):
            decisions += self._look_at(number, running, now_s)
        decisions += self._health.observe(view.nodes, used | _taken(view), reports, now_s)
        for decision in decisions:
            self._act(decision)
        self._quarantined = {name: one.why for name, one in self._health.quarantined.items()}
        written = json.dumps(self._health.to_json(), sort_keys=True)
        if written != self._written:
            _internal_kv_put(_KEY, written.encode(), overwrite=True, namespace=_KV_NAMESPACE)
            self._written = written

    def _look_at(self, number: int, running: _Running, now_s: float) -> list[Decision]:
        """Take in a check that has ended; an all-reduce goes on from where its ends shall meet."""
        ready, _ = ray.wait(running.tasks, num_returns=len(running.tasks), timeout=0)
        if len(ready) < len(running.tasks):
            return []
        value, problem = _result(running.tasks)
        if running.is_meeting and not problem:
            check, running.is_meeting = running.check, False
            ends = enumerate(check.nodes)
            running.tasks = [_on_node(node, _reduce, rank, len(check.nodes), value, check.num_gpus) for rank, node in ends]
            return []
        del self._running[number]
        return self._health.answer(number, value, problem, now_s)

    def _act(self, decision: Decision) -> None:
        match decision:
            case Check(number, nodes):
                is_meeting = len(nodes) > 1
                task = _on_node(nodes[0], _meeting_point) if is_meeting else _on_node(nodes[0], _inspect, {"num_gpus": decision.num_gpus})
                self._running[number] = _Running(decision, [task], is_meeting)
            case CallOff(number):
                running = self._running.pop(number, None)
                for task in running.tasks if running else ():
                    ray.cancel(task, force=True)  # the process around the check dies, and the check with it
            case Word(text, is_loud):
                _logger.log(logging.WARNING if is_loud else logging.INFO, "%s", text)


def _taken(view: ClusterView) -> frozenset[str]:
    """The nodes of which Ray has given anything to anybody, be it one that the pool knows nothing of; and those that leave."""
    taken = {replica.node for replica in view.replicas if replica.node} | {node.name for node in view.nodes if node.leaves_at_s is not None}
    free = ((node, view.free.get(node.name)) for node in view.nodes)
    return frozenset(taken | {node.name for node, left in free if left and (left.gpus < node.gpus or left.cpus < node.cpus)})


def _remembered(rules: Rules | None) -> Health:
    stored = _internal_kv_get(_KEY, namespace=_KV_NAMESPACE)
    try:
        return Health(rules, json.loads(stored) if stored else None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        _logger.warning("what was known of the nodes' health cannot be read (%r): all nodes are checked again", error)
        return Health(rules)


def _result(tasks: "list[ray.ObjectRef[Any]]") -> tuple[Any, str]:
    """What the first of some tasks that have ended gave, and "", or what went wrong in any of them."""
    try:
        return ray.get(tasks)[0], ""
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return None, lines[-1] if lines else type(error).__name__


# --- On the nodes -------------------------------------------------------------------------------------------------------


def _on_node(node: str, function: Any, *arguments: Any) -> "ray.ObjectRef[Any]":
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=strategy).remote(*arguments)


def _meeting_point() -> str:
    """An address on this node where an all-reduce may meet."""
    host = ray.util.get_node_ip_address()
    return f"{host}:{free_port(host)}"


def _reduce(rank: int, size: int, address: str, num_gpus: int) -> Any:
    """One end of an all-reduce."""
    host = ray.util.get_node_ip_address()
    return _inspect({"rank": rank, "size": size, "address": address, "host": host, "gpu": 0 if num_gpus else None})


def _inspect(request: Mapping[str, Any]) -> Any:
    """Run a check in a process of its own; returns what it prints last, read as JSON. Raises `RuntimeError` with its last words."""
    paths = [str(Path(tidepool.__path__[0]).parent), os.environ.get("PYTHONPATH", "")]
    variables = {name: value for name, value in os.environ.items() if name not in _HIDES_GPUS}
    variables |= {"PYTHONPATH": os.pathsep.join(path for path in paths if path), **_ONE_THREAD}
    command = [sys.executable, "-m", "tidepool.pool.checks", json.dumps(dict(request))]
    process = subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()  # to its end: `communicate` would close its input, and so end it
    if process.wait():
        raise RuntimeError(lines[-1] if lines else f"the process of the check ended with {process.returncode}")
    return json.loads(lines[-1])
