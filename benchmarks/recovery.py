"""What a fault or a resize costs a run: Tidepool against stock Ray Train's elasticity, at the same work.

    python benchmarks/recovery.py [--json FILE] [--quick]

Both sides train the same model on the same samples with three workers of one CPU, commit every five steps, and run on a
cluster of two nodes of their own; they alternate, and every figure is a median over the rounds. A round of a side: SIGKILL of
one worker; one worker leaves; one joins; SIGSTOP of one worker. What is read off its steps (`recovery_timeline`):

`recovery_s`, `hang_recovery_s`: from the signal to the next step that nobody had completed before. A step that ends within
two usual steps of the signal was in flight and counts as completed before it. Who does not come back within the cap counts with the cap.
`steps_lost`: completed steps that were taken again. `survivors_restarted`: of the two others, those with another pid afterwards.
`grow_pause_s`, `shrink_pause_s`: the longest time without a step, new or taken again, from the wish until the new size has
taken steps for two seconds. `grow_switch_s`, `shrink_switch_s`: of ours, the time between the steps before and after the
change itself, a step included; a longer pause is the start of a worker's processes on the cores of those that train.
`worker_start_s`: of the peer's recovery, what its workers took for imports, model, data and checkpoint.

Stock resizes when a node joins or leaves, so its third worker has a node of its own, which is drained with a notice of
ten seconds and ends with them; Tidepool is asked for a number of replica groups. The peer that counts is stock with its
defaults; the second one checks its workers every 0.5 s in place of 2 s, waits 5 s in place of 60 s for the resources of
workers that it starts, considers another size every 10 s in place of 60 s, and has gloo give up after 30 s in place of 30 minutes.

Not to be read off this: throughput. `ray.train.report` waits until the one before was polled, so that a checkpoint every five
steps of 0.1 s holds stock at its health check's pace, while its median step is that of the computation.
"""

import argparse
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import psutil
from recovery_sides import CHECKPOINT_EVERY_STEPS, NUM_WORKERS, Side, StockSide, TidepoolSide, Work, Worker
from recovery_timeline import longest_pause_s, seconds_to_new_step, steps_redone, usual_step_s

_SETTLE_STEPS, _SETTLE_S = 20, 2.0
_RECOVERY_CAP_S = 180.0
_RESIZE_TIMEOUT_S = 300.0
_TUNED = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
_TUNED_OPTIONS = ["--timeout-s", "30", "--monitor-s", "10"]
OURS, STOCK, TUNED = "Tidepool", "Ray Train", "Ray Train, tuned"
Row = dict[str, Any]
Figures = dict[str, float]


@dataclass(frozen=True)
class Target:
    """What ours has to reach: at most `most`, of the peer's figure if `is_ratio`."""

    most: float
    is_ratio: bool = False


METRICS: dict[str, tuple[str, Target | None]] = {
    "recovery_s": ("s", Target(0.15, is_ratio=True)),
    "hang_recovery_s": ("s", Target(3.0)),
    "steps_lost": ("steps", Target(0)),
    "survivors_restarted": ("workers", Target(0)),
    "grow_pause_s": ("s", Target(0.5)),
    "shrink_pause_s": ("s", Target(0.5)),
    "grow_switch_s": ("s", None),
    "shrink_switch_s": ("s", None),
    "step_time_s": ("s", Target(0.2)),
    "worker_start_s": ("s", None),
}


def measure_kill(side: Side, victim: int, chance: random.Random) -> Figures:
    """SIGKILL one worker."""
    settle(side, NUM_WORKERS)
    before = side.workers()
    at_s, step_s = strike(side, before[victim], signal.SIGKILL, chance)
    recovery_s = wait_for_new_step(side, at_s + 2 * step_s, _RECOVERY_CAP_S) + 2 * step_s
    settle(side, NUM_WORKERS)
    after = {worker.pid for worker in side.workers()}
    survivors = [worker.pid for worker in before if worker != before[victim]]
    return {
        "recovery_s": recovery_s,
        "steps_lost": steps_redone(side.timeline.steps, at_s + 2 * step_s),
        "survivors_restarted": sum(pid not in after for pid in survivors),
        "step_time_s": step_s,
        **worker_start(side, at_s),
    }


