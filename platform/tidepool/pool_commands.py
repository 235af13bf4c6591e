"""`tidepool pool`: the policy's answers on a recorded snapshot. Reads files and prints; what is said comes from `pool`."""

import argparse
import json
import math
from pathlib import Path

from tidepool.errors import SpecError
from tidepool.messages import Resources, Run, Snapshot
from tidepool.pool import Rules
from tidepool.pool.explanation import explain, what_if
from tidepool.pool.recording import snapshot_from_json
from tidepool.pool.rules import TIERS
from tidepool.specs import RunSpec, load_spec


def add_pool_commands(parser: argparse.ArgumentParser) -> None:
    """Add `explain` and `what-if`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
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
