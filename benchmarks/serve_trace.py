"""What serving over HTTP costs beside the bare engine, and a real trace replayed through it.

    python benchmarks/serve_trace.py [--json FILE] [--quick] [--trace CSV] [--parts NAME ...]

All on one machine's cores: engine, gateway, Serve's proxy and the clients. Random-weight Llamas of 4 and 88 million parameters
(`engine.py`), one replica with two threads. Parts:

- `throughput`: 64 requests at one time, 64 tokens each. The peer is the same requests at the bare engine, in a process of its own; they
  take turns. `throughput_over_engine` is the median of the rounds' ratios (88M: at most 10 % lost). `throughput_through_proxy` is the
  same through Serve's proxy; all else here is asked for at the gateway's own port.
- `latency`: requests arrive as in the trace, at half of the throughput that the engine had. `added_ttft_ms` is the median time to the
  first token over HTTP less that at the bare engine, for the same arrivals, which the sides take turns with (88M: 25 ms at most).
- `streaming`: the 4M model, 16 streams of 64 tokens, against two deployments of Serve that stream token by token over a handle, with
  the same engine and the same kind of events (at least twice its tokens a second).
- `trace`: the Azure trace replayed through HTTP against the 4M model: its arrivals, made slower by a factor so that they take `LOAD`
  of what was measured, and its lengths, divided by `SHORTER`. [`failures`, `ttft_p50_ms`, `ttft_p99_ms`, `itl_p50_ms`, `tokens_per_s`]
"""

import argparse
import asyncio
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import torch

from benchmarks.engine import MODELS, VOCAB_SIZES, export
from benchmarks.http_load import Answered, complete, percentile
from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster
from tidepool.registry import Registry
from tidepool.scratch import ScratchFolder
from tidepool.storage import open_store

Row = dict[str, Any]
THREADS, MAX_BATCH_SIZE = 2, 64
SHORTER, LOAD, HALF = 16, 0.5, 0.5
WEIGHTS = {"4m": "fp32", "88m": "bf16"}
PARTS = ("throughput", "latency", "streaming", "trace")
TRACE = ROOT.parent / "shared" / "data" / "azure_llm_2023_conv.csv"


@dataclass(frozen=True)
class Ask:
    """One request: when it comes, in seconds from the beginning, and its lengths in tokens."""

    at_s: float
    prompt: list[int]
    num_tokens: int

    @property
    def body(self) -> dict[str, Any]:
        """For /v1/completions; an end token may come by chance, in few answers."""
        return {"model": "base", "prompt": self.prompt, "max_tokens": self.num_tokens, "temperature": 0}


