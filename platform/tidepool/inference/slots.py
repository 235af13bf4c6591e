"""Which adapters have one of the slots that a step can compute with. Pure: no tensors, no clock.

Invariants:
- A sequence runs only while its adapter has a slot, and the slot of an adapter that sequences run with is never taken.
- An adapter that waits gets a free slot, or that of the least recently used one that nobody runs with. Where all are in use, that of the
  one with the fewest running sequences is *reserved*: nobody starts with it any more, so that it comes free, however many ask for it.
  Everybody else goes on.
"""

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class Move:
    """From the next step on a slot holds this adapter; None: none."""

    slot: int
    adapter: str | None


class Slots:
    """`num_slots` of them, empty. One turn of the scheduler begins with `begin`, and asks in the order of its fairness."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots))[::-1]
        self._slot_of: OrderedDict[str, int] = OrderedDict()  # the least recently used one first
        self._num_running: dict[str, int] = {}
        self._reserved: set[str] = set()
        self._refused: set[str] = set()
        self._moves: list[Move] = []

    @property
    def adapters(self) -> tuple[str, ...]:
        """Those that have a slot, the least recently used one first."""
        return tuple(self._slot_of)

    def begin(self) -> None:
        """Nobody waits for a slot who does not ask again."""
        self._reserved.clear()
        self._refused.clear()

    def can_start(self, adapter: str | None) -> bool:
        """Whether a sequence with this adapter may start now; if it needs the slot of another, one is reserved for it."""
        if adapter is None:
            return True
        if adapter in self._slot_of:
            return adapter not in self._reserved
        if self._free or self._idle() is not None:
            return True
        if adapter not in self._refused:
            self._refused.add(adapter)
            if others := [one for one in self._slot_of if one not in self._reserved]:
                self._reserved.add(min(others, key=self._num_running.__getitem__))
        return False

    def start(self, adapter: str | None) -> bool:
        """A sequence starts that can; returns whether its adapter has been given a slot for it."""
        if adapter is None:
            return False
        is_new = adapter not in self._slot_of
        if is_new:
            if not self._free:
                idle = self._idle()
                assert idle is not None
                self._free.append(self._slot_of.pop(idle))
            self._slot_of[adapter] = self._free.pop()
            self._moves.append(Move(self._slot_of[adapter], adapter))
        self._slot_of.move_to_end(adapter)
        self._num_running[adapter] = self._num_running.get(adapter, 0) + 1
        return is_new

    def stop(self, adapter: str | None) -> None:
        """A sequence runs no longer."""
        if adapter is None:
            return
        self._num_running[adapter] -= 1
        if not self._num_running[adapter]:
            del self._num_running[adapter]

    def drop(self, adapter: str) -> None:
        """An adapter that nobody runs with needs its slot no longer, if it has one."""
        assert adapter not in self._num_running
        if (slot := self._slot_of.pop(adapter, None)) is not None:
            self._free.append(slot)
            self._moves.append(Move(slot, None))

    def take_moves(self) -> list[Move]:
        """What has changed since they were taken last, in order."""
        moves, self._moves = self._moves, []
        return moves

    def check(self, running: list[str | None]) -> None:
        """Assert the invariants, given the adapters of all running sequences."""
        held = [*self._slot_of.values(), *self._free]
        assert sorted(held) == list(range(len(held)))
        assert {one: running.count(one) for one in set(running) if one is not None} == self._num_running
        assert self._num_running.keys() <= self._slot_of.keys()

    def _idle(self) -> str | None:
        return next((one for one in self._slot_of if one not in self._num_running), None)
