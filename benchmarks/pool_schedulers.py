"""Who gets which GPUs in the simulated pool: our policy, as it is shipped, and the ways it is compared with.

What favours the baselines: they count GPUs and ignore nodes, fixed-size jobs never wait for neighbouring GPUs, their
paused jobs commit first, shortest-remaining-first knows every duration, and stock elasticity never tries in vain to grow.
"""

from dataclasses import dataclass, field

from pool_world import Job, Served, World

from tidepool.messages import AskBack, Deployment, GrantGroup, Group, Node, Replica, Resources, Run, Snapshot, StartReplica
from tidepool.pool import Rules, decide

GPUS_PER_NODE = 8
_GPU = Resources(gpus=1, cpus=1)
_WAIT_S = 60.0
"""How long stock Ray waits for a placement group before it gives up (measured)."""


# --- Ours ----------------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Entry:
    """The books of one run, as the shell around the policy will keep them."""

    job: Job
    run: Run
    groups: dict[str, Group] = field(default_factory=dict)


class PoolPolicy:
    """`tidepool.pool.decide`, with the world's jobs as runs that are elastic from one group of one GPU upwards."""

    def __init__(self, num_gpus: int, stretch: int, spacing_s: float, rules: Rules | None = None) -> None:
        self.spacing_s = spacing_s
        self._stretch = stretch
        self._rules = rules or Rules()
        sizes = [GPUS_PER_NODE] * (num_gpus // GPUS_PER_NODE) + ([num_gpus % GPUS_PER_NODE] if num_gpus % GPUS_PER_NODE else [])
        self._nodes = tuple(Node(f"n{i}", "gpu", size, size, domain=f"rack{i // 32}") for i, size in enumerate(sizes))
        self._entries: dict[str, _Entry] = {}
        self._replicas: dict[str, list[Replica]] = {}
        self._deployments: dict[str, Deployment] = {}
        self._counts: dict[str, tuple[int, int, int]] = {}
        self._number = 0

    def round(self, world: World) -> None:
        """Decide and carry it out; again at once as long as somebody's turn comes only in the next round."""
        while self._decide(world):
            pass

    def _decide(self, world: World) -> bool:
        self._follow(world)
        deployments = tuple(self._deployment(one) for one in world.served)
        runs = tuple(entry.run for entry in self._entries.values())
        plan = decide(Snapshot(world.now_s, self._nodes, deployments, runs), self._rules)
        granted: dict[str, list[GrantGroup]] = {}
        asked: dict[str, list[str]] = {}
        started: dict[str, list[str]] = {}
        for decision in plan.decisions:
            match decision:
                case GrantGroup(run=run):
                    granted.setdefault(run, []).append(decision)
                case AskBack(run=run, group=group):
                    asked.setdefault(run, []).append(group)
                case StartReplica(deployment=name, node=node):
                    started.setdefault(name, []).append(node)
        for name, grants in granted.items():
            self._grant(world, self._entries[name], grants)
        for name, groups in asked.items():
            self._ask(world, self._entries[name], groups)
        for one in world.served:
            for node in started.get(one.traffic.name, ()):
                self._number += 1
                self._replicas[one.traffic.name].append(Replica(f"r{self._number}", node, "starting"))
            if one.traffic.name in started:
                world.start_replica(one, len(started[one.traffic.name]))
        if plan.decisions:
            world.wake()
        return any(wait.reason.rule == "next_round" for wait in plan.waits)

    def _follow(self, world: World) -> None:
        """New jobs come, finished ones go."""
        for name in [name for name, entry in self._entries.items() if entry.job.finished_s is not None and not entry.job.leaving]:
            del self._entries[name]
        for name, job in world.jobs.items():
            if name not in self._entries:
                size, arrival_s = job.trace.size, job.trace.arrival_s
                largest = size * self._stretch
                run = Run(name, "p", 1, largest, 2 * size, arrival_s, worker=_GPU, waiting_since_s=arrival_s, as_of_s=world.now_s)
                self._entries[name] = _Entry(job, run)
        for entry in self._entries.values():
            if entry.job.finished_s is not None and any(not group.leaving for group in entry.groups.values()):
                entry.groups = {name: group for name, group in entry.groups.items() if group.leaving}
                self._write(entry, world.now_s, 0)

    def _grant(self, world: World, entry: _Entry, grants: list[GrantGroup]) -> None:
        before = entry.job.held
        for grant in grants:
            self._number += 1
            name = f"g{self._number}"
            entry.groups[name] = Group(name, grant.places, world.now_s)
        world.start(entry.job, len(grants))
        self._write(entry, world.now_s, before)

    def _ask(self, world: World, entry: _Entry, names: list[str]) -> None:
        before = entry.job.held
        for name in names:
            group = entry.groups[name]
            entry.groups[name] = Group(name, group.places, group.granted_s, leaving=True)

        def gone() -> None:
            for name in names:
                del entry.groups[name]
            self._write(entry, world.now_s, entry.job.held)

        world.shrink(entry.job, len(names), gone)
        self._write(entry, world.now_s, before)

    def _write(self, entry: _Entry, now_s: float, before: int) -> None:
        """Write a run's books anew: it held `before` groups until now."""
        old, held = entry.run, entry.job.held
        seconds = now_s - old.as_of_s
        dropped_s = min(seconds, max(0.0, now_s - old.submitted_s - self._rules.window_s))
        held_s = old.held_s - dropped_s * min(1.0, old.held_s / self._rules.window_s) + (seconds if before else 0.0)
        waits = None if held else (old.waiting_since_s if not before and old.waiting_since_s is not None else now_s)
        entry.run = Run(
            old.name,
            old.project,
            old.min_groups,
            old.max_groups,
            old.shards,
            old.submitted_s,
            worker=_GPU,
            kind="gpu" if entry.groups else old.kind,
            groups=tuple(entry.groups.values()),
            waiting_since_s=waits,
            started_s=now_s if held and not before else old.started_s,
            resized_s=now_s if held != before else old.resized_s,
            held_s=held_s,
            used_gpu_s=old.used_gpu_s + before * seconds,
            as_of_s=now_s,
        )

    def _deployment(self, one: Served) -> Deployment:
        """What the deployment has, from the counts of the world: the newest replicas drain first, the oldest are up first."""
        name = one.traffic.name
        counts = one.kept, one.draining, one.wanted
        if self._counts.get(name) == counts:
            return self._deployments[name]
        self._counts[name] = counts
        replicas = self._replicas.setdefault(name, [])
        draining = [replica for replica in replicas if replica.state == "draining"]
        kept = [replica for replica in replicas if replica.state != "draining"]
        while len(kept) > one.kept:
            draining.append(Replica(kept[-1].name, kept[-1].node, "draining"))
            kept.pop()
        draining = draining[len(draining) - one.draining :]
        self._replicas[name] = kept + draining
        self._deployments[name] = Deployment(name, "serving", one.wanted, _GPU, tuple(kept + draining))
        return self._deployments[name]


# --- The others ----------------------------------------------------------------------------------------------------------


class Fifo:
    """First come, first served, fixed sizes; whatever fits is started before its turn (backfill). Serving comes first.

    When serving needs more, the jobs that started last are paused.
    """

    def __init__(self, spacing_s: float) -> None:
        self.spacing_s = spacing_s
        self._started: dict[str, float] = {}

    def round(self, world: World) -> None:
        """Serving, then the queue in order."""
        short = _serve(world)
        if short > 0:
            holders = sorted((job for job in world.jobs.values() if job.held), key=lambda job: -self._started[job.trace.name])
            for job in holders:
                if short <= 0:
                    return
                short -= job.held
                world.shrink(job, job.held)
            return
        for job in world.jobs.values():  # in the order of arrival
            if world.free == 0:
                break
            if job.held == 0 and job.trace.size <= world.free:
                world.start(job, job.trace.size)
                self._started[job.trace.name] = world.now_s


class ShortestFirst:
    """Shortest remaining time first, preemptive, fixed sizes, with every duration known. Serving comes first."""

    def __init__(self, spacing_s: float) -> None:
        self.spacing_s = spacing_s

    def round(self, world: World) -> None:
        """Serving; then who should run, who must stop for them, who can start."""
        _serve(world)
        room = world.num_gpus - sum(one.wanted + one.draining for one in world.served)
        chosen: list[Job] = []
        for job in sorted(world.jobs.values(), key=lambda job: job.remaining_s - job.speed * (world.now_s - job.updated_s)):
            if job.trace.size <= room:
                room -= job.trace.size
                chosen.append(job)
        names = {job.trace.name for job in chosen}
        for job in list(world.jobs.values()):
            if job.held and job.trace.name not in names:
                world.shrink(job, job.held)
        short = sum(max(0, one.wanted - one.kept) for one in world.served)
        for job in chosen:
            if job.held == 0 and job.trace.size <= world.free - short:
                world.start(job, job.trace.size)


class StockElastic:
    """Elastic sizes by the cluster's total, as Ray Train has them: what serving holds is not seen, and nothing makes way.

    A run that asks for GPUs that serving has takes no step for `_WAIT_S`, and asks again; a replica starts when GPUs are
    free. A run that has started grows, from 1 to its size, when GPUs are really free.
    """

    def __init__(self, spacing_s: float) -> None:
        self.spacing_s = spacing_s

    def round(self, world: World) -> None:
        """Serving gets what is free; then each run asks for what it believes to be free."""
        _serve(world)
        believed = world.num_gpus - sum(job.held + job.leaving for job in world.jobs.values())
        for job in world.jobs.values():
            if believed <= 0:
                break
            if job.held or job.blocked_until_s > world.now_s:
                continue
            asked = min(job.trace.size, believed)
            if asked <= world.free:
                world.start(job, asked)
            else:
                job.blocked_until_s = world.now_s + _WAIT_S
                world.at(job.blocked_until_s, world.wake)
            believed -= asked
        for job in world.jobs.values():
            if world.free <= 0:
                break
            if job.active and job.starting == 0 and job.active < job.trace.size:
                world.start(job, min(job.trace.size - job.active, world.free))


def _serve(world: World) -> int:
    """Start what serving wants in what is free, the emptiest deployment first; returns what it lacks beyond what is leaving."""
    short = [one for one in world.served if one.kept < one.wanted]
    while short and world.free:
        one = min(short, key=lambda one: one.kept / one.wanted)
        world.start_replica(one)
        if one.kept >= one.wanted:
            short.remove(one)
    return sum(one.wanted - one.kept for one in short) - world.leaving
