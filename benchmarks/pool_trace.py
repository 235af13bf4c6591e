"""The work that a simulated pool gets: training jobs from the Philly trace, serving traffic from the chat trace.

Philly is real arrivals, sizes and durations; a slice of it is thinned or repeated until its work is `load` of the pool, and
durations above `LONGEST_S` are cut to that, so that a week of arrivals can be simulated to its last completion. The chat
trace is one hour: its requests per minute, in random order of its hours' rotations, are the noise on a day-and-night curve.
"""

import csv
import gzip
import math
import random
import sys
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

LONGEST_S = 86_400.0
FIRST_DAY = datetime(2017, 10, 2)
"""A Monday; the four weeks from here are the trace's busiest, and load and mix are steady over them."""
SLICE_DAYS = 28
DAY_NIGHT_SWING = 0.6
TARGET_UTILIZATION = 0.8
"""Of a replica, as Serve's autoscaler aims for it; the objective is broken when traffic exceeds the whole of it."""
DOWNSCALE_DELAY_MIN = 10
"""Serve's default."""


@dataclass(frozen=True)
class TraceJob:
    """A training job: it takes `duration_s` on `size` GPUs. `is_rest`: of one that began before the simulation does."""

    name: str
    arrival_s: float
    size: int
    duration_s: float
    is_rest: bool = False


@dataclass(frozen=True)
class Traffic:
    """One deployment, minute by minute: replicas below which its objective is broken, and replicas that Serve wants."""

    name: str
    needed: tuple[int, ...]
    wanted: tuple[int, ...]


def read_philly(folder: Path) -> list[TraceJob]:
    """The jobs of the slice, arrivals in seconds from its start."""
    path = _existing(folder / "philly_2017.csv.gz")
    jobs = []
    with gzip.open(path, "rt") as lines:
        for row in csv.DictReader(lines):
            arrival_s = (datetime.fromisoformat(row["timestamp"]) - FIRST_DAY).total_seconds()
            if 0 <= arrival_s < SLICE_DAYS * 86_400:
                duration_s = min(LONGEST_S, float(row["duration"]))
                jobs.append(TraceJob(f"j{len(jobs)}", arrival_s, int(row["num_gpus"]), duration_s))
    return jobs


def read_chat(folder: Path) -> list[int]:
    """Requests in each minute of the hour."""
    path = _existing(folder / "azure_llm_2023_conv.csv")
    with path.open() as lines:
        times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in csv.DictReader(lines)]
    start = min(times)
    counts = [0] * 60
    for time in times:
        minute = int((time - start).total_seconds() // 60)
        if minute < 60:
            counts[minute] += 1
    return counts[:-1]  # the last minute is not whole


def _existing(path: Path) -> Path:
    if not path.is_file():
        sys.exit(f"error: {path} is missing: give the folder of the traces with --data (it holds the files that its README.md lists)")
    return path


def training_jobs(trace: list[TraceJob], num_gpus: int, days: float, load: float, seed: int) -> list[TraceJob]:
    """Jobs that arrive within `days`, whose work is `load` of the pool's GPU time in that time.

    The days are folded from the whole slice; jobs are drawn without replacement, again and again if there are not enough,
    each at its own time of day, give or take half an hour for a copy. Jobs larger than a quarter of the pool are left out.
    What would still run at the end stands at the beginning as the rest of a job, so that the pool is found at work; such
    rests take GPUs, but their completion times are not counted.
    """
    rng = random.Random(seed)
    span_s = days * 86_400
    fitting = [job for job in trace if job.size <= num_gpus // 4]
    left = load * num_gpus * span_s
    taken: list[TraceJob] = []
    for copy in range(1000):
        for job in rng.sample(fitting, len(fitting)):
            if left <= 0:
                return sorted([*taken, *_rests(taken, span_s)], key=lambda job: job.arrival_s)
            arrival_s = (job.arrival_s + (rng.uniform(-1800, 1800) if copy else 0.0)) % span_s
            taken.append(TraceJob(f"{job.name}.{copy}", arrival_s, job.size, job.duration_s))
            left -= job.size * job.duration_s
    raise AssertionError(load)


def _rests(jobs: list[TraceJob], span_s: float) -> list[TraceJob]:
    """What would still run at the beginning if the same jobs had come in every span before."""
    rests = []
    for job in jobs:
        over_s, number = job.arrival_s + job.duration_s - span_s, 1
        while over_s > 0:
            rests.append(replace(job, name=f"{job.name}.rest{number}", arrival_s=0.0, duration_s=over_s, is_rest=True))
            over_s, number = over_s - span_s, number + 1
    return rests


def serving_traffic(chat: list[int], num_gpus: int, days: float, share: float, num_deployments: int, seed: int) -> list[Traffic]:
    """Deployments whose wanted replicas, of one GPU each, take `share` of the pool on average."""
    rng = random.Random(seed)
    minutes = int(days * 1440)
    mean = sum(chat) / len(chat)
    curves = [_curve(chat, mean, minutes, rng) for _ in range(num_deployments)]
    scale = share * num_gpus / num_deployments * TARGET_UTILIZATION
    for _ in range(8):  # what Serve wants is rounded up and held for a while: adjust until its mean is the share
        traffic = [_replicas(f"d{number}", curve, scale) for number, curve in enumerate(curves)]
        got = sum(sum(one.wanted) for one in traffic) / minutes
        scale *= share * num_gpus / got
    return traffic


def _curve(chat: list[int], mean: float, minutes: int, rng: random.Random) -> list[float]:
    """Traffic relative to its mean."""
    curve: list[float] = []
    while len(curve) < minutes:
        start = rng.randrange(len(chat))
        for count in chat[start:] + chat[:start]:
            day = 1 + DAY_NIGHT_SWING * math.sin(2 * math.pi * (len(curve) / 1440 - 0.375))
            curve.append(day * count / mean)
    return curve[:minutes]


def _replicas(name: str, curve: list[float], scale: float) -> Traffic:
    needed = tuple(max(1, math.ceil(value * scale)) for value in curve)
    aimed = [max(1, math.ceil(value * scale / TARGET_UTILIZATION)) for value in curve]
    wanted = tuple(max(aimed[max(0, minute - DOWNSCALE_DELAY_MIN) : minute + 1]) for minute in range(len(aimed)))
    return Traffic(name, needed, wanted)
