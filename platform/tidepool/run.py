"""`python -m tidepool.run script.py ...`: runs a PyTorch script so that it goes on where it was after a kill (`docs/transparent.md`).

Exit status: 0 done (or done before), 1 an error (one message says what to do), 2 a command line that makes no sense, 143 stopped by
SIGTERM after a commit, or what the script ends with.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tidepool.errors import TidepoolError
from tidepool.specs import STORE_VARIABLE

_HASH_SEED = "PYTHONHASHSEED"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    from tidepool.transparent import Options, execute  # after the hash seed: PyTorch takes seconds, and would be loaded twice

    logging.basicConfig(level=logging.WARNING, format="tidepool.run: %(message)s")
    try:
        given = _parse(arguments)
        execute(Options(given.script, given.arguments, given.run, given.store, given.every_s, given.every_steps, given.keep))
    except TidepoolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tidepool.run", description="Run a PyTorch script that goes on where it was killed.")
    parser.add_argument("--run", required=True, help="the name of this run: the same name goes on with it")
    parser.add_argument("--store", default=os.environ.get(STORE_VARIABLE), help=f"URL of the object store (default: ${STORE_VARIABLE})")
    parser.add_argument("--every-s", type=float, default=60.0, help="seconds between commits (default: 60)")
    parser.add_argument("--every-steps", type=int, help="commit after so many optimizer steps instead")
    parser.add_argument("--keep", type=int, default=3, help="how many commits to keep (default: 3)")
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of the script")
    given = parser.parse_args(arguments)
    if not given.store:
        parser.error(f"give --store URL, or set {STORE_VARIABLE}")
    return given


def _fix_hash_seed() -> None:
    """Start this process again with fixed hashes, so that sets of texts have one order in every start."""
    if os.environ.get(_HASH_SEED, "random") == "random":
        os.environ[_HASH_SEED] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tidepool.run", *sys.argv[1:]])


if __name__ == "__main__":
    _fix_hash_seed()
    sys.exit(main())
