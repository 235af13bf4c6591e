"""What a checkpoint costs training, and how fast it reaches the store: ours, waited for and in the background, and torch's.

    python benchmarks/checkpoint.py [--json FILE] [--quick] [--device cuda]

One worker trains a Llama, all of it: every side takes the same steps on the same model, one side after the other in an order
that changes, and makes one checkpoint of weights and AdamW's moments after the first step of its turn. `stall_s` is what the
turn took beyond the same steps without a checkpoint: the copy, and the slowdown of the steps while the rest goes on behind
them. Turns are as long as the slowest checkpoint, so that none of it is left out.

`bytes_per_s`: from the snapshot to the commit that stands, without training beside it, against one put of as many bytes by the
raw client: obstore's S3 client against an S3 server on loopback (moto: one process of Python), and a file that is written and
synced for the file store. Ours has a manifest, checksums and sizes read back besides; the raw client overwrites. Old commits are
removed after that, which counts in the stall and not here.

`stall_s_of_copy_and_write` is what the copy and a plain synced write, through the page cache, cost by themselves beside the same steps.

The peer is `torch.distributed.checkpoint.async_save` to files of the same disk, synced, as it comes, and its blocking `save`.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tidepool.checkpoint import Checkpoints, Commit, StoredObject, claim_incarnation, verify
from tidepool.checkpoint.snapshot import Snapshot
from tidepool.models import build_model
from tidepool.scratch import ScratchFolder
from tidepool.specs import OptimizerSpec
from tidepool.storage import ObjectStore, open_store
from tidepool.training.commits import BackgroundCommits, Taken
from tidepool.training.member import Alone
from tidepool.training.membership import Number, Quorum, WorkerId
from tidepool.training.optimizer import build_optimizer
from tidepool.training.sample_record import SampleRecord
from tidepool.training.state import History, capture, prepare_moments, trained_parameters

CONFIG = {
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
SIZES = {
    "cpu": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8},
    "cuda": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8},
}
BATCHES = {"cpu": (2, 128), "cuda": (16, 256)}
VOCAB_SIZE = 8192
FLOOR = "a copy and one synced write in the background"
TARGETS = {"stall": 0.02, "rate": 0.8}
_WATCH = Alone(1, None, 0)
Row = dict[str, Any]


class Training:
    """A model in training, and its steps."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(1)
        self.device = device
        self.model = build_model(CONFIG | SIZES[device.type], VOCAB_SIZE, seed=1).to(device).train()
        self.parameters = trained_parameters(self.model)
        self.optimizer = build_optimizer(self.parameters, OptimizerSpec(learning_rate=1e-4))
        prepare_moments(self.parameters, self.optimizer)
        self.tokens = torch.randint(VOCAB_SIZE, BATCHES[device.type], device=device)
        self.num_steps = 0

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        return capture(self.parameters, self.optimizer, History())

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for group in self.state().values() for t in group.values())

    def step(self, before_update: Callable[[], None]) -> None:
        """One step; `before_update` is called when the gradients are there."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        before_update()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
        float(loss.detach())


class Ours:
    """Our commits into a store."""

    def __init__(self, store: ObjectStore, max_lag_s: float) -> None:
        self._store, self._run, self._newest = store, f"bench-{uuid.uuid4().hex[:8]}", 0
        self._checkpoints = Checkpoints(store, self._run, claim_incarnation(store, self._run, {}))
        self._commits = BackgroundCommits(max_lag_s, self._finish, lambda: self._newest)
        quorum = Quorum(Number(0, 1), (WorkerId(1, 0),), "", 0, None, (), 1, None, from_base=True)
        self._commits.enter(quorum, self._checkpoints)
        self._last: Commit | None = None

    def _finish(self, taken: Taken, commit: Commit, objects: list[StoredObject]) -> None:
        taken.checkpoints.commit(commit, objects, {})
        self.committed_at = time.perf_counter()
        taken.checkpoints.retain(1)
        self._newest, self._last = commit.step, commit

    def save(self, training: Training) -> None:
        self._commits.take(training.num_steps, training.state(), SampleRecord(), 0, 1)
        self._commits.keep_up(_WATCH)

    def before_update(self) -> None:
        self._commits.settle()

    def wait(self) -> None:
        self._commits.drain(_WATCH)

    def close(self) -> None:
        assert self._last is not None
        verify(self._store, self._run, self._last)
        self._commits.close()


class Torch:
    """`torch.distributed.checkpoint` to files."""

    def __init__(self, folder: Path, is_async: bool) -> None:
        self._folder, self._is_async = folder, is_async
        self._saving: Any = None

    def save(self, training: Training) -> None:
        path = self._folder / uuid.uuid4().hex
        writer = dcp.FileSystemWriter(path)
        state = {name: group for name, group in training.state().items() if group}
        if self._is_async:
            self._saving = dcp.async_save(state, storage_writer=writer)
        else:
            dcp.save(state, storage_writer=writer)
        self._old, self._path = getattr(self, "_path", None), path

    def before_update(self) -> None:
        """It has copied before it returned."""

    def wait(self) -> float:
        """Until it is there; returns when it was. The one before is removed then."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None
        saved_at = time.perf_counter()
        if self._old is not None:
            shutil.rmtree(self._old)
        return saved_at

    def close(self) -> None:
        shutil.rmtree(self._path)


