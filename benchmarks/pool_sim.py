"""The pool's policy against other ways to share GPUs, in a simulation on real traces, and how long one round of it takes.

    python benchmarks/pool_sim.py [--json FILE] [--quick] [--data FOLDER] [--plots FOLDER]

The policy is the shipped code, not a copy. Jobs are a slice of the Philly trace, each elastic from one GPU to its size (and
again to twice its size); serving is the chat trace on a day-and-night curve (see `pool_trace`). Peers: (a) the pool split
once for training and serving, the best split found by search, training first come first served with backfill; (a') the same
split with our policy inside the training part; (b) one pool, first come first served with backfill and fixed sizes;
(c) stock elasticity without serving in view; (d) shortest remaining first with fixed sizes, every duration known.
All pay the same constants (`pool_world`); what favours the peers is listed in `pool_schedulers`.

`gpu_utilization` counts GPUs whose workers compute, and those of replicas that Serve's autoscaler wants, over the time in
which jobs arrive. Completion times are of all jobs that arrive in that time; the simulation goes on until the last has finished.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "platform"))

from pool_plots import Week, draw
from pool_scale import num_calls, states
from pool_schedulers import Fifo, PoolPolicy, ShortestFirst, StockElastic
from pool_trace import TraceJob, Traffic, read_chat, read_philly, serving_traffic, training_jobs
from pool_world import Measures, Scheduler, World

from tidepool.messages import Snapshot
from tidepool.pool import decide

LOAD = 0.70
"""Training work, of the pool's GPU time."""
SERVING = 0.30
"""What Serve wants on average, of the pool: together they ask for all of it."""
MIN_IN_SLO = 0.999


@dataclass(frozen=True)
class Scenario:
    """A pool, and how finely it is simulated."""

    num_gpus: int
    days: float
    spacing_s: float
    seeds: tuple[int, ...]
    peers_at: str = "1x 2x"
    """Which limits of the size are simulated; with `1x` alone, the split with our policy inside is left out, too."""

    @property
    def name(self) -> str:
        """As it stands in the rows."""
        return f"{self.num_gpus} GPUs, {self.days:g} days"


SCENARIOS = (
    Scenario(64, 7, 15.0, (1, 2, 3)),
    Scenario(256, 7, 30.0, (1,)),
    Scenario(10_000, 0.5, 60.0, (1,), peers_at="1x"),
)
QUICK = (Scenario(64, 0.5, 15.0, (1,)),)
SIZES = (1250, 2500, 5000, 10_000)
QUICK_SIZES = (250, 500)


@dataclass(frozen=True)
class Outcome:
    """The measures of one way to share, by metric."""

    values: dict[str, float]
    samples: list[tuple[float, float, float, int]]


# --- One pool ------------------------------------------------------------------------------------------------------------


