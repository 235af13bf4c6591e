"""`tidepool queue`: who waits for a place in the pool, and why; `tidepool runs set-priority`: what a person says to that.

The arbiter of the cluster is asked; what must last is kept in the store.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tidepool.errors import ClusterError, RunError
from tidepool.run_queue import note_priority
from tidepool.storage import ObjectStore
from tidepool.table import span, table

Facts = Mapping[str, Any]
_HEAD = ("PLACE", "RUN", "PROJECT", "TIER", "PRIORITY", "GROUPS", "WAITS", "WHY")
_RESTARTS_HEAD = ("RUN WITHOUT A DRIVER", "PROJECT", "DEATHS", "NEXT", "WHY")


class Pool(Protocol):
    """What is asked of the arbiter of a cluster. All of it raises `ClusterError` where none answers."""

    def view(self) -> dict[str, Any]:
        """Who holds what and who waits."""
        ...

    def set_priority(self, run: str, priority: int) -> bool:
        """Give a run another priority; returns whether it has a driver in the cluster."""
        ...


def add_queue_command(parser: argparse.ArgumentParser, pool: Callable[[], Pool]) -> None:
    """Make a parser that of `tidepool queue`. `pool` finds the one to ask."""
    parser.add_argument("--json", action="store_true", help="one JSON document in place of the text")
    parser.set_defaults(run=lambda options: _queue(options, pool()))


def add_priority_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    store_of: Callable[[argparse.Namespace], ObjectStore],
    pool: Callable[[], Pool],
) -> argparse.ArgumentParser:
    """Add `set-priority` to the subparsers of `tidepool runs`; returns its parser, which wants a store."""
    command = commands.add_parser("set-priority", help="give a run another priority, which orders runs of one tier; the higher goes first")
    command.add_argument("name", metavar="RUN", help="the `run` of its spec")
    command.add_argument("priority", metavar="N", type=int, help="a whole number, in place of its spec's `pool.priority`")
    command.set_defaults(run=lambda options: _set_priority(options, store_of(options), pool()))
    return command


def _queue(options: argparse.Namespace, pool: Pool) -> None:
    view = pool.view()
    waiting, restarts = view["queue"], view["resubmissions"]
    if options.json:
        print(json.dumps({"queue": waiting, "resubmissions": restarts}, indent=2))
        return
    now_s = time.time()
    if waiting:
        print("\n".join(table([_HEAD, *(_row(run, now_s) for run in waiting)])))
    else:
        print("No run waits: each has at least its min.")
    if restarts:
        print("\n".join(["", *table([_RESTARTS_HEAD, *(_restart_row(run, now_s) for run in restarts)])]))


def groups_of(run: Facts) -> str:
    """How many groups a run holds, and how many it may."""
    return f"{run['groups']} ({run['min']} to {run['max']})"


def _row(run: Facts, now_s: float) -> tuple[str, ...]:
    since_s = run["waiting_since_s"]
    waits = span(max(0.0, now_s - since_s)) if since_s is not None else "-"
    return str(run["place"]), run["run"], run["project"], run["tier"], str(run["priority"]), groups_of(run), waits, run["reason"]


def _restart_row(run: Facts, now_s: float) -> tuple[str, ...]:
    next_s = run["next_s"]
    then = "given up" if run["is_given_up"] else f"in {span(max(0.0, next_s - now_s))}" if next_s is not None else "now"
    return run["run"], run["project"], str(run["deaths"]), then, run["reason"]


def _set_priority(options: argparse.Namespace, store: ObjectStore, pool: Pool) -> None:
    name, priority = options.name, options.priority
    if "/" in name or not (any(store.list(f"runs/{name}/")) or any(store.list(f"queue/{name}/"))):
        raise RunError(f"No run {name!r} in {store.url}; `tidepool runs list` shows them.")
    note_priority(store, name, priority)
    try:
        is_told = pool.set_priority(name, priority)
    except ClusterError as error:
        print(f"Run {name} has priority {priority} when it is submitted next. Whether it waits now was not asked: {error}")
        return
    print(f"Run {name} has priority {priority}{' now' if is_told else ' when it is submitted next'}.")
