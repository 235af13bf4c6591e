"""Whether an object store keeps the promises that commits depend on, tried on the store itself.

    checks/<random>/             what a check writes; it removes all of it
    endpoints/<digest>.json      put once: the endpoint of this digest has passed the race for this store

Invariants:
- An endpoint is trusted only after races of eight writers, each with a client of its own, had exactly one winner each.
  The mark of it is for one endpoint of one store: the same data behind another server is raced for anew.
- A failed race leaves no mark: every process that would write finds out for itself, and a repaired store is used at once.
- Trust costs a process one read (of the mark). A local directory and memory are ours, and need none.
"""

import hashlib
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tidepool.errors import ObjectExistsError, ObjectNotFoundError, StoreError, StoreUnfitError, StoreUnreachableError
from tidepool.scratch import ScratchFolder
from tidepool.storage.base import ObjectStore
from tidepool.storage.documents import put_json
from tidepool.storage.urls import open_store

NUM_WRITERS = 8
_TRUST_ROUNDS, _CHECK_ROUNDS = 3, 8
_LIST_OBJECTS = 1_001  # one more than S3 puts on a page
_LARGE_BYTES = 12 * 2**20  # in parts: see storage.remote
_LEFTOVER_AGE = timedelta(days=1)
_PREFIX = "checks/"
_OURS = ("file:", "memory:")
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")

_trusted: set[tuple[str, str]] = set()
_trust_lock = threading.Lock()


@dataclass(frozen=True)
class Finding:
    """What one check saw; `cost` says what a store that fails it would do to its users."""

    name: str
    is_fit: bool
    detail: str
    cost: str


# --- Trust, before the first commit ----------------------------------------------------------------------------------


def require_fit(store: ObjectStore) -> None:
    """Return if the store's endpoint is trusted, after a race if it has not had one. Raises `StoreUnfitError`, `StoreError`."""
    if store.url.startswith(_OURS):
        return
    identity = store.url, endpoint()
    with _trust_lock:  # the threads of a process find out together
        if identity in _trusted:
            return
        key = f"endpoints/{hashlib.sha256(identity[1].encode()).hexdigest()[:32]}.json"
        if not _exists(store, key):
            winners = _race_for_trust(store)
            with suppress(ObjectExistsError):  # another process raced at the same time
                put_json(store, key, {"endpoint": identity[1], "race": winners, "at": datetime.now(UTC).isoformat("T", "seconds")})
        _trusted.add(identity)


def endpoint() -> str:
    """The S3 endpoint of this process's environment."""
    return next((url for name in _ENDPOINT_VARIABLES if (url := os.environ.get(name))), "AWS").rstrip("/")


def _race_for_trust(store: ObjectStore) -> list[int]:
    _remove_leftovers(store)
    with _trial(store) as prefix:
        winners = [_race(store, f"{prefix}{number}") for number in range(_TRUST_ROUNDS)]
    if any(number != 1 for number in winners):
        raise StoreUnfitError(
            f"{store.url} at {endpoint()} cannot hold commits: of {NUM_WRITERS} writers that raced to create one object, "
            f"{_counts(winners)} won, and exactly one may. Two drivers could both believe that they advance a run. Nothing was written. "
            "Use a store that keeps If-None-Match on a put (AWS S3, Ceph RGW, ...); `tidepool store check URL` shows what else fails."
        )
    return winners


def _race(store: ObjectStore, key: str) -> int:
    """Let writers with clients of their own create one object at once, and once more after; returns how many were told they did."""
    barrier = threading.Barrier(NUM_WRITERS)

    def write(number: int) -> int | None:
        own = open_store(store.url)
        barrier.wait()
        return number if _create(own, key, _content(number)) else None

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        winners = [number for number in pool.map(write, range(NUM_WRITERS)) if number is not None]
    late = _create(store, key, _content(NUM_WRITERS))
    if len(winners) == 1 and not late and store.get(key) != _content(winners[0]):
        return NUM_WRITERS + 1  # the one who was told that it won is not the one who did: somebody overwrote
    return len(winners) + late


def _create(store: ObjectStore, key: str, content: bytes) -> bool:
    try:
        store.put_if_absent(key, content)
    except ObjectExistsError:
        return False
    return True


def _content(number: int) -> bytes:
    return f"writer {number}\n".encode() * 100


# --- All checks, for `tidepool store check` --------------------------------------------------------------------------


def check_fitness(store: ObjectStore) -> Iterator[Finding]:
    """Try everything that Tidepool asks of a store, one finding at a time; nothing is left in the store.

    Raises `StoreError` if it cannot be written to at all. A check that the store answers with an error fails with it.
    """
    _remove_leftovers(store)
    with _trial(store) as prefix:
        store.put_if_absent(f"{prefix}hello", b"hello")
        for name, check, cost in _CHECKS:
            folder = f"{prefix}{name.replace(' ', '-')}/"
            started = time.monotonic()
            try:
                problem, seen = check(store, folder)
            except StoreUnreachableError:
                raise
            except StoreError as error:
                problem, seen = str(error), ""
            detail = problem or f"{seen} ({time.monotonic() - started:.1f} s)"
            yield Finding(name, problem is None, detail, cost)


_Result = tuple[str | None, str]
"""What is wrong (None if nothing is), and what was seen."""


def _check_race(store: ObjectStore, prefix: str) -> _Result:
    winners = [_race(store, f"{prefix}{number}") for number in range(_CHECK_ROUNDS)]
    if any(number != 1 for number in winners):
        return f"of {NUM_WRITERS} racing writers {_counts(winners)} won; exactly one may, in every round", ""
    return None, f"{_CHECK_ROUNDS} rounds of {NUM_WRITERS} writers, one winner each"


