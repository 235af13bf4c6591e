"""Where the replicas of an application listen, which bases are offered, and which names have moved: what gateways wait for.
A plain object in one event loop.

Invariants:
- A replica is listed from its first report until it says that it leaves, or has not reported for `LISTED_S`.
- `watch` answers when there is something new after what was seen, or after a while without. A directory that starts anew has
  another `epoch`, and what was seen of another one counts as nothing.
- What is known is a memory of the last minute, no more: replicas report again and again, and gateways also ask the store.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Set
from dataclasses import dataclass

from tidepool.serving.bases import base_id
from tidepool.serving.wire import Endpoint

LISTED_S = 15.0
"""Replicas report more often than this by far; a gateway that is connected to one asks nobody whether it is listed."""
_MAX_MOVES = 1000


@dataclass(frozen=True)
class View:
    """What there is now. `moved`: names that were announced after what was seen; None: nobody knows, ask for all.

    `bases`: the ids of those that requests may go to, once they have had a replica; None: nobody has looked yet.
    """

    epoch: str
    number: int
    endpoints: tuple[Endpoint, ...]
    moved: tuple[str, ...] | None
    bases: frozenset[str] | None = None


@dataclass(frozen=True)
class _Reported:
    endpoint: Endpoint
    is_busy: bool
    until: float


class Directory:
    """See the module's docstring."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._epoch = clock, secrets.token_hex(8)
        self._number = 0
        self._reported: dict[str, _Reported] = {}
        self._bases: frozenset[str] | None = None
        self._moves: list[tuple[int, str]] = []
        self._changed = asyncio.Event()

    def report(self, endpoint: Endpoint, is_busy: bool = False) -> None:
        """A replica listens there, and has something to do or not."""
        known = self._reported.get(endpoint.replica_id)
        self._reported[endpoint.replica_id] = _Reported(endpoint, is_busy, self._clock() + LISTED_S)
        if known is None or known.endpoint != endpoint:
            self._change()

    def leave(self, replica_id: str) -> None:
        """A replica goes."""
        if self._reported.pop(replica_id, None):
            self._change()

    def offer(self, bases: frozenset[str]) -> None:
        """Requests may go to these bases, by their ids."""
        if bases != self._bases:
            self._bases = bases
            self._change()

    def busy(self) -> dict[str, bool]:
        """The bases that have a replica, by their ids, and whether one of them has something to do."""
        self._expire()
        found: dict[str, bool] = {}
        for one in self._reported.values():
            base = base_id(one.endpoint.base_digest)
            found[base] = found.get(base, False) or one.is_busy
        return found

    def announce(self, name: str) -> None:
        """An alias or a version of a name is new: look again what it means."""
        self._change()
        self._moves = [*self._moves[-_MAX_MOVES:], (self._number, name)]

    async def watch(self, epoch: str, seen: int, timeout_s: float) -> View:
        """What there is after what was seen in an epoch, or at the end of the time."""
        deadline = self._clock() + timeout_s
        while not self._expire() and epoch == self._epoch and seen == self._number and (left_s := deadline - self._clock()) > 0:
            try:
                async with asyncio.timeout(left_s):
                    await self._changed.wait()
            except TimeoutError:
                break
        is_known = epoch == self._epoch and (not self._moves or seen >= self._moves[0][0] - 1)
        moved = tuple(dict.fromkeys(name for number, name in self._moves if number > seen)) if is_known else None
        return View(self._epoch, self._number, tuple(one.endpoint for one in self._reported.values()), moved, self._bases)

    def _expire(self) -> bool:
        late = [name for name, one in self._reported.items() if one.until < self._clock()]
        for name in late:
            self.leave(name)
        return bool(late)

    def _change(self) -> None:
        self._number += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def answering(before: Set[str], view: View) -> set[str]:
    """The digests of the bases that a gateway's requests may go to, from those before: offered, and what is new once it has a replica."""
    if view.bases is None:
        return set(before)
    return {digest for digest in {*before, *(one.base_digest for one in view.endpoints)} if base_id(digest) in view.bases}
