"""`tidepool pool`: who holds what, what projects may hold and have used; and the policy's answers on a recorded snapshot.

Asks the arbiter, reads the store or files, and prints; what is said comes from `pool`.
"""

import argparse
import json
import math
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from tidepool.errors import SpecError
from tidepool.messages import Quota, Resources, Run, Snapshot
from tidepool.pool import Rules
from tidepool.pool.explanation import explain, what_if
from tidepool.pool.quotas import change_quota, read_quotas
from tidepool.pool.recording import snapshot_from_json
from tidepool.pool.rules import TIERS
from tidepool.pool.usage_log import Day, read_usage, total_of
from tidepool.specs import Name, RunSpec, load_spec
from tidepool.storage import ObjectStore
from tidepool.table import table

StoreOf = Callable[[argparse.Namespace], ObjectStore]
_name = TypeAdapter(Name)
_NO_LIMIT = "none"


class Pool(Protocol):
    """What is asked of the arbiter of a cluster. All of it raises `ClusterError` where none answers."""

    def view(self) -> dict[str, Any]:
        """Who holds what and who waits."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """What was decided on last, as JSON."""
        ...

    def start(self, store_url: str) -> None:
        """Have the cluster go on with what is wanted in a store."""
        ...


def add_pool_commands(parser: argparse.ArgumentParser, store_of: StoreOf, pool: Callable[[], Pool]) -> list[argparse.ArgumentParser]:
    """Add the commands to the parser of `tidepool pool`; each sets `run`. `pool` finds the one to ask. Returns those with a store."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    starting = commands.add_parser("start", help="have the cluster's pool go on with the runs that are wanted in a store")
    starting.set_defaults(run=lambda options: _start(store_of(options), pool()))
    showing = commands.add_parser("show", help="nodes, runs and deployments: who holds what now")
    showing.set_defaults(run=lambda options: _show(options, pool()))
    recording = commands.add_parser("snapshot", help="print what was decided on last, as JSON, for `explain` and `what-if`")
    recording.set_defaults(run=lambda _: print(json.dumps(pool().snapshot(), indent=2)))
    quota = commands.add_parser("quota", help="what projects may hold at a time, in GPUs (CPUs where there is none): tell, change")
    quota.add_argument("project", metavar="PROJECT", nargs="?", help="default: all")
    for purpose in ("training", "serving"):
        quota.add_argument(f"--{purpose}", metavar="N", type=_limit, help=f"the most that its {purpose} may hold; `{_NO_LIMIT}`: no limit")
    quota.add_argument("--remove", action="store_true", help="no limit at all")
    quota.set_defaults(run=lambda options: _quota(options, store_of(options)))
    usage = commands.add_parser("usage", help="the GPU hours that projects have held")
    usage.add_argument("--since", metavar="DATE", type=_date, help="from this day on (UTC), as 2026-11-26 (default: all)")
    usage.add_argument("--project", metavar="PROJECT", help="default: all")
    usage.set_defaults(run=lambda options: _usage(options, store_of(options)))
    for command in (showing, usage):
        command.add_argument("--json", action="store_true", help="one JSON document in place of the text")
    _add_recorded(commands)
    return [starting, quota, usage]


