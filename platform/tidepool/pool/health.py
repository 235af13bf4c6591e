"""Which nodes are in quarantine and why, and which are to be checked now: a pure state machine.

What comes in: the nodes that there are and those that anybody uses, what drivers report of their workers, what checks answered. What
goes out: checks to begin and to call off, and words for people.

Invariants:
- A node is checked only while nobody uses it; who comes while it is checked has the check called off. So no check runs beside a run.
- A node is checked when it joins (nobody gets it before that, or before it has failed to answer twice), between runs once nobody
  has wanted it for a while, and before it leaves quarantine.
- A check that hangs, dies or talks nonsense says nothing of other nodes and blocks nobody: tried twice, it counts as failed.
- What one kind of check finds keeps a third of the nodes away at most, and never the only one: where more fail, the check is the
  likelier fault, and people are told.
- A quarantine lasts twice as long each time, up to a bound, and ends with a check that is passed.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tidepool.messages import Node, RunReport, WorkerDeath
from tidepool.pool.findings import (
    FAR_BELOW,
    Figures,
    Finding,
    Usual,
    bandwidth_finding,
    own_findings,
    read_figures,
    read_rate,
    relative_findings,
    usual_among,
)


@dataclass(frozen=True)
class Rules:
    """What health goes by."""

    deadline_s: float = 60.0
    """A check that has not answered by then is called off, and counts as one without an answer."""
    gpu_deadline_s: float = 180.0
    """The same on nodes with GPUs."""
    retry_s: float = 10.0
    num_tries: int = 2
    idle_s: float = 30.0
    """A node is checked between runs once nobody has used it for so long."""
    hold_s: float = 300.0
    """How long the first quarantine lasts at least."""
    max_hold_s: float = 14_400.0
    forgive_s: float = 86_400.0
    """So long after a quarantine the next one is a first one again."""
    num_deaths: int = 3
    """So many worker processes died on a node, more than of the same runs on any other: the node is at fault."""
    deaths_within_s: float = 3600.0
    max_part: float = 1 / 3
    """The part of the nodes that one kind of check may keep away."""
    num_partners: int = 3
    """A node's bandwidth is the median of what it has with so many others: one of them that is slow, or boasts, changes nothing."""
    max_checks: int = 64
    """So many checks run at a time at most."""


@dataclass(frozen=True)
class Quarantine:
    """Why a node is kept away from everybody, since when, and until when at least."""

    kind: str
    why: str
    since_s: float
    until_s: float


@dataclass(frozen=True)
class Check:
    """Begin a check: of one node by itself, or an all-reduce between two."""

    number: int
    nodes: tuple[str, ...]
    num_gpus: int
    """Of each node."""
    deadline_s: float


@dataclass(frozen=True)
class CallOff:
    """End a check, at once."""

    number: int


@dataclass(frozen=True)
class Word:
    """Something for people to know. `is_loud`: they must act."""

    text: str
    is_loud: bool = False


Decision = Check | CallOff | Word


@dataclass
class _Known:
    """A node. `returned_s`: what was reported of it before does not count any more."""

    node: Node
    is_used: bool = False
    idle_since_s: float = float("-inf")
    is_admitted: bool = False
    is_due: bool = True
    not_before_s: float = float("-inf")
    check: int | None = None
    num_silent: int = 0
    num_slow: int = 0
    num_narrow: int = 0
    """How many times in a row its bandwidth with others was far below theirs."""
    figures: Figures | None = None
    partners: dict[str, float] = field(default_factory=dict)
    """Bytes per second of the all-reduces with other nodes, 0 where one failed."""
    quarantine: Quarantine | None = None
    num_quarantines: int = 0
    returned_s: float = 0.0
    refused: set[str] = field(default_factory=set)
    """The kinds of checks that it failed and that may keep no more nodes away."""

    @property
    def waits_for_partners(self) -> bool:
        """It has passed what it can alone; the rest must be measured with others."""
        return self.quarantine is not None and self.quarantine.kind == "bandwidth" and not self.is_due