def read_trace(path: Path, vocab: int, shorter: int, seed: int) -> list[Ask]:
    """The trace's arrivals and lengths; prompts of tokens drawn at random."""
    rng = random.Random(seed)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    return [
        Ask(
            (at - times[0]).total_seconds(),
            rng.choices(range(10, vocab), k=max(1, int(row["ContextTokens"]) // shorter)),
            max(2, int(row["GeneratedTokens"]) // shorter),
        )
        for at, row in zip(times, rows, strict=True)
    ]


def burst(model: str, seed: int, num: int = 64, num_tokens: int = 64) -> list[Ask]:
    """Requests that come at one time, as in `engine.py`."""
    rng = random.Random(seed)
    vocab = range(10, VOCAB_SIZES[model])
    return [Ask(0.0, rng.choices(vocab, k=rng.randint(16, 128)), num_tokens) for _ in range(num)]


# --- Sides -----------------------------------------------------------------------------------------------------------


class Engine:
    """The bare engine in a process of its own (`engine_alone.py`)."""

    def __init__(self, folder: Path, weights: str) -> None:
        command = [sys.executable, str(ROOT / "benchmarks" / "engine_alone.py"), str(folder), weights, str(THREADS), str(MAX_BATCH_SIZE)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "the engine did not start: what it said stands above"

    def play(self, asks: Sequence[Ask]) -> list[Answered]:
        """Answer requests as they come."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([[ask.at_s, ask.prompt, ask.num_tokens] for ask in asks]) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline())
        return [Answered(at, 200, [""] * len(times), times, is_done=True) for at, times in found]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def play_http(port: int, asks: Sequence[Ask], path: str = "/v1/completions") -> list[Answered]:
    """Ask over HTTP as the requests come."""

    async def one(ask: Ask, begun: float) -> Answered:
        await asyncio.sleep(max(0.0, begun + ask.at_s - time.perf_counter()))
        return await complete("127.0.0.1", port, ask.body, path)

    async def run() -> list[Answered]:
        begun = time.perf_counter()
        return await asyncio.gather(*(one(ask, begun) for ask in asks))

    return asyncio.run(run())


@contextmanager
def serving(folder: Path, model: str) -> Iterator[LocalCluster]:
    """A cluster that serves a model as `base`."""
    store_url = (folder / f"store-{model}").as_uri()
    Registry(open_store(store_url)).publish("base", "full", folder / model, lineage={"benchmark": "serve_trace"}, metrics={})
    cluster = local_cluster.start(store_url, num_cpus=4, log=folder / f"ray-{model}.log")
    try:
        engine = {"weights": WEIGHTS[model], "threads": THREADS, "max_batch_size": MAX_BATCH_SIZE, "max_queued_requests": 4096}
        local_cluster.serve(cluster, ["base"], engine=engine)
        yield cluster
    finally:
        local_cluster.stop(cluster)


def rate(answers: Sequence[Answered]) -> float:
    """Tokens a second, from the first request to the last token. Raises `RuntimeError` if a request failed."""
    if failed := [one for one in answers if one.is_failure]:
        raise RuntimeError(f"{len(failed)} requests failed, the first one with {failed[0].status}: {failed[0].error}")
    num_tokens = sum(len(one.times) for one in answers)
    return num_tokens / (max(one.times[-1] for one in answers if one.times) - min(one.asked_at for one in answers))


def ttfts_ms(answers: Sequence[Answered]) -> list[float]:
    """Times to the first text."""
    return [1000 * one.ttft_s for one in answers if one.times]


# --- Parts -----------------------------------------------------------------------------------------------------------


def compare(folder: Path, model: str, parts: Sequence[str], num_rounds: int, num_arrivals: int, trace: Path) -> list[Row]:
    """Throughput and latency of a model over HTTP, against the bare engine."""
    rows: list[Row] = []
    engine = Engine(folder / model, WEIGHTS[model])
    try:
        with serving(folder, model) as cluster:
            found: dict[str, list[float]] = {"ours": [], "proxy": [], "engine": []}
            for number in range(-1, num_rounds):
                asks = burst(model, number)
                sides = {
                    "ours": lambda asks=asks: play_http(cluster.direct_port, asks),
                    "proxy": lambda asks=asks: play_http(cluster.http_port, asks),
                    "engine": lambda asks=asks: engine.play(asks),
                }
                for name in random.Random(number).sample(sorted(sides), len(sides)):
                    reached = rate(sides[name]())
                    if number >= 0:
                        found[name].append(reached)
            theirs = found["engine"]
            target = 0.9 if model == "88m" else None
            if "throughput" in parts:
                rows.append(row(f"throughput_over_engine_{model}", "tokens/s", found["ours"], theirs, "the bare engine", target))
                rows.append(row(f"throughput_through_proxy_{model}", "tokens/s", found["proxy"], theirs, "the bare engine", None))
            if "latency" in parts:
                asks = read_trace(trace, VOCAB_SIZES[model], SHORTER, 1)
                ttfts: dict[str, list[float]] = {"ours": [], "engine": []}
                for number in range(num_rounds):
                    part = paced(asks[number * num_arrivals : (number + 1) * num_arrivals], HALF * statistics.median(theirs))
                    both = {"ours": lambda part=part: play_http(cluster.direct_port, part), "engine": lambda part=part: engine.play(part)}
                    for name in random.Random(number).sample(sorted(both), 2):
                        ttfts[name] += ttfts_ms(both[name]())
                served = statistics.median(ttfts["ours"])
                limit = 25.0 if model == "88m" else None
                rows.append(plain(f"added_ttft_ms_{model}", "ms", served - statistics.median(ttfts["engine"]), limit))
                rows.append(plain(f"ttft_p50_ms_at_half_load_{model}", "ms", served, None))
    finally:
        engine.close()
    return rows


def paced(asks: Sequence[Ask], tokens_per_s: float) -> list[Ask]:
    """The same requests, the first one at once, faster or slower, so that they ask for so many tokens a second."""
    begun = asks[0].at_s
    factor = sum(ask.num_tokens for ask in asks) / tokens_per_s / (asks[-1].at_s - begun)
    return [Ask((ask.at_s - begun) * factor, ask.prompt, ask.num_tokens) for ask in asks]


def streaming(folder: Path, num_rounds: int) -> list[Row]:
    """16 streams of the 4M model, against token-by-token streaming between two deployments of Serve."""
    import ray
    from ray import serve

    from benchmarks.serve_peer import deploy

    ours: list[float] = []
    theirs: list[float] = []
    with serving(folder, "4m") as cluster:
        ray.init(cluster.address, log_to_driver=False)
        try:
            deploy(str(folder / "4m"), WEIGHTS["4m"], THREADS, MAX_BATCH_SIZE)
            for number in range(-1, num_rounds):
                asks = burst("4m", number, num=16)
                sides = [(cluster.direct_port, "/v1/completions", ours), (cluster.http_port, "/peer/completions", theirs)]
                for port, path, rates in random.Random(number).sample(sides, 2):
                    found = rate(play_http(port, asks, path))
                    if number >= 0:
                        rates.append(found)
            serve.delete("peer")
        finally:
            ray.shutdown()
    return [row("streaming_tokens_per_s_4m", "tokens/s", ours, theirs, "token by token over a handle of Serve's", 2.0)]


def replay(folder: Path, trace: Path, num_requests: int) -> list[Row]:
    """The trace through HTTP, at a share of what a burst reaches."""
    with serving(folder, "4m") as cluster:
        play_http(cluster.direct_port, burst("4m", -1))
        reached = rate(play_http(cluster.direct_port, burst("4m", 0)))
        asks = paced(read_trace(trace, VOCAB_SIZES["4m"], SHORTER, 2)[:num_requests], LOAD * reached)
        answers = play_http(cluster.direct_port, asks)
    failures = [one for one in answers if one.is_failure]
    for one in failures[:5]:
        print(f"failed: {one.status} {one.error}", file=sys.stderr)
    fine = [one for one in answers if not one.is_failure and one.times]
    gaps = [1000 * gap for one in fine for gap in one.gaps_s]
    return [
        plain("failures", "requests", len(failures), 0),
        plain("requests", "requests", len(answers), None),
        plain("ttft_p50_ms", "ms", statistics.median(ttfts_ms(fine)), None),
        plain("ttft_p99_ms", "ms", percentile(ttfts_ms(fine), 0.99), None),
        plain("itl_p50_ms", "ms", statistics.median(gaps), None),
        plain("itl_p99_ms", "ms", percentile(gaps, 0.99), None),
        plain("tokens_per_s", "tokens/s", rate(fine), None),
        plain("offered_tokens_per_s", "tokens/s", LOAD * reached, None),
    ]


# --- Rows ------------------------------------------------------------------------------------------------------------


def row(metric: str, unit: str, ours: list[float], theirs: list[float], peer: str, target: float | None) -> Row:
    """More is better."""
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    return {
        "metric": metric,
        "unit": unit,
        "ours": round(statistics.median(ours), 1),
        "peer": round(statistics.median(theirs), 1),
        "peer_name": peer,
        "ratio": round(ratio, 3),
        "target": target,
        "reached": None if target is None else ratio >= target,
        "ours_runs": [round(one, 1) for one in ours],
        "peer_runs": [round(one, 1) for one in theirs],
    }


def plain(metric: str, unit: str, ours: float, target: float | None) -> Row:
    """Without a peer; less is better."""
    return {
        "metric": metric,
        "unit": unit,
        "ours": round(ours, 2),
        "peer": None,
        "peer_name": None,
        "ratio": None,
        "target": target,
        "reached": None if target is None else ours <= target,
        "ours_runs": [],
        "peer_runs": [],
    }


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    for one in rows:
        mark = {True: "reached", False: "missed", None: ""}[one["reached"]]
        peer = "" if one["peer"] is None else f"{one['peer']:,.1f} {one['peer_name']}, x{one['ratio']}"
        print(f"{one['metric']:<36} {one['ours']:>12,.1f} {one['unit']:<9} {peer:<60} {mark}", flush=True)


def main() -> int:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="one round, and few requests of the trace")
    parser.add_argument(
        "--trace", type=Path, default=TRACE, metavar="CSV", help=f"TIMESTAMP,ContextTokens,GeneratedTokens (default: {TRACE})"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    head = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux, torch {torch.__version__}",
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "commit": commit,
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "models": MODELS,
        "trace": {"name": options.trace.name, "lengths_divided_by": SHORTER, "load": LOAD},
    }
    num_rounds, num_arrivals, num_requests = (1, 24, 100) if options.quick else (5, 60, 2000)
    rows: list[Row] = []
    with ScratchFolder("serve-trace") as scratch:
        folder = Path(scratch)
        for model in MODELS:
            export(model, folder)
        work = {
            "88m": lambda: compare(folder, "88m", options.parts, num_rounds, num_arrivals, options.trace),
            "4m": lambda: compare(folder, "4m", options.parts, num_rounds, num_arrivals, options.trace),
            "streaming": lambda: streaming(folder, num_rounds),
            "trace": lambda: replay(folder, options.trace, num_requests),
        }
        wanted = [name for name in ("88m", "4m") if {"throughput", "latency"} & set(options.parts)]
        for name in [*wanted, *(part for part in ("streaming", "trace") if part in options.parts)]:
            found = work[name]()
            show(found)
            rows += found
            if options.json:
                options.json.write_text(json.dumps([head, *rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
