"""One pool, live: a run and an adapter service share four slots while traffic rises and falls; and the same with stock Ray.

    python benchmarks/pool_live.py [--json FILE] [--quick] [--minutes M] [--plot FILE] [--only ours|stock|stock3]

A Ray cluster of this machine with four slots. A slot is one of Ray's logical CPUs: our serving refuses a logical GPU where there is no
real one. Everything else on the cluster (drivers, coordinators, the gateway, Serve, Ray Train's controllers) takes no CPU of Ray's. A
base model and two versions of an adapter are served by one to three replicas of a slot each. A run of one to four replica groups, of a
slot each, takes the rest. Requests come over HTTP at random times, whatever becomes of those before: few, many, few, many, few, for an
equal time each. Afterwards the run is stopped, and trained again to the same step with nothing happening to it.

The other side: the same service, scaled by the same policy without the arbiter, and Ray Train's elastic `TorchTrainer`, from one worker to
four. It cannot know that a slot is Serve's; so a second peer may have no more than three workers.

`failed_requests`: without a complete answer. `lost_steps`: completed steps that were taken again, or are missing in the record of samples
(of ours). `bits_equal`: weights and moments of the run and of the one that was left alone.
`reclaim_s`, `reclaim_worst_s`: from when serving wants a replica (the arbiter's snapshot; on the other side its actor exists) until a
slot is free for it; `placement_s`, `placement_worst_s`: until it holds one. `return_s`, `return_worst_s`: from a slot's being free of a
replica until the run takes steps with the worker that came for it. What did not happen counts until it was wanted no longer or until
the end, and is counted in the note.
`idle_slot_seconds`: slots that nobody holds in Ray's accounts, looked at ten times a second, as a part of slots x time.
For information: `starting_share` (slots held by who does not work yet), `steps_per_s` in all (by phase in the runs), time to first
token, and `requests`. All processes are on the same cores, the clients too: how long a process takes to start there is part of all of it.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "platform")]

import ray
from chaos import Run, digests, samples
from http_load import percentile
from pool_live_events import Change, placements, reclaims, returns, shares
from pool_live_sides import MAX_REPLICAS, NUM_SLOTS, Ours, Phase, Played, Stock, Training, play, wait_until
from pool_plots import draw_slots, pyplot

from tests.serving.models import Published, publish
from tests.training.conftest import prepare_dataset
from tidepool import local_cluster
from tidepool.local_cluster import LocalCluster
from tidepool.messages import NAMESPACE
from tidepool.pool.cluster import read_cluster
from tidepool.scratch import ScratchFolder
from tidepool.storage import open_store

Row = dict[str, Any]
Figures = dict[str, tuple[float, list[float], str]]
"""By metric: the value, the single ones, and a note."""
LOW_PER_S, HIGH_PER_S = 0.5, 6.0
_STEPS = 10**6
MAX_BATCH_SIZE = 2
"""Answers that a replica gives at one time: few, since even a small model's are much work for these cores."""
_SCALE = {"min": 1, "max": MAX_REPLICAS, "ttft_s": 2, "up_after_s": 0.5, "down_after_s": 3}
_ALONE_TIMEOUT_S = 1200
PEERS = {"stock": NUM_SLOTS, "stock3": NUM_SLOTS - 1}
METRICS: dict[str, tuple[str, float | None]] = {
    "failed_requests": ("requests", 0),
    "lost_steps": ("steps", 0),
    "bits_equal": ("", 1),
    "reclaim_s": ("s", 3),
    "reclaim_worst_s": ("s", 3),
    "placement_s": ("s", None),
    "placement_worst_s": ("s", None),
    "return_s": ("s", 5),
    "return_worst_s": ("s", 5),
    "idle_slot_seconds": ("of slots x time", 0.05),
    "starting_share": ("of slots x time", None),
    "steps_per_s": ("steps/s", None),
    "ttft_p50_ms": ("ms", None),
    "ttft_p99_ms": ("ms", None),
    "requests": ("requests", None),
}


def phases(minutes: float) -> list[Phase]:
    """Traffic that rises and falls twice, in so many minutes."""
    return [Phase(name, minutes * 60 / 5, {"low": LOW_PER_S, "high": HIGH_PER_S}[name]) for name in ("low", "high", "low", "high", "low")]


