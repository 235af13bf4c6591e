"""Processes that train and take turns, so that what is compared was measured in the same minutes: for overhead.py and gpu_train.py.

Each side of a comparison is one process or several, all alive from the first turn to the last. A turn is a few steps; whoever waits
gives back the memory of its GPU that it does not hold anything in. Every side tells the losses of all of its steps at the end.
"""

import math
import multiprocessing as mp
import os
import platform
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import torch
from transformers import PreTrainedModel

from tidepool.data import Dataset, find_dataset, prepare
from tidepool.models import load_tokenizer, train_tokenizer
from tidepool.specs import DataSpec, RunSpec, parse_spec
from tidepool.storage import open_store
from tidepool.telemetry import MemorySink
from tidepool.training.commits import BackgroundCommits
from tidepool.training.group import Group
from tidepool.training.loop import StepLoop
from tidepool.training.member import Alone
from tidepool.training.numerics import resolve_dtype
from tidepool.training.watch import Wishes

_TIMEOUT_S = 300
Row = dict[str, Any]
Turn = Callable[[], None]
"""Blocks between two steps when it is somebody else's turn; raises `Over` when there are no more."""
Train = Callable[[Turn, list[float]], None]
"""Trains until `Over`: calls the turn before each step, and appends each step's loss (floats, or tensors of one)."""


class Over(BaseException):
    """No more turns."""


@dataclass(frozen=True)
class Done:
    """What one process has to tell at the end; `peak_bytes` is of its GPU's memory, by what tensors took."""

    losses: list[float]
    peak_bytes: int


def take_turns(train: Train, pipe: Connection, device: torch.device, num_warm_up: int = 0, begin: Turn = lambda: None) -> None:
    """One process of a side: takes as many steps as it is told and answers how long they took; 0 ends it.

    The first `num_warm_up` steps of each turn come on top, without the clock. `begin` is called when a turn begins.
    """
    losses: list[float] = []
    left, unclocked, started, cpu_started = 0, 0, 0.0, 0.0

    def turn() -> None:
        nonlocal left, unclocked, started, cpu_started
        if left == 0:
            _synchronize(device)
            pipe.send((time.perf_counter() - started, time.process_time() - cpu_started))
            if device.type == "cuda":
                torch.cuda.empty_cache()
            num_steps, unclocked = pipe.recv(), num_warm_up
            if num_steps == 0:
                raise Over
            left = num_steps + num_warm_up
            begin()
        if unclocked == 0:
            _synchronize(device)
            started, cpu_started = time.perf_counter(), time.process_time()
        left, unclocked = left - 1, unclocked - 1

    try:
        train(turn, losses)
    except Over:
        peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        pipe.send(Done([float(loss) for loss in losses], peak_bytes))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Workers:
    """The processes of a side, waiting for their turn."""

    def __init__(self, name: str, target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> None:
        """Starts one process for each element of `arguments`: `target`, with these and the pipe of `take_turns`."""
        context = mp.get_context("spawn")
        self._name = name
        self._pipes, self._processes = [], []
        for given in arguments:
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(*given, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def wait(self) -> tuple[float, float]:
        """Wait for the end of a turn (or of the start); returns its seconds (the slowest process's) and processor seconds (everybody's)."""
        elapsed_s, cpu_s = zip(*(self._receive(pipe) for pipe in self._pipes), strict=True)
        return max(elapsed_s), sum(cpu_s)

    def take(self, num_steps: int) -> tuple[float, float]:
        """Take a turn; returns what `wait` does."""
        for pipe in self._pipes:
            pipe.send(num_steps)
        return self.wait()

    def finish(self) -> list[Done]:
        """End the processes; returns what each of them tells."""
        for pipe in self._pipes:
            pipe.send(0)
        told = [self._receive(pipe) for pipe in self._pipes]
        for process in self._processes:
            process.join(_TIMEOUT_S)
        return told

    def kill(self) -> None:
        """Leave no process behind, whatever happened."""
        for process in self._processes:
            process.kill()
            process.join()

    def _receive(self, pipe: Connection) -> Any:
        if not pipe.poll(_TIMEOUT_S):
            raise TimeoutError(f"A process of {self._name} said nothing for {_TIMEOUT_S} s.")
        try:
            return pipe.recv()
        except EOFError as error:
            raise ChildProcessError(f"A process of {self._name} failed; what it printed says why.") from error


def train_ours(spec: RunSpec, model: PreTrainedModel, group: Group, turn: Turn, losses: list[float]) -> None:
    """The step loop as a worker builds it; turns change between its steps."""
    store = open_store(spec.store)
    splits = [Dataset(store, find_dataset(store, spec.dataset), name, 16) for name in ("train", "held_out")]

    class Turns(Alone):
        has_begun = False

        def wishes(self) -> Wishes:  # asked once before the first step, and once in each
            if self.has_begun:
                turn()
            self.has_begun = True
            return Wishes()

    commits = BackgroundCommits(0, lambda *_: None, committed_step=lambda: sys.maxsize)  # so that none is due
    dtype = resolve_dtype(spec.training.precision, next(model.parameters()).device)
    loop = StepLoop(spec, model, *splits, dtype, MemorySink(), Turns(1, None, 0), commits)
    loop.history.losses = losses
    loop.history.evaluations.append((0, math.nan))  # so that it does not begin with one
    loop.begin()
    loop.run(group)


def prepare_stdlib(folder: Path, dataset: str, sequence_length: int, vocab_size: int, as_one_document: bool = False) -> str:
    """Python's own source as samples in a store below the folder; returns the store's URL.

    Its files are documents, packed, and one in twenty is held out; or all of them are one document, so that every sample is
    a piece of it alone, and nothing is held out.
    """
    store_url, texts = (folder / "store").as_uri(), folder / f"{dataset} texts"
    texts.mkdir()
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))[:100]
    contents = {path.name: path.read_text() for path in paths}
    if not (folder / "tokenizer").exists():
        train_tokenizer(list(contents.values()), vocab_size).save_pretrained(folder / "tokenizer")
    for name, text in {"all.py": "\n".join(contents.values())}.items() if as_one_document else contents.items():
        (texts / name).write_text(text)
    spec = {"store": store_url, "dataset": dataset, "inputs": [{"path": str(texts)}], "tokenizer": {"of": "x"}}
    spec |= {"sequence_length": sequence_length, "held_out_fraction": 0.0 if as_one_document else 0.05}
    prepare(parse_spec(spec, DataSpec), load_tokenizer(folder / "tokenizer"), folder / "tokenizer", open_store(store_url))
    return store_url


def loss_difference(ours: list[float], peer: list[float]) -> float:
    """The largest relative difference between the losses of a step; NaN if a loss is."""
    return max((abs(one - other) / other for one, other in zip(ours, peer, strict=True)), key=lambda one: (math.isnan(one), one))


def check_losses(ours: list[float], peer: list[float], most: float) -> None:
    """Both sides have learned the same, or the comparison says nothing."""
    worst = loss_difference(ours, peer)
    if not worst <= most:  # NaN is not
        raise RuntimeError(f"The losses differ by up to {worst:.2%}, so the two sides do not do the same work: {ours} and {peer}.")


def head_row(device: str, model: str) -> Row:
    """Where and when, and of what commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux, torch {torch.__version__}; "
        + (torch.cuda.get_device_name() if device == "cuda" else "1 thread a worker"),
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "commit": commit,
        "load_average": [round(one, 1) for one in os.getloadavg()],  # what else the machine did before
        "model": model,
    }
