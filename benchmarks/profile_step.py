"""Where a step's time goes on a GPU: the operators of the step loop that take most of it. For reading, not for figures.

python benchmarks/profile_step.py [--device cuda] [--kind full] [--out FILE]
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import torch
from overhead import SETTINGS, VOCAB_SIZE, Side, new_model
from torch.profiler import ProfilerActivity, profile
from turns import Over, prepare_stdlib, train_ours

from tidepool.scratch import ScratchFolder
from tidepool.training.group import LocalGroup
from tidepool.training.numerics import prepare_process

_WARM_UP, _STEPS = 4, 4


def main() -> int:
    """Profile a few steps and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SETTINGS), default="cpu")
    parser.add_argument("--kind", choices=("lora", "full"), default="full")
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args()
    prepare_process(torch.device(options.device), 1)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if options.device == "cuda" else [])
    profiler, taken = profile(activities=activities), 0

    def turn() -> None:
        nonlocal taken
        if taken == _WARM_UP:
            profiler.start()
        if taken == _WARM_UP + _STEPS:
            profiler.stop()
            raise Over
        taken += 1

    with ScratchFolder("profile") as folder:
        store_url = prepare_stdlib(Path(folder), "stdlib", SETTINGS[options.device].sequence_length, VOCAB_SIZE)
        side = Side("exact", options.kind, 1, store_url, options.device)
        with suppress(Over):
            train_ours(side.spec(), new_model(side), LocalGroup(), turn, [])
    by = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)
    print(table)
    if options.out:
        options.out.write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
