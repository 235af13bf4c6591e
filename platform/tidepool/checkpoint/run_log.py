"""A run's log in the object store: `runs/<run>/log/<n>.json`, claims, commits and removals in one order (see `history`)."""

from collections.abc import Iterable, Mapping
from typing import Any

from tidepool.checkpoint.history import (
    Commit,
    Entry,
    Incarnation,
    Removal,
    in_order,
    newest_incarnation,
    newest_removal,
    visible_commits,
)
from tidepool.errors import ObjectExistsError, ObjectNotFoundError, StoreError
from tidepool.storage import LogEntry, ObjectStore, append, log_numbers, read_entry


class RunLog:
    """Reads and extends the log of one run. What was read once is remembered: entries never change, they are only removed."""

    def __init__(self, store: ObjectStore, run: str) -> None:
        self._store, self._prefix = store, f"runs/{run}/log/"
        self._known: dict[int, Entry] = {}

    def read(self) -> dict[int, Entry]:
        """All entries by number, ascending, without those at removed numbers."""
        return in_order(self._read_all())

    def _read_all(self) -> dict[int, Entry]:
        while True:
            numbers, known = log_numbers(self._store, self._prefix), dict[int, Entry]()
            for number in numbers:
                entry = self._known.get(number) or self._fetch(number)
                if entry is not None:
                    known[number] = entry
            self._known = known
            if len(known) == len(numbers):
                return known
            # Some were removed since they were listed, so the list is older than what was read: it may lack newer ones.

    def _fetch(self, number: int) -> Entry | None:
        """The entry at a number, None if it was removed since it was listed."""
        try:
            return self._parse(read_entry(self._store, self._prefix, number))
        except ObjectNotFoundError:
            return None

    def append(self, entry: Entry, details: Mapping[str, Any], entries: Mapping[int, Entry]) -> None:
        """Put an entry after `entries`, which are what was read, with `details` (JSON) beside it.

        Raises `ObjectExistsError` if there is more in the log by now, so that the caller reads it and decides again.
        """
        number = max(entries, default=0) + 1
        append(self._store, self._prefix, {**details, **_to_json(entry)}, expected_number=number)
        self._known[number] = entry
        if number not in self.read():
            raise ObjectExistsError(f"{self._prefix}{number}.json of {self._store.url} was taken, and removed since.")

    def remove(self, numbers: Iterable[int], entries: Mapping[int, Entry]) -> None:
        """Remove commits, those at `numbers` of `entries`, which are what was read; then tidy up. Raises as `append`.

        Claims stay for ever. So does the newest removal: the number after the last entry is never one that was used before.
        """
        older = {number for number, entry in entries.items() if isinstance(entry, Removal)}
        removed = newest_removal(entries).numbers | older | set(numbers)
        self.append(Removal.of(removed), {}, entries)
        for number in sorted(removed & self._known.keys()):
            self._store.delete(f"{self._prefix}{number}.json")
            del self._known[number]

    def newest_incarnation(self) -> int:
        """The number of the incarnation that may commit, 0 for a run that never began."""
        return newest_incarnation(self.read().values())

    def visible_commits(self) -> list[Commit]:
        """The commits that count now, newest first."""
        return visible_commits(self.read().values())

    def _parse(self, entry: LogEntry) -> Entry:
        value = entry.value
        commit = Commit.parse(str(value.get("commit")))
        if commit is not None:
            return commit
        if isinstance(value.get("removed"), list):
            return Removal(tuple((int(first), int(last)) for first, last in value["removed"]))
        base = Commit.parse(str(value.get("base")))
        if not isinstance(value.get("incarnation"), int) or (base is None and value.get("base") is not None):
            raise StoreError(
                f"{self._prefix}{entry.number}.json in {self._store.url} is no claim, commit or removal: restore it from a backup of "
                "the store, or train under another `run` name."
            )
        return Incarnation(value["incarnation"], base)


def _to_json(entry: Entry) -> dict[str, Any]:
    if isinstance(entry, Commit):
        return {"commit": entry.name}
    if isinstance(entry, Removal):
        return {"removed": [list(one) for one in entry.ranges]}
    return {"incarnation": entry.number, "base": entry.base.name if entry.base else None}
