"""Where a step's time goes: the operators of the step loop, or of the Trainer, that take most of it. For reading, not for figures.

    python benchmarks/profile_step.py [--setting NAME] [--how exact|fast|trainer] [--out FILE]

The settings are those of gpu_train.py on this machine. The first line compares the clock, the device's time and the host's: where
the device's is far below the clock's, the host is what is waited for.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import torch
from gpu_train import OURS, PEER, SETTINGS, TOKENIZER_SIZE, Side, dataset_name, new_model, train_peer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from turns import Over, prepare_stdlib, train_ours

from tidepool.scratch import ScratchFolder
from tidepool.training.group import LocalGroup
from tidepool.training.numerics import prepare_process

_WARM_UP, _STEPS = 4, 2


class Profiled:
    """Called before each step: lets some pass, profiles the next ones, and ends the training."""

    def __init__(self, device: str) -> None:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
        self.profiler, self._taken = profile(activities=activities), 0
        self._wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.elapsed_s = self.cpu_s = 0.0

    def __call__(self) -> None:
        if self._taken == _WARM_UP:
            self._wait()
            self.profiler.start()
            self.elapsed_s, self.cpu_s = -time.perf_counter(), -time.process_time()
        if self._taken == _WARM_UP + _STEPS:
            self._wait()
            self.elapsed_s += time.perf_counter()
            self.cpu_s += time.process_time()
            self.profiler.stop()
            raise Over
        self._taken += 1


def main() -> int:
    """Profile a few steps and print the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS[device]), default=next(iter(SETTINGS[device])))
    parser.add_argument("--how", choices=(*OURS, PEER), default="exact")
    parser.add_argument("--out", type=Path, metavar="FILE")
    options = parser.parse_args()
    setting, turn = SETTINGS[device][options.setting], Profiled(device)
    torch.set_num_threads(1)
    with ScratchFolder("profile") as folder, suppress(Over):
        name = dataset_name(setting)
        store_url = prepare_stdlib(Path(folder), name, setting.sequence_length, TOKENIZER_SIZE, not setting.is_packed)
        side = Side(options.how, setting, store_url, device)
        if options.how in OURS:
            prepare_process(torch.device(device), 1)
            train_ours(side.spec(), new_model(side), LocalGroup(), turn, [])
        else:
            train_peer(side, turn, [], Path(folder))
    averages, times = turn.profiler.key_averages(), {"by the clock": turn.elapsed_s, "of the host's processors": turn.cpu_s}
    if device == "cuda":
        kernels = [one for one in averages if one.device_type == DeviceType.CUDA and not one.is_user_annotation]
        times["of the device"] = sum(one.self_device_time_total for one in kernels) / 1e6
    head = f"{options.setting}, {options.how}, a step: " + ", ".join(f"{time_s / _STEPS:.3f} s {of}" for of, time_s in times.items())
    by = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    table = head + "\n" + averages.table(sort_by=by, row_limit=40, max_name_column_width=80)
    print(table)
    if options.out:
        options.out.write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
