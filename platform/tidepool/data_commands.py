"""`tidepool data inspect`: a prepared dataset on the terminal. The lines are made in `data.inspection`."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tidepool.errors import SpecError
from tidepool.scratch import ScratchFolder
from tidepool.storage import ObjectStore


def add_data_commands(parser: argparse.ArgumentParser, store_of: Callable[[argparse.Namespace], ObjectStore]) -> argparse.ArgumentParser:
    """Add the commands below `tidepool data`; returns the parser of the one that needs a store."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="samples of a prepared dataset, with what is learned of them in colour")
    inspect.add_argument("dataset", help="name, or name@digest")
    inspect.add_argument("--split", choices=("train", "held_out"), default="train")
    inspect.add_argument("--num", type=int, default=3, metavar="N", help="how many samples (default: 3)")
    inspect.set_defaults(run=lambda options: _inspect(options, store_of(options)))
    return inspect


def _inspect(options: argparse.Namespace, store: ObjectStore) -> None:
    from tidepool.data import Dataset, fetch_tokenizer, find_dataset
    from tidepool.data.inspection import pieces, render, summary
    from tidepool.models import load_tokenizer  # it brings torch, which the other commands do without

    if options.num < 0:
        raise SpecError(f"--num {options.num}: give how many samples to show, 0 or more.")
    info = find_dataset(store, options.dataset)
    dataset = Dataset(store, info, options.split, cache_row_groups=1)
    numbers = range(min(options.num, len(dataset)))
    samples = dataset.read(numbers)
    with ScratchFolder("inspect") as folder:
        tokenizer = load_tokenizer(fetch_tokenizer(store, info, Path(folder)))
    use_color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    lines = summary(info, options.split)
    for number in numbers:
        sample = pieces(samples, number, lambda tokens: str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False)))
        lines += ["", *render(number, sample, info.sequence_length, use_color)]
    print("\n".join(lines))
