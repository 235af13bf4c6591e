"""`tidepool store ...`: whether an object store is fit for Tidepool. The checks are in `storage.fitness`."""

import argparse

from tidepool.errors import StoreUnfitError
from tidepool.storage import check_fitness, endpoint, open_store


def add_store_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands to the parser of `tidepool store`; each sets `run`."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="try what commits need of a store, on the store; leaves nothing in it")
    check.add_argument("url", help="s3://bucket/prefix or file:///folder; S3 is opened by the AWS_... variables")
    check.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> None:
    store = open_store(options.url)
    at = f" at {endpoint()}" if options.url.startswith("s3:") else ""
    print(f"Checking {store.url}{at}", flush=True)
    failed = []
    for finding in check_fitness(store):
        print(f"  {'ok  ' if finding.is_fit else 'FAIL'}  {finding.name:<16}  {finding.detail}", flush=True)
        if not finding.is_fit:
            failed.append(finding.name)
            print(f"        {'':<16}  This would cost: {finding.cost}.", flush=True)
    if failed:
        raise StoreUnfitError(f"{store.url} is not fit for Tidepool ({', '.join(failed)}): use another store, or have this one repaired.")
    print(f"{store.url} is fit for Tidepool.")
