"""How fast a dataset is prepared, and how long a step waits for its samples on a store that answers after 50 ms.

    python benchmarks/data.py [--json FILE] [--quick]

Preparation: from text files to shards in a local store, against the tokenizer's own `encode_batch_fast` on the same texts in
memory, in batches of the same size, alternating; both use as many threads as RAYON_NUM_THREADS says (all cores by default).

Waiting: four worker processes take steps of 100 ms together (a pause in place of computing, a barrier in place of the
exchange), each on a `Dataset` of its own over a store whose every call takes 50 ms longer; the peer is the same without
`training.prefetch`. Seconds are those of the worker that waited longest.
"""

import argparse
import json
import multiprocessing as mp
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

from tidepool.data import Dataset, DatasetInfo, Samples, find_dataset, prepare
from tidepool.models import load_tokenizer, train_tokenizer
from tidepool.specs import DataSpec, TrainingSpec, parse_spec
from tidepool.storage import ObjectInfo, ObjectStore, open_store
from tidepool.training.batch import shard_samples
from tidepool.training.prefetch import Prefetch
from tidepool.training.sharding import owned_shards

_LATENCY_S, _STEP_S = 0.05, 0.1
_NUM_WORKERS = 4
_BATCH_CHARACTERS = 2**18
_TIMEOUT_S = 600
TRAINING = TrainingSpec(steps=1, global_batch_size=32, num_shards=8)
Row = dict[str, Any]


