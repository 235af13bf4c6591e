"""`jobs/train.py` whose workers fail where a test wants it: `faulty_job.py SPEC FAULTS [--first-gpu]`.

FAULTS is a JSON list of objects: in replica group `group` (any, if it is left out), when `function` ("module:Class.method") is
called while the worker holds `step` or a later one, and `when` (Python over its `args`) is true, `do` kill (SIGKILL), stop
(SIGSTOP), raise, hang (for ever, in the main thread alone), or wait (a `StepLoop`, until there is the file `until`). `once` is a file
that is made by the process that does it, so that no other does it again; with `always`, all do.

With `--first-gpu` all workers compute on the first GPU of the machine, of which Ray need not know.
"""

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

from tidepool.errors import TidepoolError
from tidepool.specs import RunSpec, load_spec
from tidepool.telemetry import configure_logging
from tidepool.training.driver import train
from tidepool.training.job import tell


def faulty_worker(config: Mapping[str, Any]) -> None:
    """The worker of a replica group, with the `faults` of its configuration built in."""
    from tidepool.training.member import Member
    from tidepool.training.ray_worker import train_worker

    held = {"step": 0}
    holds = Member.holds

    def note(self: Member, step: int | None, digest: str, shard_s: float = 0.0) -> None:
        held["step"] = held["step"] if step is None else step
        holds(self, step, digest, shard_s)

    Member.holds = note  # type: ignore[method-assign]
    if config["first_gpu"]:
        _share_first_gpu()
    for fault in config["faults"]:
        if fault.get("group", config["group"]) == config["group"]:
            _build_in(fault, held)
    train_worker(config)


def _share_first_gpu() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # Ray hides them all from workers that asked for none
    import ray.train.torch
    import torch

    from tidepool.training import process_group

    meeting_point = process_group.MeetingPoint
    ray.train.torch.get_device = lambda: torch.device("cuda", 0)
    process_group.MeetingPoint = lambda host, **_: meeting_point(host, is_gpu_shared=True)  # type: ignore[assignment, misc]


def _build_in(fault: dict[str, Any], held: dict[str, int]) -> None:
    module_name, _, path = fault["function"].partition(":")
    owner_name, _, name = path.rpartition(".")
    owner = importlib.import_module(module_name)
    if owner_name:
        owner = getattr(owner, owner_name)
    original = getattr(owner, name)

    @wraps(original)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        is_there = held["step"] >= fault.get("step", 0) and eval(fault.get("when", "True"), {"args": args})
        if is_there and _is_first(fault):
            if fault["do"] != "wait":
                print(f"fault: {fault['do']} at step {held['step']} in {path}", file=sys.stderr, flush=True)
            match fault["do"]:
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "hang":
                    threading.Event().wait()
                case "wait":
                    while not Path(fault["until"]).exists():
                        args[0].watch.tick("step")  # it is not stuck
                        args[0].watch.check()
                        time.sleep(0.05)
                case "raise":
                    raise ValueError(f"a fault of the test at step {held['step']}")
        return original(*args, **kwargs)

    setattr(owner, name, faulty)


def _is_first(fault: dict[str, Any]) -> bool:
    if fault.get("always"):
        return True
    try:
        Path(fault["once"]).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    configure_logging()
    spec, faults = load_spec(sys.argv[1], RunSpec), json.loads(sys.argv[2])

    def worker(config: Mapping[str, Any]) -> None:
        faulty_worker({**config, "faults": faults, "first_gpu": "--first-gpu" in sys.argv})

    try:
        outcome = train(spec, worker)
    except TidepoolError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(tell(spec, outcome))
