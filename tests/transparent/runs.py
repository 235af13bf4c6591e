"""Starts scripts, plainly or under `tidepool.run`, and kills them where it is told to.

Each start is a process of its own, forked from one that has loaded PyTorch: what a start costs is otherwise mostly that.
"""

import multiprocessing
import os
import re
import runpy
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
_JOIN_S = 30


@dataclass(frozen=True)
class Outcome:
    """How a process ended, and what it said."""

    status: int | None
    output: str
    messages: str

    @property
    def committed(self) -> list[int]:
        """The steps that were committed."""
        return [int(step) for step in re.findall(r"^tidepool.run: committed step (\d+)", self.messages, re.MULTILINE)]


class Starter:
    """Starts scripts in one folder, which has their store, too."""

    def __init__(self, context: ForkServerContext, folder: Path) -> None:
        self._context, self.folder = context, folder

    @property
    def store_url(self) -> str:
        """Where `resumable` commits."""
        return f"file://{self.folder}/store"

    def plain(self, script: Path, *arguments: str) -> Outcome:
        """`python script.py ...`."""
        return self._start(_run_plainly, [str(script), *arguments], None, {})

    def resumable(
        self, script: Path, *arguments: str, options: Sequence[str] = (), on: str = "", signal_to_send: int = signal.SIGKILL, **more: Any
    ) -> Outcome:
        """`python -m tidepool.run ... script.py ...`; gets a signal when it has said what the pattern `on` matches.

        `more` is given to `_run_resumable`.
        """
        command = ["--run", "r", "--store", self.store_url, *options, str(script), *arguments]
        return self._start(_run_resumable, command, (on, signal_to_send) if on else None, more)

    def weights(self) -> dict[str, Tensor]:
        """What the script saved at its end, which is removed."""
        file = self.folder / "model.safetensors"
        tensors = load_file(file)
        file.unlink()
        return tensors

    def _start(self, target: Any, command: list[str], kill: tuple[str, int] | None, more: dict[str, Any]) -> Outcome:
        pipe, output = self.folder / "messages", self.folder / "output"
        os.mkfifo(pipe)
        process = self._context.Process(target=_enter, args=(target, str(self.folder), command, more))
        process.start()
        assert process.pid is not None
        messages = []
        with pipe.open(errors="replace") as lines:
            for line in lines:
                messages.append(line)
                if kill and re.search(kill[0], line):
                    os.killpg(process.pid, kill[1])
                    kill = None
        process.join(_JOIN_S)
        pipe.unlink()
        return Outcome(process.exitcode, output.read_text(), "".join(messages))


def fork_server() -> ForkServerContext:
    """Where the processes are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "safetensors.torch", "torch.utils.data", "tidepool.transparent", "tests.transparent.runs"])
    with pytest.MonkeyPatch.context() as patch:
        # What is loaded ahead is looked for by the path of the server, and hashes are to be those of every start.
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'platform'}")
        patch.setenv("PYTHONHASHSEED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def _enter(target: Any, folder: str, command: list[str], more: dict[str, Any]) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.pop("WORLD_SIZE", None)
    for path, descriptor in (("output", 1), ("messages", 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    target(command, **more)


def _run_plainly(command: list[str]) -> None:
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def _run_resumable(
    command: list[str], kill_at_put: int = 0, after_it: bool = False, count_calls: bool = False, environment: dict[str, str] | None = None
) -> None:
    """`kill_at_put`: SIGKILL of this process at its n-th put into the store; `count_calls`: say how often `Linear` computed."""
    from tidepool import run

    os.environ |= environment or {}
    if kill_at_put:
        _kill_at_put(kill_at_put, after_it)
    calls = _count_calls() if count_calls else []
    status = run.main(command)
    if count_calls:
        print(f"Linear computed {len(calls)} times", file=sys.stderr)
    sys.exit(status)


def _kill_at_put(number: int, after_it: bool) -> None:
    from tidepool.storage.local import LocalStore

    original, left = LocalStore.put_if_absent, [number]

    def put(store: LocalStore, key: str, data: Any) -> None:
        left[0] -= 1
        if left[0] == 0 and not after_it:
            os.kill(os.getpid(), signal.SIGKILL)
        original(store, key, data)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    LocalStore.put_if_absent = put  # type: ignore[method-assign]


def _count_calls() -> list[None]:
    import torch

    original, calls = torch.nn.Linear.forward, list[None]()

    def forward(module: torch.nn.Linear, value: Tensor) -> Tensor:
        calls.append(None)
        return original(module, value)

    torch.nn.Linear.forward = forward  # type: ignore[method-assign]
    return calls
