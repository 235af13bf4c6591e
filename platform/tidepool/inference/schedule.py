"""Which request runs, and whose turn it is: a plain state machine that computes nothing and knows no clock and no thread.

Invariants: at most `max_running` requests run; the others wait and start in the order in which they came. Running requests
with the same adapter make a group, and groups take turns one after the other, so that each request goes on.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from tidepool.inference.batch import Batch
from tidepool.inference.sequence import Sequence


@dataclass
class Group:
    """Running sequences with the same adapter, by request id, and what has been computed of them."""

    adapter: str | None
    sequences: dict[str, Sequence] = field(default_factory=dict)
    batch: Batch = field(default_factory=Batch)


class Schedule:
    """Sequences from their start to their end."""

    def __init__(self, max_running: int) -> None:
        self._max_running = max_running
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()
        self._groups: OrderedDict[str | None, Group] = OrderedDict()  # the next one to take its turn first

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return sum(len(group.sequences) for group in self._groups.values())

    @property
    def has_room(self) -> bool:
        """Whether a new sequence would run at once."""
        return self.num_running < self._max_running

    def add(self, sequence: Sequence) -> None:
        self._waiting[sequence.request.request_id] = sequence
        self._start_waiting()

    def remove(self, sequence: Sequence) -> None:
        request = sequence.request
        if self._waiting.pop(request.request_id, None) is None:
            group = self._groups[request.adapter]
            del group.sequences[request.request_id]
            if not group.sequences:
                del self._groups[request.adapter]
            self._start_waiting()

    def next_turn(self) -> tuple[Group, list[Sequence]] | None:
        """The group whose turn it is and its sequences, oldest first; None if nothing runs."""
        if not self._groups:
            return None
        adapter, group = next(iter(self._groups.items()))
        self._groups.move_to_end(adapter)
        return group, list(group.sequences.values())

    def _start_waiting(self) -> None:
        while self._waiting and self.has_room:
            request_id, sequence = self._waiting.popitem(last=False)
            adapter = sequence.request.adapter
            self._groups.setdefault(adapter, Group(adapter)).sequences[request_id] = sequence