class Health:
    """See the module's docstring. Times are seconds of one clock that goes on when the machine is made anew from what it remembers."""

    def __init__(self, rules: Rules | None = None, remembered: Mapping[str, Any] | None = None) -> None:
        """`remembered` is what `to_json` of the machine before gave. Raises `KeyError`, `TypeError` or `ValueError` if it is not."""
        self._rules = rules or Rules()
        self._nodes: dict[str, _Known] = {}
        self._checks: dict[int, Check] = {}
        self._num_checks = 0
        self._has_news = False
        self._deaths: dict[str, tuple[str, WorkerDeath]] = {}
        self._remembered = {name: _recall(name, one) for name, one in (remembered or {}).items()}

    # --- What is known ----------------------------------------------------------------------------------------------------

    @property
    def quarantined(self) -> dict[str, Quarantine]:
        """The nodes that are kept away from everybody."""
        return {name: known.quarantine for name, known in self._nodes.items() if known.quarantine is not None}

    @property
    def unchecked(self) -> frozenset[str]:
        """The nodes that have joined and that nobody is to use before their check has ended."""
        return frozenset(name for name, known in self._nodes.items() if not known.is_admitted and known.quarantine is None)

    def to_json(self) -> dict[str, Any]:
        """What is to be remembered of the nodes, for a machine that is made anew."""
        return {
            name: {
                "num_quarantines": known.num_quarantines,
                "returned_s": known.returned_s,
                "quarantine": asdict(known.quarantine) if known.quarantine else None,
            }
            for name, known in self._nodes.items()
            if known.is_admitted or known.quarantine is not None
        }

    # --- What happens -----------------------------------------------------------------------------------------------------

    def observe(self, nodes: Iterable[Node], used: frozenset[str], reports: Iterable[RunReport], now_s: float) -> list[Decision]:
        """Take in how things are: the nodes that are up, those that anybody uses, what drivers say of their workers."""
        decisions = list(self._see_nodes([node for node in nodes if node.gpus or node.cpus]))
        decisions += self._see_use(used, now_s)
        for check in [check for check in self._checks.values() if now_s >= check.deadline_s]:
            self._end(check)
            decisions += [CallOff(check.number), *self._take(check, None, f"it did not end in {self._patience_s(check):.0f} s", now_s)]
        for report in reports:
            decisions += self._hear(report, now_s)
        if self._has_news:
            self._has_news = False
            for kind in {known.node.kind for known in self._nodes.values()}:
                decisions += self._compare(kind, now_s)
        for known in self._nodes.values():
            if known.waits_for_partners and (not self._has_peers(known) or self._has_waited_long(known, now_s)):
                decisions += self._return(known, now_s)
        return [*decisions, *self._begin(now_s)]

    def answer(self, number: int, value: object, problem: str, now_s: float) -> list[Decision]:
        """A check has ended: with what it printed, or with a `problem` in words. One that was called off says nothing any more."""
        check = self._checks.get(number)
        if check is None:
            return []
        self._end(check)
        return list(self._take(check, value, problem, now_s))

    # --- Nodes ------------------------------------------------------------------------------------------------------------

    def _see_nodes(self, nodes: list[Node]) -> Iterator[Decision]:
        there = {node.name for node in nodes}
        self._num_alike = Counter(node.kind for node in nodes)
        for name in self._nodes.keys() - there:
            yield from self._call_off(self._nodes.pop(name))
        for node in nodes:
            known = self._nodes.get(node.name) or self._remembered.pop(node.name, None) or _Known(node)
            known.node = node
            self._nodes[node.name] = known

    def _see_use(self, used: frozenset[str], now_s: float) -> Iterator[Decision]:
        for name, known in self._nodes.items():
            if name in used:
                known.is_used = known.is_admitted = True  # whoever came has not asked
                yield from self._call_off(known)
            elif known.is_used:
                known.is_used, known.idle_since_s = False, now_s
                if known.quarantine is None:
                    known.is_due, known.not_before_s = True, now_s + self._rules.idle_s
                    known.partners.clear()

    def _call_off(self, known: _Known) -> Iterator[Decision]:
        if known.check is not None:
            check = self._checks[known.check]
            known.check = None
            self._end(check)
            yield CallOff(check.number)

    def _end(self, check: Check) -> None:
        del self._checks[check.number]
        for name in check.nodes:
            if name in self._nodes:
                self._nodes[name].check = None

    # --- What drivers report ----------------------------------------------------------------------------------------------

    def _hear(self, report: RunReport, now_s: float) -> Iterator[Decision]:
        within_s = self._rules.deaths_within_s
        self._deaths |= {f"{report.run} {death.worker}": (report.run, death) for death in report.deaths}
        self._deaths = {name: one for name, one in self._deaths.items() if now_s - one[1].at_s <= within_s}
        for name in sorted({death.node for death in report.deaths}):
            num = self._num_deaths(name)
            if num >= self._rules.num_deaths:
                why = f"{num} worker processes died on it within {within_s / 60:.0f} minutes"
                yield from self._blame(name, Finding("deaths", why), now_s)
        for one in report.stragglers:
            why = f"worker {one.worker} of run {report.run} has long computed at {one.score:.2f} of its peers' speed"
            yield from self._blame(one.node, Finding("straggler", why), now_s)

    def _blame(self, name: str, finding: Finding, now_s: float) -> Iterator[Decision]:
        known = self._nodes.get(name)
        if known is not None and known.quarantine is None and finding.kind not in known.refused:
            yield from self._condemn(known, [finding], now_s)

    def _num_deaths(self, node: str) -> int:
        """Deaths on a node, beyond those of the same runs on any other one: a run that dies everywhere is at fault itself."""
        by_run: dict[str, dict[str, int]] = {}
        for run, death in self._deaths.values():
            known = self._nodes.get(death.node)
            if known is None or death.at_s > known.returned_s:
                by_node = by_run.setdefault(run, {})
                by_node[death.node] = by_node.get(death.node, 0) + 1
        elsewhere = {run: max((num for name, num in by_node.items() if name != node), default=0) for run, by_node in by_run.items()}
        return sum(max(0, by_node.get(node, 0) - elsewhere[run]) for run, by_node in by_run.items())

    # --- Checks begin -----------------------------------------------------------------------------------------------------

    def _begin(self, now_s: float) -> list[Check]:
        free = [known for known in self._nodes.values() if not known.is_used]
        begun = [self._start((known,), now_s) for known in free if known.is_due and now_s >= known.not_before_s and self._may_start(known)]
        rested = [known for known in free if not known.is_due and now_s - known.idle_since_s >= self._rules.idle_s]
        rested = [known for known in rested if known.is_admitted and (known.quarantine is None or known.waits_for_partners)]
        for known in rested:
            partner = self._partner_of(known, rested)
            if partner is not None:
                begun.append(self._start((known, partner), now_s))
        return begun

    def _may_start(self, known: _Known) -> bool:
        return known.check is None and len(self._checks) < self._rules.max_checks

    def _partner_of(self, known: _Known, rested: list[_Known]) -> _Known | None:
        """Whom to measure a node's bandwidth with, if that is to be done; in a pool with nobody to compare with it is not."""
        if not self._may_start(known) or len(known.partners) >= self._rules.num_partners or not self._has_peers(known):
            return None
        there = (one for one in rested if one is not known and one.node.kind == known.node.kind and one.check is None)
        return next((one for one in there if one.node.name not in known.partners), None)

    def _has_peers(self, known: _Known) -> bool:
        """Whether there are enough nodes of its kind to find out which one is slow."""
        return self._num_alike[known.node.kind] > self._rules.num_partners

    def _has_waited_long(self, known: _Known, now_s: float) -> bool:
        """Whether nobody has had time to be measured with for hours."""
        return known.quarantine is not None and now_s > known.quarantine.until_s + self._rules.max_hold_s

    def _start(self, nodes: tuple[_Known, ...], now_s: float) -> Check:
        self._num_checks += 1
        num_gpus = nodes[0].node.gpus
        patience_s = self._rules.gpu_deadline_s if num_gpus else self._rules.deadline_s
        check = Check(self._num_checks, tuple(known.node.name for known in nodes), num_gpus, now_s + patience_s)
        self._checks[check.number] = check
        for known in nodes:
            known.check = check.number
        return check

    def _patience_s(self, check: Check) -> float:
        return self._rules.gpu_deadline_s if check.num_gpus else self._rules.deadline_s

    # --- Checks end -------------------------------------------------------------------------------------------------------

    def _take(self, check: Check, value: object, problem: str, now_s: float) -> Iterator[Decision]:
        self._has_news = True
        if len(check.nodes) == 1:
            known = self._nodes[check.nodes[0]]
            figures = None if problem else read_figures(value)
            yield from self._take_figures(known, figures, problem or "it answered nonsense", now_s)
        else:
            one, other = (self._nodes[name] for name in check.nodes)
            rate = 0.0 if problem else read_rate(value)
            one.partners[other.node.name] = other.partners[one.node.name] = rate

    def _take_figures(self, known: _Known, figures: Figures | None, problem: str, now_s: float) -> Iterator[Decision]:
        known.num_silent = known.num_silent + 1 if figures is None else 0
        found = [Finding("silence", f"its check failed {self._rules.num_tries} times: {problem}", True)]
        if figures is not None:
            others = [one.figures for one in self._alike(known.node.kind) if one is not known and one.figures is not None]
            relative = relative_findings(figures, Usual.among([figures, *others]))
            known.num_slow = known.num_slow + 1 if relative else 0
            found = own_findings(figures, known.node.gpus) or relative
        if not found:
            yield from self._pass(known, figures, now_s)
        elif found[0].needs_proof and max(known.num_silent, known.num_slow) < self._rules.num_tries:
            known.not_before_s = now_s + self._rules.retry_s
        else:
            yield from self._condemn(known, found, now_s)

    def _pass(self, known: _Known, figures: Figures | None, now_s: float) -> Iterator[Decision]:
        known.figures, known.is_admitted, known.is_due = figures, True, False
        known.refused.clear()
        if known.quarantine is not None and not known.waits_for_partners:
            yield from self._return(known, now_s)

    def _alike(self, kind: str) -> list[_Known]:
        """The nodes of a kind that are not in quarantine."""
        return [known for known in self._nodes.values() if known.node.kind == kind and known.quarantine is None]

    def _compare(self, kind: str, now_s: float) -> Iterator[Decision]:
        """Look at all nodes of a kind again: by what is known since, one may be far below the others, or not any more."""
        alike = self._alike(kind)
        usual = Usual.among(known.figures for known in alike if known.figures is not None)
        for known in alike:
            known.is_due = known.is_due or (known.figures is not None and bool(relative_findings(known.figures, usual)))
        measured = [known for known in self._nodes.values() if known.node.kind == kind and len(known.partners) >= self._rules.num_partners]
        usual_with_others = usual_among(statistics.median(one.partners.values()) for one in measured if one.quarantine is None)
        for known in measured:
            own = statistics.median(known.partners.values())
            if usual_with_others is None or own >= FAR_BELOW * usual_with_others:
                known.num_narrow = 0
                yield from self._return(known, now_s) if known.waits_for_partners else ()
                continue
            known.num_narrow += 1
            if known.num_narrow < self._rules.num_tries:
                known.partners.clear()  # measured anew: it may have been a busy moment
            elif "bandwidth" not in known.refused:
                yield from self._condemn(known, [bandwidth_finding("bandwidth", own, usual_with_others, "with other nodes")], now_s)

    # --- Quarantine -------------------------------------------------------------------------------------------------------

    def _condemn(self, known: _Known, found: list[Finding], now_s: float) -> Iterator[Decision]:
        name, kind, why = known.node.name, found[0].kind, "; ".join(finding.why for finding in found)
        yield from self._call_off(known)
        known.num_silent = known.num_slow = known.num_narrow = 0
        known.is_due, known.is_admitted = True, True
        if known.quarantine is None and (refusal := self._refusal(kind)):
            known.not_before_s = now_s + self._rules.hold_s
            if kind not in known.refused:
                known.refused.add(kind)
                yield Word(f"node {name} stays in use, though {why}: {refusal}", is_loud=True)
            return
        if known.quarantine is None and now_s - known.returned_s > self._rules.forgive_s:
            known.num_quarantines = 0
        hold_s = min(self._rules.hold_s * 2**known.num_quarantines, self._rules.max_hold_s)
        since_s = known.quarantine.since_s if known.quarantine else now_s
        known.quarantine, known.not_before_s = Quarantine(kind, why, since_s, now_s + hold_s), now_s + hold_s
        known.num_quarantines += 1
        known.figures = None
        known.partners.clear()
        yield Word(f"node {name} is in quarantine: {why}. It is checked again in {hold_s:.0f} s", is_loud=True)

    def _refusal(self, kind: str) -> str:
        """Why no more nodes may be kept away for what this kind of check finds; "" if they may."""
        num_nodes = len(self._nodes)
        if num_nodes == 1:
            return "it is the only one"
        most = max(1, int(num_nodes * self._rules.max_part))
        if sum(one.kind == kind for one in self.quarantined.values()) < most:
            return ""
        return (
            f"{most} of {num_nodes} nodes are in quarantine for what the same kind of check ({kind}) found, and no more are believed. "
            "Look at what these nodes share, and at the check"
        )

    def _return(self, known: _Known, now_s: float) -> Iterator[Decision]:
        assert known.quarantine is not None
        was = known.quarantine
        known.quarantine, known.returned_s, known.is_due = None, now_s, False
        yield Word(f"node {known.node.name} is back: it passed its check after {now_s - was.since_s:.0f} s in quarantine ({was.why})")


def _recall(name: str, one: Mapping[str, Any]) -> _Known:
    """What was remembered of a node; what it is, the cluster says."""
    known = _Known(Node(name, "", 0, 0), is_admitted=True, is_due=False)
    known.num_quarantines, known.returned_s = int(one["num_quarantines"]), float(one["returned_s"])
    if one["quarantine"] is not None:
        known.quarantine = Quarantine(**one["quarantine"])
        known.is_due, known.not_before_s = True, known.quarantine.until_s
    return known