def measure_hang(side: Side, victim: int, chance: random.Random, cap_s: float) -> Figures:
    """SIGSTOP one worker."""
    settle(side, NUM_WORKERS)
    worker = side.workers()[victim]
    at_s, step_s = strike(side, worker, signal.SIGSTOP, chance)
    try:
        return {"hang_recovery_s": min(cap_s, wait_for_new_step(side, at_s + 2 * step_s, cap_s) + 2 * step_s)}
    finally:
        if psutil.pid_exists(worker.pid):
            os.kill(worker.pid, signal.SIGKILL)


def measure_resize(side: Side, metric: str, wish: Callable[[], None], num_workers: int) -> Figures:
    """Change the number of workers."""
    settle(side, NUM_WORKERS if num_workers < NUM_WORKERS else NUM_WORKERS - 1)
    from_s = time.monotonic()
    wish()
    settle(side, num_workers)
    to_s = time.monotonic()
    time.sleep(1)
    steps = side.timeline.steps
    figures = {metric: longest_pause_s(steps, from_s, to_s)}
    changed_at = max((line.at_s for line in side.timeline.lines if "takes the steps after" in str(line.fields.get("message"))), default=0.0)
    if changed_at > from_s:
        before, after = (one.at_s for one in steps if one.at_s <= changed_at), (one.at_s for one in steps if one.at_s > changed_at)
        figures[metric.replace("pause", "switch")] = min(after) - max(before)
    return figures


def worker_start(side: Side, from_s: float) -> Figures:
    """How long the workers that came after a time took until they were ready, on the side that tells."""
    told = {"entered": float("inf"), "ready": float("-inf")}
    for line in side.timeline.lines:
        name = str(line.fields.get("message"))
        if line.at_s > from_s and name in told:
            told[name] = min(told[name], line.at_s) if name == "entered" else max(told[name], line.at_s)
    return {"worker_start_s": told["ready"] - told["entered"]} if told["ready"] > told["entered"] else {}


def settle(side: Side, num_workers: int) -> None:
    """Wait until the run has so many workers and they have taken steps for a while. Raises `RuntimeError`."""
    deadline, since_s, pids = time.monotonic() + _RESIZE_TIMEOUT_S, time.monotonic(), set[int]()
    while True:
        now, workers = time.monotonic(), {worker.pid for worker in side.workers()}
        if len(workers) != num_workers or workers != pids:
            since_s, pids = now, workers
        taken = [step for step in side.timeline.steps if step.at_s > since_s]
        if len(pids) == num_workers and len(taken) >= _SETTLE_STEPS and now - since_s >= _SETTLE_S:
            return
        if now > deadline:
            raise RuntimeError(f"{side.name}: no {num_workers} workers that take steps in {_RESIZE_TIMEOUT_S:.0f} s, only {sorted(pids)}")
        time.sleep(0.05)


def strike(side: Side, worker: Worker, number: signal.Signals, chance: random.Random) -> tuple[float, float]:
    """Send a signal at any point of the checkpoint interval; returns when, and the usual time of a step before it."""
    steps = side.timeline.steps
    step_s = statistics.median(usual_step_s(steps[-_SETTLE_STEPS:]))
    time.sleep(chance.uniform(0, steps[-1].at_s - steps[-1 - CHECKPOINT_EVERY_STEPS].at_s))
    at_s = time.monotonic()
    os.kill(worker.pid, number)
    return at_s, step_s


def wait_for_new_step(side: Side, from_s: float, cap_s: float) -> float:
    """Seconds from a time to the next new step, at most `cap_s`."""
    while time.monotonic() < from_s + cap_s:
        if time.monotonic() > from_s and (seconds := seconds_to_new_step(side.timeline.steps, from_s)) is not None:
            return seconds
        time.sleep(0.02)
    return cap_s


def run_side(side: Side, round_number: int, cap_s: float) -> tuple[Figures, float]:
    """One round of one side; returns its figures and the resolution of its timeline in seconds."""
    chance = random.Random(round_number)
    victim = (round_number + 1) % NUM_WORKERS
    figures: Figures = {}
    try:
        side.start()
        figures |= tell(side, measure_kill(side, victim, chance))
        figures |= tell(side, measure_resize(side, "shrink_pause_s", side.shrink, NUM_WORKERS - 1))
        figures |= tell(side, measure_resize(side, "grow_pause_s", side.grow, NUM_WORKERS))
        figures |= tell(side, measure_hang(side, victim, chance, cap_s))
        return figures, side.timeline.resolution_s
    finally:
        side.stop()


