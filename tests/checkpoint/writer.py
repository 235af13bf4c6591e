"""A writer in a process of its own, to be killed: claims a run, commits two steps, removes all but the newest one.

It says on a pipe what it knows as done: a line `committed <step>` as soon as a commit was reported, `retained` at the end.
"""

import io
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch

from tidepool.checkpoint import Checkpoints, claim_incarnation
from tidepool.storage import open_store

STEPS = (1, 2)
_AUDITED = ("open", "os.mkdir", "os.link", "os.remove", "os.rmdir", "os.rename")
_DEADLINE_S = 20


def state(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """What is committed at a step."""
    return {"model": {"w": torch.full((100,), float(step))}}


def write(url: str, run: str, environment: dict[str, str], done: Connection) -> None:
    """The writer's whole life, if nobody kills it. `environment` opens the store."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    store = open_store(url, _DEADLINE_S)
    checkpoints = Checkpoints(store, run, claim_incarnation(store, run, {}))
    for step in STEPS:
        checkpoints.save(step, state(step), {})
        done.send(f"committed {step}")
    checkpoints.retain(1)
    done.send("retained")


def write_and_die(url: str, run: str, at_operation: int, done: Connection) -> None:
    """As `write` in a local directory, but killed by itself right before its n-th operation on files there (from 0).

    A file that was opened to be written counts once more before anything is written to it.
    """
    root, count = url.removeprefix("file://"), 0
    fsync, open_file = os.fsync, io.open

    def operate() -> None:
        nonlocal count
        if count == at_operation:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in _AUDITED and any(str(argument).startswith(root) for argument in arguments[:2]):
            operate()

    def counted_fsync(descriptor: int) -> None:
        operate()
        fsync(descriptor)

    def counted_open(path: Any, mode: str = "r", *arguments: Any) -> Any:
        file = open_file(path, mode, *arguments)
        if not mode.startswith("r") and str(path).startswith(root):
            operate()
        return file

    sys.addaudithook(audit)
    os.fsync, io.open = counted_fsync, counted_open
    write(url, run, {}, done)
    done.send(f"operations {count}")