def simulate(scenario: Scenario, seed: int, trace: list[TraceJob], chat: list[int]) -> dict[str, Outcome]:
    """Every way to share the same jobs and traffic."""
    gpus, days, spacing_s = scenario.num_gpus, scenario.days, scenario.spacing_s
    jobs = training_jobs(trace, gpus, days, LOAD, seed)
    traffic = serving_traffic(chat, gpus, days, SERVING, max(2, gpus // 32), seed)
    one_pool: dict[str, Callable[[], Scheduler]] = {
        "ours 1x": lambda: PoolPolicy(gpus, 1, spacing_s),
        "ours 2x": lambda: PoolPolicy(gpus, 2, spacing_s),
        "(b) FIFO with backfill": lambda: Fifo(spacing_s),
        "(c) stock elasticity": lambda: StockElastic(spacing_s),
        "(d) shortest remaining first": lambda: ShortestFirst(spacing_s),
    }
    splits: dict[str, type[Fifo] | None] = {"(a) static split": Fifo, "(a') static split, our policy inside": None}
    if "2x" not in scenario.peers_at:
        del one_pool["ours 2x"], splits["(a') static split, our policy inside"]
    outcomes = {}
    for name, scheduler in one_pool.items():
        outcomes[name] = _outcome(World(gpus, jobs, traffic, days * 86_400, scheduler()).run(), scenario)
        _say(scenario, seed, name, outcomes[name])
    for name, inside in splits.items():
        outcomes[name] = _best_split(scenario, jobs, traffic, inside)
        _say(scenario, seed, name, outcomes[name])
    return outcomes


def _best_split(scenario: Scenario, jobs: list[TraceJob], traffic: list[Traffic], inside: type[Fifo] | None) -> Outcome:
    """The split with the shortest mean completion time of those that keep serving in its objective.

    Fewer GPUs for training never shorten it, so the search is for the smallest part that serving can live with. All of
    that part serves all the time, and any replica helps any deployment, which favours the split.
    """
    gpus, minutes = scenario.num_gpus, range(int(scenario.days * 1440))
    needed = [sum(one.needed[minute] for one in traffic) for minute in minutes]
    wanted = [sum(one.wanted[minute] for one in traffic) for minute in minutes]

    def in_slo(part: int) -> float:
        return sum(need <= part for need in needed) / len(needed)

    low, high = 0, gpus
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if in_slo(middle) >= MIN_IN_SLO else (middle + 1, high)
    scheduler: Scheduler = inside(scenario.spacing_s) if inside else PoolPolicy(gpus - low, 1, scenario.spacing_s)
    measures = World(gpus - low, [job for job in jobs if job.size <= gpus - low], [], scenario.days * 86_400, scheduler).run()
    measures.used_gpu_s += 60.0 * sum(min(low, want) for want in wanted)
    outcome = _outcome(measures, scenario)
    outcome.values["serving_in_slo"] = in_slo(low)
    by_hour = [
        (second, part * (gpus - low) / gpus, min(low, wanted[int(second // 60) - 1]) / gpus, n) for second, part, _, n in outcome.samples
    ]
    return replace(outcome, samples=by_hour)


def _outcome(measures: Measures, scenario: Scenario) -> Outcome:
    times = sorted(measures.jct_s)
    values = {
        "mean_jct_s": statistics.mean(times),
        "p90_jct_s": times[int(0.9 * len(times))],
        "gpu_utilization": measures.used_gpu_s / scenario.num_gpus / (scenario.days * 86_400),
        "serving_in_slo": measures.in_slo_s / measures.of_slo_s if measures.of_slo_s else 0.0,
        "preemptions": float(measures.preemptions),
        "lost_gpu_hours": measures.lost_gpu_s / 3600,
    }
    return Outcome(values, measures.samples)


def _say(scenario: Scenario, seed: int, name: str, outcome: Outcome) -> None:
    shown = "  ".join(f"{metric} {value:.5g}" for metric, value in outcome.values.items())
    print(f"[{scenario.name}, seed {seed}] {name}: {shown}", file=sys.stderr, flush=True)


# --- Rows ----------------------------------------------------------------------------------------------------------------

_UNITS = {
    "mean_jct_s": "s",
    "p90_jct_s": "s",
    "gpu_utilization": "part",
    "serving_in_slo": "part",
    "preemptions": "count",
    "lost_gpu_hours": "GPU h",
}


def rows_of(scenario: Scenario, by_seed: list[dict[str, Outcome]]) -> list[dict[str, Any]]:
    """A row per metric and peer, for both limits of the size."""
    rows = []
    for ours in [name for name in by_seed[0] if name.startswith("ours")]:
        for peer in [name for name in by_seed[0] if not name.startswith("ours")]:
            for metric in _UNITS:
                mine = [outcomes[ours].values[metric] for outcomes in by_seed]
                theirs = [outcomes[peer].values[metric] for outcomes in by_seed]
                rows.append(_row(metric, f"{peer} [{scenario.name}, {ours.split()[1]} size]", mine, theirs))
    return rows


def _row(metric: str, peer_name: str, mine: list[float], theirs: list[float]) -> dict[str, Any]:
    ours, peer = statistics.median(mine), statistics.median(theirs)
    target: float | None = None
    reached: bool | None = None
    if metric == "serving_in_slo":
        target, reached = MIN_IN_SLO, ours >= MIN_IN_SLO
    elif peer_name.startswith("(a)") and metric == "mean_jct_s":
        target, reached = peer / 1.5, ours <= peer / 1.5
    elif peer_name.startswith("(a)") and metric == "gpu_utilization":
        target = min(0.95, peer + 0.25)
        reached = ours >= target
    return {
        "metric": metric,
        "unit": _UNITS[metric],
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "ratio": ours / peer if peer else None,
        "target": target,
        "reached": reached,
        "ours_runs": mine,
        "peer_runs": theirs,
    }


# --- One round ------------------------------------------------------------------------------------------------------------


def decision_rows(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """How long one round takes: the slowest of four states of a pool, each the median of nine rounds.

    It is one thread that computes and does not wait; its processor time is taken, since the machine may be shared. How that
    grows is also told by the number of functions called, which no neighbour on the machine and no cache can change.
    """
    slowest: dict[int, list[float]] = {}
    calls: dict[int, int] = {}
    for num_nodes in sizes:
        pools = states(num_nodes)
        calls[num_nodes] = max(num_calls(snapshot) for snapshot in pools.values())
        by_state = {name: _round_ms(snapshot) for name, snapshot in pools.items()}
        for name, times in by_state.items():
            print(f"[{num_nodes} nodes] {name}: {statistics.median(times):.1f} ms", file=sys.stderr, flush=True)
        slowest[num_nodes] = max(by_state.values(), key=statistics.median)
    medians = {num_nodes: statistics.median(times) for num_nodes, times in slowest.items()}
    small, large = sizes[0], sizes[-1]
    n_log_n = large * math.log(large) / (small * math.log(small))
    common = {"peer": None, "peer_name": None, "ratio": None, "peer_runs": None}
    rows = [
        {"metric": f"decision_ms_{n}_nodes", "unit": "ms", "ours": ms, **common, "target": 100.0 if n == 10_000 else None}
        | {"reached": ms <= 100.0 if n == 10_000 else None, "ours_runs": slowest[n]}
        for n, ms in medians.items()
    ]
    for what, growth in [("ms", medians[large] / medians[small]), ("calls", calls[large] / calls[small])]:
        metric = f"decision_{what}_growth_{small}_to_{large}_nodes"
        bound = {"target": n_log_n, "reached": growth <= n_log_n, "ours_runs": [growth]}
        rows.append({"metric": metric, "unit": "times", "ours": growth, **common, **bound})
    return rows


def _round_ms(snapshot: Snapshot) -> list[float]:
    times = []
    for _ in range(9):
        start = time.process_time()
        decide(snapshot)
        times.append((time.process_time() - start) * 1000)
    return times


# --- The report ----------------------------------------------------------------------------------------------------------


def head() -> dict[str, Any]:
    """Machine, date and commit."""
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    settings = {"load": LOAD, "serving": SERVING, "scenarios": [scenario.name for scenario in SCENARIOS]}
    return {"machine": machine, "date": datetime.now(UTC).isoformat("T", "seconds"), "commit": commit.stdout.strip(), **settings}


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows, for people."""
    for row in rows:
        peer = "" if row["peer"] is None else f"{row['peer']:>12.5g}  {row['peer_name']}"
        reached = {None: "", True: "reached", False: "NOT REACHED"}[row["reached"]]
        print(f"{row['metric']:<32}{row['ours']:>12.5g} {row['unit']:<6}{reached:<12}{peer}")


def main() -> None:
    """Simulate, measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description="Simulate the pool's policy and its peers on real traces.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="one small pool for one day, to see that it runs; no results to quote")
    parser.add_argument("--data", type=Path, default=ROOT / ".." / "shared" / "data", help="folder of the traces (default: ../shared/data)")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw utilisation and waiting of each pool here (needs matplotlib)")
    options = parser.parse_args()
    first, trace, chat = head(), read_philly(options.data), read_chat(options.data)
    rows: list[dict[str, Any]] = []
    rows += decision_rows(QUICK_SIZES if options.quick else SIZES)
    for scenario in QUICK if options.quick else SCENARIOS:
        by_seed = [simulate(scenario, seed, trace, chat) for seed in scenario.seeds]
        rows += rows_of(scenario, by_seed)
        if options.json:
            options.json.write_text(json.dumps([first, *rows], indent=1) + "\n")
        if options.plots:
            week: Week = {name: outcome.samples for name, outcome in by_seed[0].items()}
            draw(week, scenario.name, options.plots / f"pool_{scenario.num_gpus}_gpus.png")
    print_table(rows)


if __name__ == "__main__":
    main()
