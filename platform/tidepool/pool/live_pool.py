"""What the arbiter of a Ray cluster says and is told. In a process of its own (`cluster_process`), as whose program this module runs."""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from tidepool.cluster_process import ask_cluster
from tidepool.errors import ClusterError
from tidepool.messages import ARBITER, NAMESPACE

_TIMEOUT_S = 10


class LivePool:
    """The pool of a Ray cluster, by an environment that names it (`RAY_ADDRESS`). All of it raises `ClusterError` where none answers."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def view(self) -> dict[str, Any]:
        """Who holds what and who waits (`Arbiter.view`)."""
        return self._look("view")

    def snapshot(self) -> dict[str, Any]:
        """What was decided on last, as JSON."""
        return self._look("snapshot")

    def set_priority(self, run: str, priority: int) -> bool:
        """Give a run another priority; returns whether it has a driver in this cluster."""
        return bool(self._ask(f"The pool cannot be told of the priority of {run}", "set_priority", run, str(priority)))

    def start(self, store_url: str) -> None:
        """Start the arbiter, if there is none, and have it go on with what is wanted in the store."""
        self._ask("The pool cannot be started", "start", store_url)

    def _look(self, what: str) -> dict[str, Any]:
        answer = self._ask("The pool cannot be asked", what)
        if answer is None:
            raise ClusterError("No pool is at work in this cluster: a run that is submitted starts it, or `tidepool pool start`.")
        found: dict[str, Any] = answer
        return found

    def _ask(self, what: str, *arguments: str) -> Any:
        try:
            return ask_cluster(self._environment, "tidepool.pool.live_pool", *arguments)
        except ClusterError as error:
            raise ClusterError(f"{what}: {error}.") from error


def _answer(what: str, *arguments: str) -> Any:
    """What the arbiter of `RAY_ADDRESS`'s cluster answers; None where there is no arbiter."""
    import ray  # here and not above: the process that asks does without

    from tidepool.arbiter_handle import find_arbiter

    ray.init(os.environ["RAY_ADDRESS"], namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    try:
        arbiter = find_arbiter() if what == "start" else ray.get_actor(ARBITER, NAMESPACE)
    except ValueError:  # Ray's way to say that there is none
        return None
    match what:
        case "start":
            question = arbiter.watch.remote(*arguments)
        case "set_priority":
            run, priority = arguments
            question = arbiter.set_priority.remote(run, int(priority))
        case "snapshot":
            question = arbiter.snapshot.remote()
        case _:
            question = arbiter.view.remote()
    return ray.get(question, timeout=_TIMEOUT_S)


if __name__ == "__main__":
    print(json.dumps(_answer(*sys.argv[1:])))
