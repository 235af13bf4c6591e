"""What projects may hold at a time, in the store: `pool/quotas/<n>.json`, of which the newest says all.

GPUs are counted; of workers and replicas without GPUs, their CPUs. A project that is not named has no limit.
"""

from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime

from tidepool.errors import ObjectExistsError, StoreError
from tidepool.messages import Quota
from tidepool.storage import LogEntry, ObjectStore, append, read_last

_PREFIX = "pool/quotas/"


def read_quotas(store: ObjectStore) -> tuple[Quota, ...]:
    """All quotas, by project. Raises `StoreError`."""
    return _parse(read_last(store, _PREFIX))


def change_quota(store: ObjectStore, quota: Quota) -> None:
    """Give a project this quota, in place of the one before; one without limits removes it. Raises `StoreError`."""
    while True:
        last = read_last(store, _PREFIX)
        others = [one for one in _parse(last) if one.project != quota.project]
        is_limit = quota.serving_gpus is not None or quota.training_gpus is not None
        try:
            _write(store, [*others, *([quota] if is_limit else [])], last.number + 1 if last else 1)
        except ObjectExistsError:
            continue  # somebody else changed another one in this moment
        return


def _write(store: ObjectStore, quotas: Iterable[Quota], number: int) -> None:
    value = {"quotas": [asdict(quota) for quota in sorted(quotas, key=lambda one: one.project)]}
    append(store, _PREFIX, value | {"at": datetime.now(UTC).isoformat("T", "seconds")}, expected_number=number)


def _parse(entry: LogEntry | None) -> tuple[Quota, ...]:
    if entry is None:
        return ()
    try:
        return tuple(Quota(**one) for one in entry.value["quotas"])
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"{_PREFIX}{entry.number}.json cannot be understood ({error}): use the version of Tidepool that wrote it, or restore it from a "
            "backup of the store."
        ) from error
