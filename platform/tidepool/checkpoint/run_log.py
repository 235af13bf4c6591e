"""A run's log in the object store: `runs/<run>/log/<n>.json`, claims and commits in one order (see `history`)."""

from collections.abc import Mapping
from typing import Any

from tidepool.checkpoint.history import Commit, Entry, Incarnation, newest_incarnation, visible_commits
from tidepool.errors import ObjectNotFoundError, StoreError
from tidepool.storage import LogEntry, ObjectStore, append, log_numbers, read_entry


class RunLog:
    """Reads and extends the log of one run. What was read once is remembered: entries never change, they are only removed."""

    def __init__(self, store: ObjectStore, run: str) -> None:
        self._store, self._prefix = store, f"runs/{run}/log/"
        self._known: dict[int, Entry] = {}

    def read(self) -> dict[int, Entry]:
        """All entries by number, ascending."""
        entries = ((number, self._known.get(number) or self._fetch(number)) for number in log_numbers(self._store, self._prefix))
        self._known = {number: entry for number, entry in entries if entry is not None}
        return self._known

    def _fetch(self, number: int) -> Entry | None:
        """The entry at a number, None for a commit that was removed since it was listed."""
        try:
            return self._parse(read_entry(self._store, self._prefix, number))
        except ObjectNotFoundError:
            return None

    def append(self, entry: Entry, number: int, details: Mapping[str, Any]) -> None:
        """Put an entry at a number, with `details` (JSON) beside it. Raises `ObjectExistsError` if another one is there."""
        if isinstance(entry, Commit):
            value: dict[str, Any] = {"commit": entry.name}
        else:
            value = {"incarnation": entry.number, "base": entry.base.name if entry.base else None}
        append(self._store, self._prefix, {**details, **value}, expected_number=number)
        self._known[number] = entry

    def remove(self, number: int) -> None:
        """Remove a commit; claims stay for ever, so that the number after the last one is never taken twice."""
        assert isinstance(self._known[number], Commit)
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
        base = Commit.parse(str(value.get("base")))
        if not isinstance(value.get("incarnation"), int) or (base is None and value.get("base") is not None):
            raise StoreError(
                f"{self._prefix}{entry.number}.json in {self._store.url} is neither a claim nor a commit: restore it from a backup of "
                "the store, or train under another `run` name."
            )
        return Incarnation(value["incarnation"], base)