class SlowStore:
    """A store whose calls take longer by the latency of a network."""

    def __init__(self, store: ObjectStore) -> None:
        self._store, self.url = store, store.url

    def put_if_absent(self, key: str, data: bytes | Path) -> None:
        time.sleep(_LATENCY_S)
        self._store.put_if_absent(key, data)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        time.sleep(_LATENCY_S)
        return self._store.get(key, start, length)

    def size(self, key: str) -> int:
        time.sleep(_LATENCY_S)
        return self._store.size(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        time.sleep(_LATENCY_S)
        return self._store.list(prefix)

    def delete(self, key: str) -> None:
        time.sleep(_LATENCY_S)
        self._store.delete(key)


# --- Preparation -----------------------------------------------------------------------------------------------------


class Corpus:
    """Python's own library as texts, and a tokenizer trained on a part of it."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.texts = folder, folder / "texts"
        self.texts.mkdir()
        self.documents: list[str] = []
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
            text = path.read_text(errors="replace") if "site-packages" not in path.parts else ""
            if text.strip() and max_bytes > 0:
                (self.texts / f"{len(self.documents):05}.txt").write_text(text)
                self.documents.append(text)
                max_bytes -= len(text)
        train_tokenizer(self.documents[:400], 16_384).save_pretrained(folder / "tokenizer")
        self.tokenizer = load_tokenizer(folder / "tokenizer")
        self.num_tokens = sum(map(len, self.tokenizer(self.documents, verbose=False)["input_ids"]))

    def prepare(self, store_url: str) -> DatasetInfo:
        """Ours: the whole way from files to a manifest."""
        spec = {"store": store_url, "dataset": "stdlib", "inputs": [{"path": str(self.texts)}], "tokenizer": {"of": "x"}}
        spec |= {"sequence_length": 256, "samples_per_row_group": 64, "row_groups_per_shard": 16}
        return prepare(parse_spec(spec, DataSpec), self.tokenizer, self.folder / "tokenizer", open_store(store_url))

    def encode(self) -> None:
        """The peer: the tokenizer alone."""
        batch: list[str] = []
        for document in [*self.documents, None]:
            if document is None or sum(map(len, batch)) >= _BATCH_CHARACTERS:
                self.tokenizer.backend_tokenizer.encode_batch_fast(batch)
                batch = []
            batch += [document] if document is not None else []


def measure_preparation(corpus: Corpus, num_runs: int) -> list[Row]:
    """Tokens a second of ours and of the tokenizer alone, by the clock and by the processor time of all threads."""
    ours, peer = [], []
    for run in range(-1, num_runs):  # the first one warms up
        url = (corpus.folder / f"store{run}").as_uri()
        ours.append(_seconds(lambda url=url: corpus.prepare(url)))  # type: ignore[misc]
        peer.append(_seconds(corpus.encode))
    rates = [[corpus.num_tokens / one[kind] for one in runs[1:]] for kind in (0, 1) for runs in (ours, peer)]
    name, reached = "tokenizers encode_batch_fast", lambda mine, theirs: mine >= 0.8 * theirs
    return [
        row("preparation", "tokens/s", rates[0], name, rates[1], 0.8, reached),
        row("preparation by processor time", "tokens/cpu-s", rates[2], name, rates[3], 0.8, reached),
    ]


def _seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Of the clock, and of the processor in all threads."""
    started, cpu_started = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - started, time.process_time() - cpu_started


# --- Waiting ---------------------------------------------------------------------------------------------------------


def measure_waiting(store_url: str, num_steps: int, num_runs: int) -> list[Row]:
    """How long the steps wait, with and without reading ahead."""
    waits: dict[bool, list[list[float]]] = {True: [], False: []}
    for _ in range(num_runs):
        for is_ahead in (True, False):
            waits[is_ahead].append(_run_workers(store_url, num_steps, is_ahead))
    first, later, waiting = (
        {is_ahead: [measure(run) for run in runs] for is_ahead, runs in waits.items()}
        for measure in (lambda run: run[0], lambda run: sum(run[1:]), lambda run: float(sum(one > 0 for one in run[1:])))
    )
    what = f"{num_steps} steps of {_STEP_S * 1000:g} ms, 4 workers, {_LATENCY_S * 1000:g} ms latency"
    peer = "reading in the step"
    return [
        row(f"data wait after the first step, {what}", "s", later[True], peer, later[False], 0.0, lambda mine, _: mine == 0),
        row(f"steps that waited after the first, {what}", "steps", waiting[True], peer, waiting[False], 0.0, lambda mine, _: mine == 0),
        row("data wait of the first step", "s", first[True], peer, first[False]),
    ]


def _run_workers(store_url: str, num_steps: int, is_ahead: bool) -> list[float]:
    """The longest wait of any worker, for each step."""
    context = mp.get_context("spawn")
    barrier, results = context.Barrier(_NUM_WORKERS), context.Queue()
    workers = [context.Process(target=_work, args=(store_url, rank, num_steps, is_ahead, barrier, results)) for rank in range(_NUM_WORKERS)]
    for worker in workers:
        worker.start()
    waits = [results.get(timeout=_TIMEOUT_S) for _ in workers]
    for worker in workers:
        worker.join(_TIMEOUT_S)
    return [max(step) for step in zip(*waits, strict=True)]


def _work(store_url: str, rank: int, num_steps: int, is_ahead: bool, barrier: Any, results: Any) -> None:
    store = SlowStore(open_store(store_url))
    dataset = Dataset(store, find_dataset(store, "stdlib"), "train", 32)
    shards = owned_shards(rank, _NUM_WORKERS, TRAINING.num_shards)

    def read(step: int, shard: int) -> Samples:
        return dataset.read(shard_samples(step, shard, TRAINING, 0, dataset.layout))

    barrier.wait(_TIMEOUT_S)
    waits = []
    with closing(Prefetch(read, TRAINING.shard_size * dataset.sample_bytes)) as prefetch:
        if is_ahead:
            prefetch.plan(range(num_steps), shards)
        for step in range(num_steps):
            waited_s = prefetch.waited_s
            for shard in shards:
                prefetch.take(step, shard)
                time.sleep(_STEP_S / len(shards))
            waits.append(prefetch.waited_s - waited_s)
            barrier.wait(_TIMEOUT_S)
    results.put(waits)


# --- Results ---------------------------------------------------------------------------------------------------------


def row(
    metric: str,
    unit: str,
    ours: list[float],
    peer_name: str,
    peer: list[float],
    target: float | None = None,
    reached: Callable[[float, float], bool] | None = None,
) -> Row:
    """One line of the results; medians."""
    mine, theirs = statistics.median(ours), statistics.median(peer)
    return {
        "metric": metric,
        "unit": unit,
        "ours": round(mine, 4),
        "peer": round(theirs, 4),
        "peer_name": peer_name,
        "ratio": round(mine / theirs, 3) if theirs else None,
        "target": target,
        "reached": reached(mine, theirs) if reached else None,
        "ours_runs": [round(one, 4) for one in ours],
        "peer_runs": [round(one, 4) for one in peer],
    }


def main() -> int:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="less text, fewer steps, one run")
    options = parser.parse_args()
    num_runs, num_steps, max_bytes = (1, 40, 2_000_000) if options.quick else (5, 200, 3_000_000)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="tidepool-bench-") as folder:
        corpus = Corpus(Path(folder), max_bytes)
        head = {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            "load": [round(one, 1) for one in os.getloadavg()],
            "date": datetime.now(UTC).isoformat("T", "seconds"),
            "commit": commit,
            "corpus": f"{len(corpus.documents)} texts, {corpus.num_tokens} tokens",
        }
        rows = measure_preparation(corpus, num_runs)
        rows += measure_waiting((corpus.folder / "store-1").as_uri(), num_steps, 1 if options.quick else 3)
    print(json.dumps(head))
    for one in rows:
        print(f"{one['metric']:<80} {one['ours']:>12} {one['unit']:<12} {one['peer']:>12} {one['peer_name']:<30} x{one['ratio']}")
    if options.json:
        options.json.write_text(json.dumps([head, *rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