def measure(folder: Path, who: str, minutes: float) -> tuple[str, Figures, Played]:
    """One side, on a cluster of its own; returns its name."""
    store_url = (folder / "store").as_uri()
    prepare_dataset(store_url, folder / "texts")
    published = publish(store_url, folder, base="base", adapter="bot", num_adapters=2, context_length=512)
    cluster = local_cluster.start(store_url, NUM_SLOTS, folder / "ray.log")
    try:
        handler = signal.getsignal(signal.SIGTERM)
        ray.init(cluster.address, namespace=NAMESPACE, logging_level="ERROR", log_to_driver=False)
        signal.signal(signal.SIGTERM, handler)  # Ray's own ends the process at once, and nothing that was started
        replicas = {"scale": _SCALE, "cpus_per_replica": 1}
        local_cluster.serve(
            cluster, ["base", "bot@1", "bot@2"], replicas=replicas, engine={"weights": "fp32", "max_batch_size": MAX_BATCH_SIZE}
        )
        wait_until(lambda: any(one.is_alive for one in read_cluster().replicas), "a replica")
        run = Run(cluster, folder, store_url, who, _STEPS, num_shards=12, max_groups=NUM_SLOTS)
        training: Training = Ours(cluster, run) if who == "ours" else Stock(cluster, run.path, folder, PEERS[who])
        played = _train_and_play(training, cluster, published, minutes)
        figures = figures_of(played)
        if isinstance(training, Ours):
            figures |= _compare(training, played, cluster, folder)
        return training.name, figures, played
    finally:
        ray.shutdown()
        local_cluster.stop(cluster)


def _train_and_play(training: Training, cluster: LocalCluster, published: Published, minutes: float) -> Played:
    try:
        training.start()
        return play(training, cluster, phases(minutes), published.tokenizer.eos_token_id)
    finally:
        training.stop()


def _compare(ours: Ours, played: Played, cluster: LocalCluster, folder: Path) -> Figures:
    """Train the same run again, alone, to the step at which it was stopped."""
    store = open_store(ours.run.spec.store)
    steps, bits = digests(store, ours.run.name)
    lost, wrong = samples(store, ours.run.spec, steps)
    alone = Run(cluster, folder, ours.run.spec.store, "alone", steps, num_shards=12, max_groups=NUM_SLOTS)
    alone.submit()
    status = alone.process.wait(_ALONE_TIMEOUT_S)
    if status:
        raise RuntimeError(f"The run that was left alone ended with {status}:\n{alone.output[-4000:]}")
    is_equal = digests(store, alone.name) == (steps, bits)
    note = f"{played.num_repeated} steps taken again; of {steps} steps {lost} shards lost, {wrong} wrong"
    return {
        "bits_equal": (int(is_equal), [], f"of {steps} steps"),
        "lost_steps": (played.num_repeated + lost + wrong, [], note),
    }


def figures_of(played: Played) -> Figures:
    """What is read off a side."""
    failed = [one for _, one in played.answers if one.is_failure]
    used, seconds = shares(played.samples, NUM_SLOTS), played.bounds[-1]
    by_phase = [num / (until - begin) for num, (begin, until) in zip(played.num_steps, pairwise(played.bounds), strict=True)]
    return {
        "failed_requests": (len(failed), [], "; ".join(sorted({f"{one.status} {one.error}"[:120] for one in failed})[:3])),
        "lost_steps": (played.num_repeated, [], f"{played.num_repeated} steps taken again"),
        **_of_changes("reclaim", reclaims(played.samples)),
        **_of_changes("placement", placements(played.samples)),
        **_of_changes("return", returns(played.samples)),
        "idle_slot_seconds": (used.idle, [], f"{used.idle * NUM_SLOTS * seconds:.0f} of {NUM_SLOTS * seconds:.0f} slot seconds"),
        "starting_share": (used.starting, [], ""),
        "steps_per_s": (sum(played.num_steps) / seconds, by_phase, "by phase"),
        "ttft_p50_ms": _ttft_ms(played, 0.5),
        "ttft_p99_ms": _ttft_ms(played, 0.99),
        "requests": (len(played.answers), [], ""),
    }


