"""Append-only logs: numbered documents `<prefix><n>.json`, n = 1, 2, 3, ...

Invariants:
- An entry never changes, and no two writers ever have the same number.
- A writer whose answer was lost recognises its own entry by the `attempt` that it put in, and does not append twice.
- Nothing is appended in a store whose endpoint lets two racing writers win (see `fitness`).
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tidepool.errors import ObjectExistsError, ObjectNotFoundError, StoreError
from tidepool.storage.base import ObjectStore
from tidepool.storage.documents import get_json, put_json
from tidepool.storage.fitness import require_fit


@dataclass(frozen=True)
class LogEntry:
    """One entry; `value` is what was appended, and its `attempt`."""

    number: int
    value: dict[str, Any]


def append(store: ObjectStore, prefix: str, value: Mapping[str, Any], *, expected_number: int | None = None) -> LogEntry:
    """Append an entry and return it with its number, the lowest that is free.

    With `expected_number` it takes that number or raises `ObjectExistsError`: somebody else appended first.
    Raises `StoreUnfitError`, `StoreError`.
    """
    require_fit(store)
    document = {**value, "attempt": uuid.uuid4().hex}
    number = expected_number or max(log_numbers(store, prefix), default=0) + 1
    while True:
        try:
            put_json(store, _key(prefix, number), document)
        except StoreError as error:
            if _stands(store, _key(prefix, number), document):
                break  # only the answer was lost
            if expected_number is not None or not isinstance(error, ObjectExistsError):
                raise
            number += 1
        else:
            break
    return LogEntry(number, document)


def log_numbers(store: ObjectStore, prefix: str) -> list[int]:
    """The numbers of all entries, ascending."""
    names = (info.key.removeprefix(prefix).removesuffix(".json") for info in store.list(prefix))
    return sorted(int(name) for name in names if name.isdigit())


def read_log(store: ObjectStore, prefix: str) -> list[LogEntry]:
    """All entries, ascending by number."""
    return [read_entry(store, prefix, number) for number in log_numbers(store, prefix)]


def read_last(store: ObjectStore, prefix: str) -> LogEntry | None:
    """The newest entry, None if there is none."""
    numbers = log_numbers(store, prefix)
    return read_entry(store, prefix, numbers[-1]) if numbers else None


def read_entry(store: ObjectStore, prefix: str, number: int) -> LogEntry:
    """One entry. Raises `ObjectNotFoundError`, `StoreError`."""
    try:
        return LogEntry(number, get_json(store, _key(prefix, number)))
    except ValueError as error:
        raise StoreError(f"{_key(prefix, number)} in {store.url} is damaged ({error}): restore it from a backup of the store.") from error


def _stands(store: ObjectStore, key: str, document: Mapping[str, Any]) -> bool:
    """Whether this very document is at the key."""
    try:
        return get_json(store, key) == document
    except (ObjectNotFoundError, ValueError):
        return False


def _key(prefix: str, number: int) -> str:
    return f"{prefix}{number}.json"
