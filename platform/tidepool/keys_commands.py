"""`tidepool keys create | list | revoke`: who may use the API (see `serving.keys`). A key is shown once, by `create`."""

import argparse
from collections.abc import Callable

from tidepool.serving.keys import ApiKey, KeyLog
from tidepool.serving.limits import Limits
from tidepool.storage import ObjectStore

OpenStore = Callable[[argparse.Namespace], ObjectStore]
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent_requests")


def add_keys_commands(parser: argparse.ArgumentParser, open_store: OpenStore) -> list[argparse.ArgumentParser]:
    """Add the commands to the parser of `tidepool keys`; each sets `run`, which takes its store from `open_store`. Returns them."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    creating = commands.add_parser("create", help="make a key and show it, this once")
    creating.add_argument("name", metavar="NAME", help="what it is for, or whose it is")
    creating.add_argument("--project", help="a label, by which use is told apart")
    creating.add_argument(
        "--model", action="append", metavar="REF", dest="models", help="a model that it may use; again for more (default: all)"
    )
    creating.add_argument("--admin", action="store_true", help="it may also see all keys and their use (GET /admin/keys)")
    for limit in _LIMITS:
        creating.add_argument(f"--{limit.replace('_', '-')}", type=_at_least_one, metavar="N", help="default: no limit")
    creating.set_defaults(run=lambda options: _create(options, KeyLog(open_store(options))))
    listing = commands.add_parser("list", help="all keys: scopes, limits, whether they are revoked; never the keys themselves")
    listing.set_defaults(run=lambda options: _list(KeyLog(open_store(options))))
    revoking = commands.add_parser("revoke", help="let a key in no more; gateways know it within two seconds")
    revoking.add_argument("id", metavar="ID", help="as `tidepool keys list` shows it")
    revoking.set_defaults(run=lambda options: _revoke(options, KeyLog(open_store(options))))
    return [creating, listing, revoking]


def _create(options: argparse.Namespace, log: KeyLog) -> None:
    limits = Limits(**{limit: getattr(options, limit) for limit in _LIMITS})
    key, secret = log.create(options.name, options.project, options.models, options.admin, limits)
    print(f"Created the key {key.id} ({_scope(key)}). Keep it now: it is stored as a hash, and nobody can show it again.")
    print(secret)


def _list(log: KeyLog) -> None:
    rows = [("ID", "NAME", "PROJECT", "MODELS", "LIMITS", "CREATED", "STATE")]
    for key in log.all():
        state = f"revoked {key.revoked_at}" if key.revoked_at else "valid"
        rows.append((key.id, key.name, key.project or "-", _scope(key), _limits(key.limits), key.created_at, state))
    if len(rows) == 1:
        print("There are no keys in this store yet: `tidepool keys create NAME` makes one.")
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _revoke(options: argparse.Namespace, log: KeyLog) -> None:
    key = log.revoke(options.id)
    print(f"{key.id} ({key.name}) is revoked since {key.revoked_at}.")


def _scope(key: ApiKey) -> str:
    models = "all" if key.models is None else ",".join(key.models)
    return f"{models}+admin" if key.is_admin else models


def _limits(limits: Limits) -> str:
    words = {"requests_per_minute": "requests/min", "tokens_per_minute": "tokens/min", "concurrent_requests": "at a time"}
    return ", ".join(f"{value} {words[name]}" for name, value in vars(limits).items() if value is not None) or "-"


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"invalid limit {text!r}: give a whole number of at least 1")
    return int(text)
