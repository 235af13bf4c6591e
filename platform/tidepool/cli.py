"""The `tidepool` command: models, keys, runs, the pool and its queue, datasets, stores, and a local cluster.

Runs are submitted with `ray job submit` (see jobs/).

Exit status: 0 done, 1 an error (one message says what to do), 2 a command line that makes no sense.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tidepool import __version__, local_cluster
from tidepool.cluster_process import ask_cluster
from tidepool.data_commands import add_data_commands
from tidepool.errors import ClusterError, SpecError, TidepoolError
from tidepool.keys_commands import add_keys_commands
from tidepool.model_commands import add_model_commands
from tidepool.pool.live_pool import LivePool
from tidepool.pool_commands import add_pool_commands
from tidepool.queue_commands import add_priority_command, add_queue_command
from tidepool.registry import ModelVersion, Registry
from tidepool.run_commands import add_run_commands
from tidepool.specs import STORE_VARIABLE
from tidepool.storage import ObjectStore, open_store
from tidepool.store_commands import add_store_commands
from tidepool.training.live_runs import Cluster

_CLUSTER_FILE = Path(".tidepool/cluster.json")
_LOCAL_STORE = Path(".tidepool/store")
_DEFAULT_STORE = f"default: ${STORE_VARIABLE}, else the store of the cluster that `tidepool up` started here"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except TidepoolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tidepool", description="One pool of GPUs that trains and serves, on Ray.")
    parser.add_argument("--version", action="version", version=f"tidepool {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_models(commands.add_parser("models", help="list, show, promote and roll back published models; import, merge, export"))
    for command in add_keys_commands(commands.add_parser("keys", help="keys to the API: create, list, revoke"), _store):
        _add_store(command, _DEFAULT_STORE)
    runs = commands.add_parser("runs", help="training runs: list, show, resize, pause, stop, resume, set-priority")
    on_runs = runs.add_subparsers(required=True, metavar="COMMAND")
    for command in (*add_run_commands(on_runs, _store, _cluster), add_priority_command(on_runs, _store, _pool)):
        _add_store(command, _DEFAULT_STORE)
    add_queue_command(commands.add_parser("queue", help="which runs wait for a place, at which place and why"), _pool)
    add_store_commands(commands.add_parser("store", help="check that an object store is fit for commits"))
    inspect = add_data_commands(commands.add_parser("data", help="look at prepared datasets"), _store)
    _add_store(inspect, _DEFAULT_STORE)
    pool = commands.add_parser("pool", help="who holds which GPU, and why; what projects may hold and have used; what a run would get")
    for command in add_pool_commands(pool, _store, _pool):
        _add_store(command, _DEFAULT_STORE)
    up = commands.add_parser("up", help="start a Ray cluster on this machine and serve what is published in its store")
    _add_store(up, f"default: ${STORE_VARIABLE}, else a local directory, {_LOCAL_STORE}")
    up.add_argument("--num-cpus", type=int, default=4, help="logical CPUs: how many workers and replicas fit at a time (default: 4)")
    up.set_defaults(run=_up)
    commands.add_parser("down", help="stop the cluster that `tidepool up` started here").set_defaults(run=_down)
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="all models and where their aliases point")
    listing.set_defaults(run=_list_models)
    show = commands.add_parser("show", help="a version: what it is, where it came from, its files")
    show.add_argument("model", help="name, name@version or name:alias")
    show.set_defaults(run=_show_model)
    promote = commands.add_parser("promote", help="point an alias at a version")
    promote.add_argument("model", help="name@version")
    promote.add_argument("--alias", default="production")
    promote.add_argument("--expected", type=int, metavar="VERSION", help="do it only if the alias points to this version now")
    promote.add_argument("--canary", type=float, metavar="SHARE", help="leave the alias, and give the version this share of its requests")
    promote.set_defaults(run=_promote)
    rollback = commands.add_parser("rollback", help="take the last move of an alias back, a canary too")
    rollback.add_argument("model", help="name")
    rollback.add_argument("--alias", default="production")
    rollback.set_defaults(run=_rollback)
    for command in (listing, show, promote, rollback, *add_model_commands(commands, _store)):
        _add_store(command, _DEFAULT_STORE)


def _add_store(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--store", metavar="URL", help=f"the object store: s3://bucket/prefix or file:///folder ({default})")


def _registry(options: argparse.Namespace) -> Registry:
    return Registry(_store(options))


def _store(options: argparse.Namespace) -> ObjectStore:
    url = options.store or os.environ.get(STORE_VARIABLE)
    if url is None and (cluster := local_cluster.load(_CLUSTER_FILE)) is not None:
        url = cluster.store_url
    if url is None:
        raise SpecError(f"Which store? Give --store s3://bucket/prefix (or file:///folder), or set {STORE_VARIABLE}.")
    return open_store(url)


def _cluster() -> Cluster:
    return Cluster(_environment())


def _pool() -> LivePool:
    return LivePool(_environment())


def _environment() -> Mapping[str, str]:
    """That of the cluster of `RAY_ADDRESS`, else of the one that `tidepool up` started here."""
    if "RAY_ADDRESS" not in os.environ and (cluster := local_cluster.load(_CLUSTER_FILE)) is not None:
        return cluster.environment
    return os.environ


def _list_models(options: argparse.Namespace) -> None:
    registry = _registry(options)
    rows = [("MODEL", "KIND", "BASE", "ALIASES", "PUBLISHED")]
    for name in registry.names():
        aliases = registry.aliases(name)
        for version in registry.versions(name):
            here = ", ".join(sorted(alias for alias, number in aliases.items() if number == version.number))
            rows.append((version.ref, version.kind, version.base or "-", here or "-", version.published_at))
    if len(rows) == 1:
        print("No models are published in this store yet. A run publishes one if its spec has `publish`.")
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _show_model(options: argparse.Namespace) -> None:
    registry = _registry(options)
    version = registry.resolve(options.model)
    for key, value in _details(version).items():
        print(f"{key:>13}  {value}")
    for alias, number in sorted(registry.aliases(version.name).items()):
        moves = registry.history(version.name, alias)
        history = " -> ".join(f"{move.number}" + (f" and {move.canary.number}" if move.canary else "") for move in moves)
        beside = f", and {moves[-1].canary.weight:.3g} of it {version.name}@{moves[-1].canary.number}" if moves[-1].canary else ""
        print(f"{'alias':>13}  {alias} = {version.name}@{number}{beside} (history: {history})")
    for file in version.files:
        print(f"{'file':>13}  {file.path}  {file.size_bytes} bytes  sha256 {file.sha256}")


def _details(version: ModelVersion) -> dict[str, str]:
    base = f"{version.base} (digest {version.base_digest})" if version.base else "-"
    shown = {"model": version.ref, "kind": version.kind, "digest": version.digest, "base": base, "published": version.published_at}
    shown |= {key: str(value) for key, value in version.lineage.items()}
    return shown | {key: f"{value:.6g}" for key, value in version.metrics.items()}


def _promote(options: argparse.Namespace) -> None:
    registry = _registry(options)
    name, _, number = options.model.partition("@")
    if not number.isdigit():
        raise SpecError(f"Which version of {name}? Give {name}@VERSION; `tidepool models list` shows them.")
    registry.promote(name, int(number), options.alias, expected=options.expected, canary_weight=options.canary)
    if options.canary is None:
        print(f"{name}:{options.alias} is {name}@{number} now.", flush=True)
    else:
        print(f"{name}@{number} gets {options.canary:.3g} of the requests to {name}:{options.alias} now.", flush=True)
    _announce(name)


def _rollback(options: argparse.Namespace) -> None:
    version = _registry(options).rollback(options.model, options.alias)
    print(f"{options.model}:{options.alias} is {version.ref} now.", flush=True)
    _announce(options.model)


def _announce(name: str) -> None:
    """Tell who serves in the cluster that is known here, if any is: they look by themselves too, every second or as their spec says."""
    try:
        ask_cluster(_environment(), "tidepool.announcement", name)
    except ClusterError as error:
        if "RAY_ADDRESS" in os.environ:
            print(f"Who serves it was not told, and sees it by itself: {error}.", file=sys.stderr)


def _up(options: argparse.Namespace) -> None:
    if (running := local_cluster.load(_CLUSTER_FILE)) is not None:
        raise ClusterError(f"A cluster runs already (dashboard {running.dashboard_url}); stop it first: make down.")
    url = options.store or os.environ.get(STORE_VARIABLE) or _LOCAL_STORE.absolute().as_uri()
    store = open_store(url)
    print("Starting a Ray cluster", flush=True)
    cluster = local_cluster.start(url, options.num_cpus, Path(".tidepool/ray.log"), usual_ports=True, find_gpus=True)
    local_cluster.save(cluster, _CLUSTER_FILE)
    try:
        LivePool(cluster.environment).start(url)
    except ClusterError as error:
        print(f"The first run that is submitted starts the pool: {error}", flush=True)
    models = Registry(store).names()
    if models:
        print(f"Serving {', '.join(models)}", flush=True)
        local_cluster.serve(cluster, models)
    print(f"store      {url}\ndashboard  {cluster.dashboard_url}")
    if models:
        print(f"API        {cluster.api_url} (models: {', '.join(models)})")
        print(f"           {cluster.direct_url} (the same at the gateway itself: streams cost less)")
    else:
        print("API        not served: no model is published in this store yet; jobs/README.md shows how to train one")
    print(f"submit     ray job submit --address {cluster.dashboard_url} --working-dir . -- python jobs/prepare.py jobs/prepare.yaml")
    print("stop       make down")


def _down(_options: argparse.Namespace) -> None:
    cluster = local_cluster.load(_CLUSTER_FILE)
    if cluster is None:
        print("No cluster runs that `tidepool up` started here.")
    else:
        local_cluster.stop(cluster)
        print("Stopped.")
    _CLUSTER_FILE.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
