"""What a script has been told by PyTorch, in order: enough to run its Python again without computing.

An *event* is a descriptor (nested tuples of plain values, few different ones, each kept once) and a payload of bytes (what was read
from a tensor, most often nothing). Both streams are compressed as they grow, so a step costs a few bytes.

Invariants:
- Events are taken in the order in which they were noted. Whoever takes one compares it with what the script asks for now.
- An exported journal, loaded, is the same journal: noting goes on behind its last event.
- JSON and zlib alone: nothing in it is run.
"""

import json
import struct
import zlib
from typing import Any

Descriptor = tuple[Any, ...]
"""Nested tuples of strings, numbers, booleans and None."""
_NUMBER = struct.Struct("<I")
_FLUSH_BYTES = 2**16
_LEVEL = 1


class Journal:
    """Events, noted and then taken again; see the module's docstring."""

    def __init__(self) -> None:
        self._table: dict[Descriptor, int] = {}
        self._descriptors: list[Descriptor] = []
        self._ids, self._payloads = _Stream(), _Stream()
        self.num_noted = 0
        self._to_take = _Taken(b"", b"", 0)

    @property
    def num_taken(self) -> int:
        """How many events were taken since `load`."""
        return self._to_take.position

    @property
    def num_left(self) -> int:
        """How many are left to take."""
        return self._to_take.num_events - self._to_take.position

    def note(self, descriptor: Descriptor, payload: bytes = b"") -> None:
        """Add an event."""
        number = self._table.get(descriptor)
        if number is None:
            number = self._table[descriptor] = len(self._descriptors)
            self._descriptors.append(descriptor)
        self._ids.write(_NUMBER.pack(number))
        self._payloads.write(_NUMBER.pack(len(payload)) + payload)
        self.num_noted += 1

    def take(self) -> tuple[Descriptor, bytes]:
        """The next event of those that were loaded."""
        number, payload = self._to_take.next()
        return self._descriptors[number], payload

    def export(self) -> dict[str, bytes]:
        """The journal as it is now, in three parts."""
        table = json.dumps({"num_events": self.num_noted, "descriptors": self._descriptors}, separators=(",", ":"))
        return {"table": zlib.compress(table.encode(), _LEVEL), "ids": self._ids.compressed(), "payloads": self._payloads.compressed()}

    @classmethod
    def load(cls, parts: dict[str, bytes]) -> "Journal":
        """The inverse of `export`; all of its events are to be taken."""
        journal = cls()
        table = json.loads(zlib.decompress(parts["table"]))
        journal._descriptors = [_as_tuples(one) for one in table["descriptors"]]
        journal._table = {descriptor: number for number, descriptor in enumerate(journal._descriptors)}
        ids, payloads = zlib.decompress(parts["ids"]), zlib.decompress(parts["payloads"])
        journal._ids.write(ids)
        journal._payloads.write(payloads)
        journal.num_noted = table["num_events"]
        journal._to_take = _Taken(ids, payloads, journal.num_noted)
        return journal


class _Stream:
    def __init__(self) -> None:
        self._compressor = zlib.compressobj(_LEVEL)
        self._done = bytearray()
        self._new = bytearray()

    def write(self, data: bytes) -> None:
        self._new += data
        if len(self._new) > _FLUSH_BYTES:
            self._done += self._compressor.compress(self._new)
            self._new = bytearray()

    def compressed(self) -> bytes:
        """All that was written, as one zlib stream; writing goes on."""
        end = self._compressor.copy()
        return bytes(self._done) + end.compress(self._new) + end.flush()


class _Taken:
    def __init__(self, ids: bytes, payloads: bytes, num_events: int) -> None:
        self._ids, self._payloads, self.num_events = ids, payloads, num_events
        self.position = self._offset = 0

    def next(self) -> tuple[int, bytes]:
        number = _NUMBER.unpack_from(self._ids, 4 * self.position)[0]
        size = _NUMBER.unpack_from(self._payloads, self._offset)[0]
        start = self._offset + 4
        self.position += 1
        self._offset = start + size
        return number, self._payloads[start : self._offset]


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(one) for one in value) if isinstance(value, list) else value