def _check_read_after_write(store: ObjectStore, prefix: str) -> _Result:
    other = open_store(store.url)
    for number in range(NUM_WRITERS):
        key, content = f"{prefix}{number}", str(number).encode()
        if _exists(other, key):  # also asks for it before it is there: some caches remember that it was not
            return f"{key} was there before it was written", ""
        store.put_if_absent(key, content)
        try:
            read = other.get(key)
        except ObjectNotFoundError:
            return "another client did not find an object right after it was written", ""
        if read != content or other.size(key) != len(content):
            return "another client read something else than what was written", ""
        if key not in {info.key for info in other.list(prefix)}:
            return "a listing right after a write did not show the object", ""
    return None, f"{NUM_WRITERS} objects, seen at once by get, size and list of another client"


def _check_multipart(store: ObjectStore, prefix: str) -> _Result:
    content = random.Random(0).randbytes(_LARGE_BYTES)
    with ScratchFolder("check") as folder:
        path = Path(folder) / "large"
        path.write_bytes(content)
        store.put_if_absent(f"{prefix}large", path)
    size = store.size(f"{prefix}large")
    if size != len(content):
        return f"an object of {len(content)} bytes has {size} in the store", ""
    if store.get(f"{prefix}large") != content:
        return "a large object comes back with other bytes", ""
    return None, f"a file of {_LARGE_BYTES >> 20} MiB, the same bytes back"


def _check_ranges(store: ObjectStore, prefix: str) -> _Result:
    content = random.Random(1).randbytes(100_000)
    store.put_if_absent(f"{prefix}k", content)
    for start, length in ((0, 1), (1, 10), (50_000, 1000), (99_990, 100), (99_999, None), (0, None), (200_000, 5)):
        end = None if length is None else start + length
        if store.get(f"{prefix}k", start, length) != content[start:end]:
            return f"bytes [{start}, {end if end is not None else 'end'}) are not those of the object", ""
    return None, "parts of an object, its end and past it"


def _check_listing(store: ObjectStore, prefix: str) -> _Result:
    keys = sorted(f"{prefix}{number % 7}/{number}" for number in range(_LIST_OBJECTS))
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        list(pool.map(lambda key: store.put_if_absent(key, b"x"), keys))
    listed = [info.key for info in store.list(prefix)]
    if listed != keys:
        return f"of {len(keys)} objects a listing shows {len(set(listed) & set(keys))} (and {len(set(listed) - set(keys))} others)", ""
    if [info.key for info in store.list(f"{prefix}3/")] != [key for key in keys if key.startswith(f"{prefix}3/")]:
        return "a listing of one folder does not show exactly what is in it", ""
    age = abs(datetime.now(UTC) - next(iter(store.list(prefix))).modified_at)
    if age > timedelta(minutes=15):
        return f"the store's clock and this machine's differ by {age}: requests will be refused, and garbage is aged wrongly", ""
    return None, f"{_LIST_OBJECTS} objects on more than one page, all and in order"


def _check_delete(store: ObjectStore, prefix: str) -> _Result:
    store.put_if_absent(f"{prefix}k", b"x")
    store.delete(f"{prefix}k")
    store.delete(f"{prefix}k")
    if _exists(store, f"{prefix}k") or any(True for _ in store.list(prefix)):
        return "a deleted object is still there", ""
    if not _create(store, f"{prefix}k", b"y") or store.get(f"{prefix}k") != b"y":
        return "a key cannot be written again after a delete", ""
    return None, "gone at once, and no error for what is not there"


_CHECKS: tuple[tuple[str, Callable[[ObjectStore, str], _Result], str], ...] = (
    (
        "one winner",
        _check_race,
        "two drivers could both believe that they advance a run or publish a version, and one's work would be lost. Commits refuse it",
    ),
    (
        "read after write",
        _check_read_after_write,
        "a run could resume from an older commit than its newest, and an alias could seem to move back",
    ),
    ("multipart", _check_multipart, "checkpoints and models above 8 MiB could not be stored; what is damaged is found and not used"),
    ("ranges", _check_ranges, "no checkpoint, dataset or model could be read back"),
    (
        "listing",
        _check_listing,
        "runs with more objects than a listing shows would miss their newest commits, and old ones would never be removed",
    ),
    ("delete", _check_delete, "old checkpoints would never go, and the store would fill up"),
)


# --- What a check leaves: nothing ------------------------------------------------------------------------------------


@contextmanager
def _trial(store: ObjectStore) -> Iterator[str]:
    """A prefix of its own, emptied at the end."""
    prefix = f"{_PREFIX}{uuid.uuid4().hex}/"
    try:
        yield prefix
    finally:
        _remove(store, [info.key for info in store.list(prefix)])


def _remove_leftovers(store: ObjectStore) -> None:
    """Remove what checks that were killed left a day ago or earlier."""
    oldest = datetime.now(UTC) - _LEFTOVER_AGE
    _remove(store, [info.key for info in store.list(_PREFIX) if info.modified_at < oldest])


def _remove(store: ObjectStore, keys: Sequence[str]) -> None:
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        list(pool.map(store.delete, keys))


def _exists(store: ObjectStore, key: str) -> bool:
    try:
        store.size(key)
    except ObjectNotFoundError:
        return False
    return True


def _counts(winners: Sequence[int]) -> str:
    return ", ".join(map(str, winners))