class Floor:
    """A checkpoint at its plainest: the same copy, and one file written and synced. No checksum, no manifest, no commit."""

    def __init__(self, path: Path) -> None:
        self._path, self._snapshots = path, [Snapshot() for _ in range(3)]
        self._executor = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def save(self, training: Training) -> None:
        groups = [group for group in training.state().values() if group]
        self._copies = self._snapshots[: len(groups)]
        for snapshot, group in zip(self._copies, groups, strict=True):
            snapshot.begin(group, self._executor)
        self._writing = self._executor.submit(self._write)

    def _write(self) -> None:
        with self._path.open("wb") as file:
            for snapshot in self._copies:
                file.write(snapshot.data())
            os.fsync(file.fileno())

    def before_update(self) -> None:
        if self._writing is not None:
            for snapshot in self._copies:
                snapshot.settle()

    def wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        self._executor.shutdown()


class Nothing:
    """No checkpoint."""

    def save(self, _: Training) -> None: ...
    def before_update(self) -> None: ...
    def wait(self) -> None: ...
    def close(self) -> None: ...


Side = Ours | Torch | Floor | Nothing


def measure_stalls(training: Training, folder: Path, num_rounds: int) -> list[Row]:
    """Seconds that one checkpoint costs the steps around it, by side."""
    store = open_store((folder / "store").as_uri())
    sides: dict[str, Side] = {
        "none": Nothing(),
        "ours": Ours(store, 300),
        "ours, waited for": Ours(store, 0),
        "async_save": Torch(folder, is_async=True),
        "save": Torch(folder, is_async=False),
        "floor": Floor(folder / "floor"),
    }
    with closing_all(sides):
        num_steps = 2
        for side in sides.values():  # warm up, and see how long a turn must be
            started = time.perf_counter()
            take_turn(training, side, 1)
            side.wait()
            saved_s = time.perf_counter() - started
            started = time.perf_counter()
            training.step(lambda: None)
            num_steps = max(num_steps, 2 + int(2 * saved_s / (time.perf_counter() - started)))
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(num_rounds):
            for name in random.Random(number).sample(list(sides), len(sides)):
                started = time.perf_counter()
                take_turn(training, sides[name], num_steps)
                times[name].append(time.perf_counter() - started)
                sides[name].wait()
    step_s = statistics.median(times["none"]) / num_steps
    stalls = {name: [one - base for one, base in zip(taken, times["none"], strict=True)] for name, taken in times.items()}
    rows = [
        row("stall_s", "s", stalls["ours"], "ours, waited for", stalls["ours, waited for"], TARGETS["stall"], is_less_better=True),
        row(
            "stall_s_against_async_save",
            "s",
            stalls["ours"],
            "torch.distributed.checkpoint.async_save",
            stalls["async_save"],
            1.0,
            is_less_better=True,
        ),
        row("stall_s_against_copy_and_write", "s", stalls["ours"], FLOOR, stalls["floor"], None, is_less_better=True),
        row("stall_s_of_copy_and_write", "s", stalls["floor"], "ours, waited for", stalls["ours, waited for"], None, is_less_better=True),
        row("blocking_s", "s", stalls["ours, waited for"], "torch.distributed.checkpoint.save", stalls["save"], None, is_less_better=True),
    ]
    return [one | {"step_s": round(step_s, 4), "steps_a_turn": num_steps, "state_bytes": training.num_bytes} for one in rows]


@contextmanager
def closing_all(sides: dict[str, Side]) -> Iterator[None]:
    """Close every side."""
    try:
        yield
    finally:
        for side in sides.values():
            side.close()


def take_turn(training: Training, side: Side, num_steps: int) -> None:
    """A step, a checkpoint, and the other steps."""
    for number in range(num_steps):
        training.step(side.before_update)
        if number == 0:
            side.save(training)


