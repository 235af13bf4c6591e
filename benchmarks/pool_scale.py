"""Random pools of a given size, for measuring a round: nodes of 8 GPUs, elastic runs of all shapes, deployments."""

import random
import sys
from dataclasses import replace

from tidepool.messages import Deployment, Node, Resources, Run, Snapshot, Tier
from tidepool.pool import Rules, decide
from tidepool.pool.forecast import Future, begin, step


def empty_pool(num_nodes: int, num_runs: int, num_deployments: int, demand: float, seed: int) -> Snapshot:
    """Nothing is held yet; runs and deployments together want `demand` times the pool at their min, and more to grow."""
    rng = random.Random(seed)
    nodes = tuple(
        Node(f"n{number}", "H100", 8, 128, frozenset({f"zone={number % 3}"}), number % 4 == 0, f"rack-{number // 32}")
        for number in range(num_nodes)
    )
    replicas = int(num_nodes * 8 * 0.3 * demand / max(1, num_deployments))
    deployments = tuple(
        Deployment(f"d{number}", "serving", max(1, rng.randint(replicas // 2, replicas * 3 // 2)), Resources(1, 8))
        for number in range(num_deployments)
    )
    gpus = num_nodes * 8 * 0.7 * demand / num_runs
    return Snapshot(0.0, nodes, deployments, tuple(_run(number, gpus, rng) for number in range(num_runs)))


def _run(number: int, gpus: float, rng: random.Random) -> Run:
    workers = rng.choice([1, 2, 4, 8, 8, 16])
    groups = max(1, round(gpus * rng.uniform(0.5, 1.5) / workers))
    largest = groups * rng.choice([1, 2, 4])
    tier: Tier = rng.choice(["premium", "standard", "basic"])
    return Run(
        f"r{number}",
        f"p{number % 50}",
        groups,
        largest,
        largest * workers,
        submitted_s=float(-number),
        tier=tier,
        priority=rng.randint(0, 3),
        workers_per_group=workers,
        worker=Resources(1, 8),
        waiting_since_s=float(-number),
    )


def settled(snapshot: Snapshot, rounds: int) -> Future:
    """The pool after some rounds, 200 s each, that may grant as much as they like."""
    future = begin(snapshot)
    for _ in range(rounds):
        future = step(future, decide(future.snapshot, Rules(max_grants=1_000_000)), 200.0)
    return future


def states(num_nodes: int, seed: int = 1) -> dict[str, Snapshot]:
    """A pool that holds all mins and one that cannot, at rest; and each when every deployment wants one replica more."""
    found = {}
    for name, demand in [("roomy", 0.8), ("overloaded", 1.3)]:
        pool = settled(empty_pool(num_nodes, num_nodes // 2, num_nodes // 20, demand, seed), rounds=6).snapshot
        found[f"{name}, at rest"] = pool
        more = tuple(replace(one, wanted=one.wanted + 1) for one in pool.deployments)
        found[f"{name}, serving grows"] = replace(pool, deployments=more, now_s=pool.now_s + 1000.0)
    return found


def num_calls(snapshot: Snapshot) -> int:
    """How many functions one round calls, of Python and of C: its work, whatever else the machine does."""
    count = 0

    def see(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        decide(snapshot)
    finally:
        sys.setprofile(before)
    return count