def tell(side: Side, figures: Figures) -> Figures:
    """Show figures as they come."""
    print(f"{side.name}: " + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()), flush=True)
    return figures


def rows(runs: dict[str, list[Figures]], cap_s: float) -> list[Row]:
    """The results: each metric against each peer that has it."""
    found: list[Row] = []
    for metric in METRICS:
        ours, *peers = ([one[metric] for one in runs.get(name, []) if metric in one] for name in (OURS, STOCK, TUNED))
        with_figures = [(name, peer) for name, peer in zip((STOCK, TUNED), peers, strict=True) if peer]
        found += [row(metric, ours, name, peer, cap_s) for name, peer in with_figures or [(STOCK, [])] if ours or peer]
    return found


def row(metric: str, ours: list[float], peer_name: str, peer: list[float], cap_s: float) -> Row:
    """One line of the results; only the row against stock's defaults has a target."""
    unit, target = METRICS[metric]
    mine, theirs = (statistics.median(figures) if figures else None for figures in (ours, peer))
    ratio = mine / theirs if mine is not None and theirs else None
    reached = None
    if target is not None and peer_name == STOCK and mine is not None:
        reached = (None if ratio is None else ratio <= target.most) if target.is_ratio else mine <= target.most
    capped = sum(one >= cap_s for one in peer) if metric == "hang_recovery_s" else 0
    return {
        "metric": metric,
        "unit": unit,
        "ours": None if mine is None else round(mine, 3),
        "peer": None if theirs is None else round(theirs, 3),
        "peer_name": peer_name if peer else None,
        "ratio": None if ratio is None else round(ratio, 3),
        "target": target_text(target) if peer_name == STOCK else None,
        "reached": reached,
        "ours_runs": [round(one, 3) for one in ours],
        "peer_runs": [round(one, 3) for one in peer],
        "note": f"in {capped} of {len(peer)} runs the peer had not come back after {cap_s:.0f} s, which then counts" if capped else None,
    }


def target_text(target: Target | None) -> str | None:
    """A target as the results show it."""
    return None if target is None else f"<= {target.most:g}" + (" of the peer's" if target.is_ratio else "")


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    for one in rows:
        ours, peer = ("-" if one[side] is None else one[side] for side in ("ours", "peer"))
        print(
            f"{one['metric']:<20} {one['unit']:<8} ours {ours:>8}   {one['peer_name'] or '':<17} {peer:>8}   "
            f"ratio {one['ratio']}  target {one['target']}  reached {one['reached']}" + (f"  ({one['note']})" if one["note"] else "")
        )


def main() -> int:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="one round, and no longer than 20 s for a stopped worker")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds of each side (default: 3)")
    parser.add_argument("--only", choices=("ours", "peer"), help="leave the other side out")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    head: Row = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux; all nodes and workers on the same cores, loopback",
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "commit": commit,
        "load_average": [round(one, 1) for one in os.getloadavg()],  # what the machine did before
    }
    num_rounds, cap_s = (1, 20.0) if options.quick else (options.rounds, 120.0)
    runs: dict[str, list[Figures]] = {}
    loads, resolutions = [], []
    with tempfile.TemporaryDirectory(prefix="tp-recovery-") as folder:
        work = Work(Path(folder))
        for number in range(num_rounds):
            for side in sides(work, number, options.only):
                figures, resolution_s = run_side(side, number, cap_s)
                runs.setdefault(side.name, []).append(figures)
                loads.append(round(os.getloadavg()[0], 1))
                resolutions.append(resolution_s)
                if options.json:  # what there is by now, should it be cut off
                    options.json.write_text(json.dumps([head, *rows(runs, cap_s)], indent=1) + "\n")
    head |= {"load_average_after_each_side": loads, "timeline_resolution_s": round(max(resolutions), 4)}
    results = rows(runs, cap_s)
    show(results)
    if options.json:
        options.json.write_text(json.dumps([head, *results], indent=1) + "\n")
    return 0


def sides(work: Work, number: int, only: str | None) -> list[Side]:
    """The sides of a round, in a random order."""
    found: list[Side] = []
    if only != "peer":
        found.append(TidepoolSide(work, f"ours-{number}"))
    if only != "ours":
        found.append(StockSide(work, STOCK, f"stock-{number}", [], {}))
        found.append(StockSide(work, TUNED, f"tuned-{number}", _TUNED_OPTIONS, _TUNED))
    random.Random(number).shuffle(found)
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    sys.exit(main())
