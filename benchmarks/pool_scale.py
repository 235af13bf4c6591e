"""Random pools of a given size, for measuring a round: nodes of 8 GPUs, elastic runs of all shapes, deployments."""

import random

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