def _add_recorded(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `explain` and `what-if`."""
    told = commands.add_parser("explain", help="who holds what, what is decided now, who waits, and why")
    told.add_argument("snapshot", type=Path, help="a recorded snapshot of the pool (JSON)")
    told.add_argument("name", nargs="?", help="only this run or deployment")
    told.set_defaults(run=_explain)
    asked = commands.add_parser("what-if", help="what a run would get, when, and who would give")
    asked.add_argument("spec", type=Path, help="the run's spec (YAML), as for jobs/train.py")
    asked.add_argument("--snapshot", type=Path, required=True, help="a recorded snapshot of the pool (JSON)")
    asked.add_argument("--min", type=int, default=1, metavar="GROUPS", help="replica groups below which it cannot go (default: 1)")
    asked.add_argument("--max", type=int, metavar="GROUPS", help="most replica groups (default: as many as have a shard each)")
    asked.add_argument("--tier", choices=TIERS, default="standard")
    asked.add_argument("--priority", type=int, default=0)
    asked.add_argument("--project", default="default")
    asked.set_defaults(run=_what_if)


def _limit(text: str) -> int | str:
    if text != _NO_LIMIT and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"invalid limit {text!r}: give a whole number, or `{_NO_LIMIT}`")
    return text if text == _NO_LIMIT else int(text)


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid day {text!r}: give one as 2026-11-26") from error


# --- Now -------------------------------------------------------------------------------------------------------------


def _start(store: ObjectStore, pool: Pool) -> None:
    pool.start(store.url)
    print(f"The pool goes on with the runs that are wanted in {store.url}; `tidepool queue` tells how they stand.")


def _show(options: argparse.Namespace, pool: Pool) -> None:
    view = pool.view()
    if options.json:
        print(json.dumps({key: view[key] for key in ("nodes", "runs", "deployments")}, indent=2))
        return
    nodes = [("NODE", "KIND", "GPUS", "FREE", "CPUS", "FREE", "STATE")]
    for node in view["nodes"]:
        counts = (str(node[key]) for key in ("gpus", "free_gpus", "cpus", "free_cpus"))
        nodes.append((node["name"], node["kind"], *counts, f"quarantined: {node['quarantined']}" if node["quarantined"] else "in use"))
    runs = [("RUN", "PROJECT", "TIER", "PRIORITY", "GROUPS")]
    for run in view["runs"]:
        groups = f"{run['groups']} ({run['min']} to {run['max']})"
        runs.append((run["run"], run["project"], run["tier"], str(run["priority"]), groups))
    deployments = [("DEPLOYMENT", "PROJECT", "REPLICAS", "WANTED", "ALLOWED", "WHY NOT MORE")]
    for one in view["deployments"]:
        allowed = "-" if one["allowed"] is None else str(one["allowed"])
        deployments.append((one["name"], one["project"], str(one["replicas"]), str(one["wanted"]), allowed, one["reason"]))
    blocks = [table(rows) for rows in (nodes, runs, deployments) if len(rows) > 1]
    print("\n\n".join("\n".join(block) for block in blocks) or "The cluster has no nodes yet.")


# --- Projects --------------------------------------------------------------------------------------------------------


def _quota(options: argparse.Namespace, store: ObjectStore) -> None:
    is_change = options.remove or options.training is not None or options.serving is not None
    if not is_change:
        _tell_quotas(options.project, read_quotas(store))
        return
    if options.project is None:
        raise SpecError("Whose quota? Give the project: `tidepool pool quota PROJECT --training 8`.")
    if options.remove and (options.training is not None or options.serving is not None):
        raise SpecError("--remove takes both limits away: give it alone, or one limit as `none`.")
    try:
        _name.validate_python(options.project)
    except ValidationError as error:
        raise SpecError(f"{options.project!r} cannot be a project: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
    before = next((one for one in read_quotas(store) if one.project == options.project), Quota(options.project))
    serving, training = (
        None if options.remove or given == _NO_LIMIT else old if given is None else given
        for given, old in ((options.serving, before.serving_gpus), (options.training, before.training_gpus))
    )
    change_quota(store, Quota(options.project, serving, training))
    _tell_quotas(options.project, read_quotas(store))


def _tell_quotas(project: str | None, quotas: tuple[Quota, ...]) -> None:
    chosen = [quota for quota in quotas if project in (None, quota.project)]
    if not chosen:
        print("No project has a quota." if project is None else f"Project {project} has no quota: it may hold what there is.")
        return
    rows = [(one.project, *("-" if limit is None else str(limit) for limit in (one.training_gpus, one.serving_gpus))) for one in chosen]
    print("\n".join(table([("PROJECT", "TRAINING", "SERVING"), *rows])))


def _usage(options: argparse.Namespace, store: ObjectStore) -> None:
    days = read_usage(store, options.since)
    total = total_of(days, options.project)
    if options.json:
        print(json.dumps({"since": days[0].name if days else None, "until": _until(days), "projects": [vars(used) for used in total]}))
        return
    if not total:
        print(f"Nothing was held{f' by {options.project}' if options.project else ''} that this store knows of.")
        return
    rows = [(used.project, used.purpose, f"{used.gpu_s / 3600:,.2f}", f"{used.cpu_s / 3600:,.2f}") for used in total]
    print("\n".join(table([("PROJECT", "FOR", "GPU HOURS", "CPU HOURS WITHOUT GPU"), *rows])))
    print(f"\nFrom {days[0].name} to {_until(days)}.")


def _until(days: list[Day]) -> str | None:
    return datetime.fromtimestamp(days[-1].until_s, UTC).isoformat("T", "seconds") if days else None


# --- On a recorded snapshot ------------------------------------------------------------------------------------------


def _explain(options: argparse.Namespace) -> None:
    print("\n".join(explain(_load(options.snapshot), Rules(), options.name)))


def _what_if(options: argparse.Namespace) -> None:
    spec = load_spec(options.spec, RunSpec)
    print("\n".join(what_if(_load(options.snapshot), _run_of(spec, options), Rules())))


def _run_of(spec: RunSpec, options: argparse.Namespace) -> Run:
    workers, shards = spec.workers, spec.training.num_shards
    if workers.gpus_per_worker % 1:
        raise SpecError(f"workers.gpus_per_worker is {workers.gpus_per_worker}: the pool counts whole GPUs.")
    largest = options.max if options.max is not None else max(options.min, shards // workers.num_workers)
    if not 1 <= options.min <= largest:
        raise SpecError(f"A run needs 1 <= --min <= --max (got {options.min} and {largest}).")
    return Run(
        spec.run,
        options.project,
        options.min,
        largest,
        shards,
        submitted_s=0.0,
        tier=options.tier,
        priority=options.priority,
        workers_per_group=workers.num_workers,
        worker=Resources(int(workers.gpus_per_worker), math.ceil(workers.cpus_per_worker)),
    )


def _load(path: Path) -> Snapshot:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise SpecError(f"Cannot read the snapshot {path}: {error.strerror}. Give the path of a JSON file.") from error
    except ValueError as error:
        raise SpecError(f"{path} is not JSON: {error}") from error
    return snapshot_from_json(value, str(path))