def _ttft_ms(played: Played, share: float) -> tuple[float, list[float], str]:
    """The time to the first token that this share of the answers do not exceed, in all and in each phase."""
    by_phase = [
        [one.ttft_s * 1000 for phase, one in played.answers if phase == number and one.times] for number in range(len(played.num_steps))
    ]
    values = [percentile(one, share) if one else 0.0 for one in by_phase]
    return percentile([one for phase in by_phase for one in phase], share), values, "by phase; 0: no answer"


def _of_changes(name: str, changes: Sequence[Change]) -> Figures:
    """Median and worst; nothing where nothing was to change hands."""
    if not changes:
        return {}
    seconds = [change.seconds for change in changes]
    unmet = sum(not change.is_met for change in changes)
    note = f"{unmet} of {len(changes)} did not happen" if unmet else ""
    return {f"{name}_s": (statistics.median(seconds), seconds, note), f"{name}_worst_s": (max(seconds), [], note)}


def rows(found: dict[str, tuple[str, Figures]]) -> list[Row]:
    """The results: each metric against each peer that has it."""
    ours = found.get("ours", ("", {}))[1]
    peers = [found[who] for who in PEERS if who in found]
    lines = []
    for metric in METRICS:
        with_figure = [(name, figures[metric]) for name, figures in peers if metric in figures]
        for name, peer in with_figure or [(None, None)]:
            if metric in ours or peer is not None:
                lines.append(row(metric, ours.get(metric), name, peer))
    return lines


def row(
    metric: str, ours: tuple[float, list[float], str] | None, peer_name: str | None, peer: tuple[float, list[float], str] | None
) -> Row:
    """One line of the results."""
    unit, target = METRICS[metric]
    reached = None
    if target is not None and ours is not None:
        reached = ours[0] == target if metric == "bits_equal" else ours[0] <= target
    return {
        "metric": metric,
        "unit": unit,
        "ours": None if ours is None else round(ours[0], 4),
        "peer": None if peer is None else round(peer[0], 4),
        "peer_name": peer_name,
        "ratio": round(ours[0] / peer[0], 3) if ours is not None and peer is not None and peer[0] else None,
        "target": target,
        "reached": reached,
        "ours_runs": [] if ours is None else [round(one, 3) for one in ours[1]],
        "peer_runs": [] if peer is None else [round(one, 3) for one in peer[1]],
        "ours_note": "" if ours is None else ours[2],
        "peer_note": "" if peer is None else peer[2],
    }


def main() -> int:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--minutes", type=float, default=5.0, help="of traffic, on each side (default: 5)")
    parser.add_argument("--quick", action="store_true", help="2.5 minutes, and one peer")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of who held what; needs matplotlib")
    parser.add_argument("--only", choices=["ours", *PEERS], help="leave the other sides out")
    options = parser.parse_args()
    if options.plot:
        pyplot()  # or it would be missed only after all that is measured
    os.environ |= {"TIDEPOOL_LOG": "json", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    minutes = 2.5 if options.quick else options.minutes
    head: Row = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux; all processes on the same cores, {NUM_SLOTS} slots",
        "date": datetime.now(UTC).isoformat("T", "seconds"),
        "commit": commit,
        "load_average": [round(one, 1) for one in os.getloadavg()],  # what the machine did before
        "minutes": minutes,
        "requests_per_s": [LOW_PER_S, HIGH_PER_S],
    }
    found: dict[str, tuple[str, Figures]] = {}
    seen: dict[str, Played] = {}
    for who in [options.only] if options.only else ["ours", "stock"] if options.quick else ["ours", *PEERS]:
        with ScratchFolder("pool-live") as folder:
            name, figures, seen[name] = measure(Path(folder), who, minutes)
        found[who] = name, figures
        if options.json:  # what there is by now, should it be cut off
            options.json.write_text(json.dumps([head, *rows(found)], indent=1) + "\n")
    for one in rows(found):
        print(
            f"{one['metric']:<18} {one['unit']:<16} ours {one['ours']!s:>9}   {one['peer_name'] or '':<25} {one['peer']!s:>9}   "
            f"target {one['target']}  reached {one['reached']}  {one['ours_note']} | {one['peer_note']}"
        )
    if options.plot:
        draw_slots({name: (played.samples, played.bounds) for name, played in seen.items()}, NUM_SLOTS, options.plot)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    sys.exit(main())