def measure_rate(training: Training, folder: Path, num_rounds: int, is_s3: bool) -> list[Row]:
    """Bytes a second from the snapshot to the commit, against the raw client, and where it is files against torch's."""
    name = "s3" if is_s3 else "file"
    with raw_and_store(folder, is_s3) as (raw, store):
        ours, torchs = Ours(store, 300), Torch(folder, is_async=True)
        payload = memoryview(bytearray(random.Random(1).randbytes(2**20) * (training.num_bytes // 2**20)))

        def commit() -> float:
            training.step(ours.before_update)
            started = time.perf_counter()
            ours.save(training)
            ours.wait()
            return ours.committed_at - started

        def async_save() -> float:
            started = time.perf_counter()
            torchs.save(training)
            return torchs.wait() - started

        def put() -> float:
            started = time.perf_counter()
            raw(payload)
            return time.perf_counter() - started

        calls = {"ours": commit, "raw": put} | ({} if is_s3 else {"async_save": async_save})
        rates: dict[str, list[float]] = {side: [] for side in calls}
        for number in range(-1, num_rounds):  # the first one warms up
            for side in random.Random(number).sample(list(calls), len(calls)):
                elapsed_s = calls[side]()
                if number >= 0:
                    rates[side].append((len(payload) if side == "raw" else training.num_bytes) / elapsed_s)
        ours.close()
        if not is_s3:
            torchs.close()
    raw_name = "obstore, one put to moto" if is_s3 else "write and fsync of one file"
    rows = [row(f"bytes_per_s_{name}", "bytes/s", rates["ours"], raw_name, rates["raw"], TARGETS["rate"], is_less_better=False)]
    if not is_s3:
        peer = "torch.distributed.checkpoint.async_save"
        rows.append(row("bytes_per_s_against_async_save", "bytes/s", rates["ours"], peer, rates["async_save"], 1.0, is_less_better=False))
    return rows


@contextmanager
def raw_and_store(folder: Path, is_s3: bool) -> Iterator[tuple[Callable[[memoryview], None], ObjectStore]]:
    """A put of bytes without more ado, and our store at the same place."""
    if not is_s3:
        yield lambda data: write_file(folder / "raw", data), open_store((folder / "store").as_uri())
        return
    import obstore
    from obstore.store import S3Store

    from tests.stores.moto import moto

    with moto(folder / "moto.log") as server:
        os.environ.update(server.environment)
        server.create_bucket("bench")
        client = S3Store("bench", client_options={"allow_http": True, "timeout": "120s"})
        yield lambda data: void(obstore.put(client, "raw", data)), open_store("s3://bench")


def write_file(path: Path, data: memoryview) -> None:
    """As durable as a put into the file store."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def void(_value: object) -> None:
    """Drop a value."""


def row(metric: str, unit: str, ours: list[float], peer_name: str, peer: list[float], target: float | None, is_less_better: bool) -> Row:
    """One line of the results."""
    mine, theirs = statistics.median(ours), statistics.median(peer)
    ratio = mine / theirs
    reached = None if target is None else ratio <= target if is_less_better else ratio >= target
    return {
        "metric": metric,
        "unit": unit,
        "ours": round(mine, 4),
        "peer": round(theirs, 4),
        "peer_name": peer_name,
        "ratio": round(ratio, 4),
        "target": target,
        "reached": reached,
        "ours_runs": [round(one, 4) for one in ours],
        "peer_runs": [round(one, 4) for one in peer],
    }


def show(rows: list[Row]) -> None:
    """Print the table."""
    for one in rows:
        mark = {True: "reached", False: "missed", None: ""}[one["reached"]]
        print(
            f"{one['metric']:<32} {one['ours']:>16,} {one['unit']:<8} {one['peer']:>16,} {one['peer_name']:<42} x{one['ratio']:<8} {mark}"
        )


def main() -> int:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # as a worker of one CPU; the store has the other core
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    where = torch.cuda.get_device_name() if device.type == "cuda" else "1 thread trains"
    head: Row = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux, torch {torch.__version__}; {where}",
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "commit": commit,
        "load_average": [round(one, 1) for one in os.getloadavg()],  # what else the machine did before
    }
    num_rounds = 3 if options.quick else 15
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # async_save asks for one
    training = Training(device)
    with ScratchFolder("checkpoint") as folder:
        rows = measure_stalls(training, Path(folder), num_rounds)
        show(rows)
        for is_s3 in (False,) if device.type == "cuda" else (False, True):
            found = measure_rate(training, Path(folder), num_rounds, is_s3)
            show(found)
            rows += found
    dist.destroy_process_group()
    if options.json:
        options.json.write_text(json.dumps([head, *rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
