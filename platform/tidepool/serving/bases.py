"""Which bases have a deployment, and which of them requests may go to: a new whole model takes over once it runs. A plain state machine.

A base that a served name comes to mean gets a deployment of its own beside the others. Requests go on with what was there until the new one
has a replica; then gateways go over to it. What no name means any more is taken away in steps, so that no answer is cut: it stays for a
while, for those who go back; then gateways send it nothing new; and when it has had nothing to do for a while, its deployment goes.

All that is decided follows from what is there: whoever starts anew goes on where another one stopped.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from tidepool.models.source import ModelSource

KEEP_S = 20.0
"""A base that was replaced stays for so long: longer than a gateway or the directory may be behind."""
QUIET_S = 8.0
"""And then until it has said for so long, more than twice, that it has nothing to do."""
RETRY_S = 60.0
"""A base that could not be started is tried again after this."""


@dataclass(frozen=True)
class Deploy:
    """Have a deployment for a base."""

    base: ModelSource


@dataclass(frozen=True)
class Remove:
    """Have none for it any more."""

    base_id: str


@dataclass(frozen=True)
class Ring:
    """Have it get a first replica, though nobody asks for one yet."""

    base_id: str


Step = Deploy | Remove | Ring


@dataclass(frozen=True)
class Seen:
    """What there is, by the bases' ids: what the served names mean now, the deployments (and whether they could not be started), and
    those that have a replica that is listed (and whether one of them has something to do).
    """

    named: Mapping[str, ModelSource]
    deployed: Mapping[str, bool]
    replicas: Mapping[str, bool]


def base_id(digest: str) -> str:
    """By which a base is known among the deployments of an application."""
    return digest[:12]


class Bases:
    """The bases of one application, by their ids. `first` are those that it begins with: requests for them wait for their first replica."""

    def __init__(self, first: Iterable[str] = ()) -> None:
        self._first, self._has_run = frozenset(first), set[str]()
        self._unnamed_since: dict[str, float] = {}
        self._quiet_since: dict[str, float] = {}
        self._failed_since: dict[str, float] = {}
        self._made: set[str] = set()
        self.offered: frozenset[str] = frozenset()
        """Those that gateways may send requests to, if they have had a replica."""

    def note_deployed(self, base: str) -> None:
        """A deployment of a base was made, or made sure of, for the present spec."""
        self._made.add(base)

    def decide(self, seen: Seen, now_s: float) -> list[Step]:
        """What is to be done now; decides `offered`."""
        self._has_run |= seen.replicas.keys()
        ready = self._first | self._has_run
        # What was there may have been made for another spec: to deploy it again changes what differs, and nothing else.
        missing = seen.named.keys() - (seen.deployed.keys() & self._made)
        steps: list[Step] = [Deploy(seen.named[one]) for one in sorted(missing)]
        steps += [Ring(one) for one in sorted(seen.named.keys() & seen.deployed.keys() - ready)]
        going = self._going(seen, ready, now_s)
        steps += [Remove(one) for one in sorted(going | self._to_try_again(seen, now_s))]
        withdrawn = {one for one, since in self._unnamed_since.items() if now_s - since >= KEEP_S}
        self.offered = frozenset(seen.deployed.keys() | seen.named.keys()) - withdrawn
        return steps

    def _going(self, seen: Seen, ready: Set[str], now_s: float) -> Set[str]:
        has_taken_over = seen.named.keys() <= ready
        spare = seen.deployed.keys() - seen.named.keys() if has_taken_over else set()
        self._unnamed_since = {one: self._unnamed_since.get(one, now_s) for one in spare}
        quiet = {one for one in spare if now_s - self._unnamed_since[one] >= KEEP_S and not seen.replicas.get(one, False)}
        self._quiet_since = {one: self._quiet_since.get(one, now_s) for one in quiet}
        return {one for one, since in self._quiet_since.items() if now_s - since >= QUIET_S}

    def _to_try_again(self, seen: Seen, now_s: float) -> Set[str]:
        failed = {one for one, has_failed in seen.deployed.items() if has_failed and one in seen.named and one not in self._has_run}
        self._failed_since = {one: self._failed_since.get(one, now_s) for one in failed}
        return {one for one, since in self._failed_since.items() if now_s - since >= RETRY_S}
