"""What every store keeps, against all of them: a local directory, memory, and S3 (a moto server)."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tidepool.errors import ObjectExistsError, ObjectNotFoundError, StoreError
from tidepool.storage import ObjectStore, append, get_json, log_numbers, open_store, put_json, read_last, read_log

BIG = random.Random(1).randbytes(9 * 2**20)


@pytest.fixture
def store(any_store_url: str) -> ObjectStore:
    return open_store(any_store_url)


def test_what_was_put_is_read_back(store: ObjectStore, any_store_url: str) -> None:
    store.put_if_absent("a/b@3=x+y-_.json", b"content")
    again = open_store(store.url)
    assert again.get("a/b@3=x+y-_.json") == b"content"
    assert again.size("a/b@3=x+y-_.json") == 7
    assert store.url == any_store_url


def test_an_object_is_never_overwritten(store: ObjectStore) -> None:
    store.put_if_absent("k", b"first")
    for second in (b"second", b"first"):
        with pytest.raises(ObjectExistsError, match="k exists"):
            store.put_if_absent("k", second)
    assert store.get("k") == b"first"


@pytest.mark.parametrize("size", [0, 5, len(BIG)])
def test_a_file_is_put_whole(store: ObjectStore, tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(BIG[:size])
    store.put_if_absent("x/file", path)
    assert store.size("x/file") == size
    assert store.get("x/file") == BIG[:size]
    with pytest.raises(ObjectExistsError):
        store.put_if_absent("x/file", path)


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (3, 4, b"3456"),
        (8, 100, b"89"),
        (10, 1, b""),
        (50, None, b""),
        (50, 2, b""),
        (2, 0, b""),
    ],
)
def test_ranges(store: ObjectStore, start: int, length: int | None, expected: bytes) -> None:
    store.put_if_absent("k", b"0123456789")
    assert store.get("k", start, length) == expected


@pytest.mark.parametrize(
    "call",
    [lambda s: s.get("no/such"), lambda s: s.get("no/such", 1, 2), lambda s: s.get("no/such", 0, 0), lambda s: s.size("no/such")],
)
def test_a_missing_object_is_named(store: ObjectStore, call: Callable[[ObjectStore], object]) -> None:
    store.put_if_absent("no/other", b"")
    with pytest.raises(ObjectNotFoundError, match="no/such"):
        call(store)


def test_listing_is_deep_and_in_the_order_of_the_keys(store: ObjectStore) -> None:
    keys = ["a/b/c", "a/b-c", "a/b.c", "a/d", "ab/x", "z", "a/B"]
    for key in keys:
        store.put_if_absent(key, key.encode())
    assert [info.key for info in store.list("")] == sorted(keys)
    assert [(info.key, info.size_bytes) for info in store.list("a/b/")] == [("a/b/c", 5)]
    assert [info.key for info in store.list("a/")] == sorted(key for key in keys if key.startswith("a/"))
    assert list(store.list("nothing/here/")) == []
    assert next(iter(store.list("z/")), None) is None


def test_deleting(store: ObjectStore) -> None:
    store.put_if_absent("a/b/c", b"1")
    store.put_if_absent("a/d", b"2")
    for _ in range(2):
        store.delete("a/b/c")
    assert [info.key for info in store.list("")] == ["a/d"]
    store.put_if_absent("a/b/c", b"3")
    assert store.get("a/b/c") == b"3"


def test_many_delete_what_lies_in_the_same_folders(store: ObjectStore) -> None:
    for turn in range(5):
        keys = [f"{turn}/a/b{number % 2}/{number}" for number in range(16)]
        for key in keys:
            store.put_if_absent(key, b"")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(store.delete, keys))
    assert list(store.list("")) == []


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "a/../b", ".", "a/./b", "a b", "a~b", "ä", "a\\b", "a%2Fb"])
def test_keys_that_not_every_store_can_hold_are_refused(store: ObjectStore, key: str) -> None:
    for call in (lambda: store.put_if_absent(key, b""), lambda: store.get(key), lambda: store.delete(key), lambda: store.size(key)):
        with pytest.raises(StoreError, match="not a valid object key"):
            call()


def test_prefixes_end_in_a_slash(store: ObjectStore) -> None:
    for prefix in ("a", "/", "../", "a//"):
        with pytest.raises(StoreError, match="not a valid"):
            list(store.list(prefix))


def test_one_of_eight_racing_writers_wins(store: ObjectStore) -> None:
    for turn in range(5):
        key, winners = f"race/{turn}", []
        barrier = threading.Barrier(8)

        def write(number: int, key: str = key, winners: list[int] = winners, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                store.put_if_absent(key, str(number).encode() * 1000)
            except ObjectExistsError:
                return
            winners.append(number)

        _in_threads([lambda number=number: write(number) for number in range(8)])
        assert len(winners) == 1
        assert store.get(key) == str(winners[0]).encode() * 1000


def test_documents(store: ObjectStore) -> None:
    put_json(store, "d.json", {"b": [1, None], "a": "ä"})
    assert get_json(store, "d.json") == {"a": "ä", "b": [1, None]}
    with pytest.raises(ObjectExistsError):
        put_json(store, "d.json", {})
    store.put_if_absent("bad.json", b'{"cut": ')
    store.put_if_absent("list.json", b"[]")
    for key in ("bad.json", "list.json"):
        with pytest.raises(ValueError, match=r"Expecting value|not an object"):
            get_json(store, key)


def test_a_log_numbers_its_entries_from_one(store: ObjectStore) -> None:
    assert (read_log(store, "log/"), read_last(store, "log/")) == ([], None)
    for value in range(11):
        assert append(store, "log/", {"value": value}).number == value + 1
    assert [(entry.number, entry.value["value"]) for entry in read_log(store, "log/")] == [(n + 1, n) for n in range(11)]
    last = read_last(store, "log/")
    assert last is not None
    assert (last.number, last.value["value"]) == (11, 10)


def test_appending_at_an_expected_number_tells_who_came_late(store: ObjectStore) -> None:
    append(store, "log/", {"who": "first"}, expected_number=1)
    with pytest.raises(ObjectExistsError):
        append(store, "log/", {"who": "late"}, expected_number=1)
    assert [entry.value["who"] for entry in read_log(store, "log/")] == ["first"]


def test_writers_that_append_at_once_all_succeed_with_numbers_of_their_own(store: ObjectStore) -> None:
    numbers: list[int] = []
    _in_threads([lambda: numbers.extend(append(store, "log/", {}).number for _ in range(3))] * 8)
    assert sorted(numbers) == list(range(1, 25)) == log_numbers(store, "log/")


def _in_threads(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
