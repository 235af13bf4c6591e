"""Keys in a store, and what a gateway knows of them: hashes alone, revoked for good, and what happens when the store is away."""

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tidepool.errors import ApiKeyError, ClusterError, StoreUnreachableError
from tidepool.serving.keys import ApiKey, KeyLog, KeyRing
from tidepool.serving.limits import Limits
from tidepool.storage import LogEntry, append, open_store, put_json


@pytest.fixture
def log(store_url: str) -> KeyLog:
    return KeyLog(open_store(store_url))


def test_a_key_is_shown_once_and_its_hash_alone_is_stored(log: KeyLog, store_url: str) -> None:
    key, secret = log.create("ci", "research", ["bot"], limits=Limits(requests_per_minute=5))
    assert log.all() == [key]
    assert (key.name, key.project, key.models, key.is_admin, key.limits) == (
        "ci",
        "research",
        ("bot",),
        False,
        Limits(requests_per_minute=5),
    )
    store = open_store(store_url)
    stored = b"".join(store.get(info.key) for info in store.list("keys/"))
    assert key.sha256.encode() in stored
    assert secret.encode() not in stored
    assert secret.split("-", 2)[2].encode() not in stored
    assert log.create("ci")[1] != secret


def test_a_revoked_key_stays_revoked(log: KeyLog) -> None:
    (first, _), (second, _) = log.create("one"), log.create("two")
    revoked = log.revoke(first.id)
    assert revoked.revoked_at is not None
    assert log.revoke(first.id) == revoked, "again changes nothing"
    assert log.all() == [revoked, second]
    with pytest.raises(ApiKeyError, match=r"No key 'nobody'.*`tidepool keys list`"):
        log.revoke("nobody")


@pytest.mark.parametrize(("name", "project"), [("a b", None), ("ok", "../up"), ("", None)])
def test_odd_labels_are_refused(log: KeyLog, name: str, project: str | None) -> None:
    with pytest.raises(ApiKeyError, match="cannot be the name of a key or a project"):
        log.create(name, project)
    assert log.all() == []


@pytest.mark.parametrize(
    ("models", "ref", "may"),
    [
        (None, "anything@3", True),
        (("bot",), "bot", True),
        (("bot",), "bot@3", True),
        (("bot",), "bot:canary", True),
        (("bot",), "bots", False),
        (("bot",), "tides", False),
        (("bot@3",), "bot@3", True),
        (("bot@3",), "bot", False),
        (("bot@3",), "bot@4", False),
        (("bot@3",), "bot@3:x", False),
        (("bot",), "", False),
    ],
)
def test_the_scope_of_a_key(models: tuple[str, ...] | None, ref: str, may: bool) -> None:
    key = ApiKey("0" * 12, "0" * 64, "one", None, models, False, Limits(), "2026-11-26T10:00:00+00:00")
    assert key.may_use(ref) is may


class Hands:
    """A ring whose time and whose refreshes are the test's; `read_after` may be exchanged on the way."""

    def __init__(self, read_after: Callable[[int], list[LogEntry]], max_age_s: float = 60) -> None:
        self.now_s, self.read_after = 0.0, read_after
        self.waits: list[asyncio.Event] = []
        self.ring = KeyRing(self._read_after, max_age_s, clock=lambda: self.now_s, wait=self._wait)

    def _read_after(self, number: int) -> list[LogEntry]:
        return self.read_after(number)

    async def _wait(self, time_s: float) -> None:
        assert time_s == 1.0
        self.waits.append(asyncio.Event())
        await self.waits[-1].wait()

    async def next_refresh(self) -> None:
        """Let the background read once more, and wait until it has."""
        num_waits = len(self.waits)
        self.now_s += 1
        self.waits[-1].set()
        while len(self.waits) == num_waits:
            await asyncio.sleep(0)


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work, 20)

    asyncio.run(bounded())


def away(_number: int) -> list[LogEntry]:
    raise StoreUnreachableError("s3://somewhere does not answer")


def test_a_ring_finds_keys_and_notices_what_is_new_in_the_background(log: KeyLog) -> None:
    async def work() -> None:
        key, secret = log.create("one")
        read: list[int] = []
        hands = Hands(lambda number: [read.append(number), log.read_after(number)][1])
        assert await hands.ring.find(secret) == key
        for wrong in (
            "",
            "any",
            secret[:-1],
            secret + "x",
            secret[:-1] + ("a" if secret[-1] != "a" else "b"),
            "tp-" + "0" * 12 + "-" + "A" * 43,
        ):
            assert await hands.ring.find(wrong) is None
        other, other_secret = log.create("two")
        assert await hands.ring.find(other_secret) is None
        await hands.next_refresh()
        assert await hands.ring.find(other_secret) == other
        log.revoke(key.id)
        await hands.next_refresh()
        found = await hands.ring.find(secret)
        assert found is not None
        assert found.revoked_at is not None
        assert hands.ring.is_revoked(key)
        assert read == [0, 1, 2], "what was read is not read again"

    run(work())


def test_keys_go_on_for_a_while_when_the_store_is_away_and_then_nobody_comes_in(log: KeyLog, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        key, secret = log.create("one")
        hands = Hands(log.read_after, max_age_s=5)
        assert await hands.ring.find(secret) == key
        hands.read_after = away
        with caplog.at_level(logging.WARNING, "tidepool"):
            for _ in range(5):
                await hands.next_refresh()
                assert await hands.ring.find(secret) == key
        assert len(caplog.records) == 1, "it is told once, not every second"
        await hands.next_refresh()
        with pytest.raises(ClusterError, match="Keys cannot be checked now"):
            await hands.ring.find(secret)
        hands.read_after = log.read_after
        await hands.next_refresh()
        assert await hands.ring.find(secret) == key

    run(work())


def test_of_two_revocations_the_first_one_counts(log: KeyLog, store_url: str) -> None:
    key, _ = log.create("one")
    revoked = log.revoke(key.id)
    append(open_store(store_url), "keys/", {"event": "revoked", "id": key.id, "revoked_at": "later"})  # by who asked at the same time
    assert log.all() == [revoked]


def test_requests_that_fill_all_threads_hold_up_no_revocation(log: KeyLog) -> None:
    async def work() -> None:
        key, secret = log.create("one")
        hands = Hands(log.read_after)
        assert await hands.ring.find(secret) == key
        log.revoke(key.id)
        answered = threading.Event()
        with ThreadPoolExecutor(2) as lookups:
            asyncio.get_running_loop().set_default_executor(lookups)
            waiting = [asyncio.create_task(asyncio.to_thread(answered.wait, 20)) for _ in range(4)]
            try:
                await asyncio.wait_for(hands.next_refresh(), 10)
                assert hands.ring.is_revoked(key)
            finally:
                answered.set()
                await asyncio.gather(*waiting)

    run(work())


def test_a_gateway_that_never_read_the_keys_lets_nobody_in(log: KeyLog) -> None:
    async def work() -> None:
        key, secret = log.create("one")
        hands = Hands(away)
        for _ in range(2):
            with pytest.raises(ClusterError, match="try again"):
                await hands.ring.find(secret)
        hands.read_after = log.read_after
        await hands.next_refresh()
        assert await hands.ring.find(secret) == key

    run(work())


DAMAGES: dict[str, dict[str, Any]] = {
    "an event of a later version": {"event": "suspended", "id": "x"},
    "no event": {},
    "the revocation of a key that is not there": {"event": "revoked", "id": "x", "revoked_at": "now"},
    "a key without a hash": {"event": "created", "id": "x"},
    "a key once more, with other limits": {},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_log_is_no_log(damage: str, log: KeyLog, store_url: str) -> None:
    async def work() -> None:
        key, secret = log.create("one")
        hands = Hands(log.read_after, max_age_s=1.5)
        assert await hands.ring.find(secret) == key
        again = open_store(store_url).get("keys/1.json") if damage.startswith("a key once more") else None
        put_json(open_store(store_url), "keys/2.json", json.loads(again) | {"limits": {}} if again else DAMAGES[damage])
        with pytest.raises(ApiKeyError, match=r"keys/2.json cannot be understood"):
            log.all()
        await hands.next_refresh()
        assert await hands.ring.find(secret) == key
        await hands.next_refresh()
        with pytest.raises(ClusterError):
            await hands.ring.find(secret)

    run(work())


@pytest.mark.parametrize(
    "change", [{"limits": {"requests_per_minute": 0}}, {"sha256": "é" * 64}, {"models": "bot"}, {"limits": {"speed": 1}}]
)
def test_an_entry_with_odd_values_is_damaged(change: dict[str, Any], log: KeyLog, store_url: str) -> None:
    log.create("one")
    store = open_store(store_url)
    put_json(store, "keys/2.json", json.loads(store.get("keys/1.json")) | change)
    with pytest.raises(ApiKeyError, match=r"keys/2.json"):
        log.all()


def test_requests_that_come_at_once_share_one_reading(log: KeyLog) -> None:
    async def work() -> None:
        key, secret = log.create("one")
        num_reads = 0

        def read_after(number: int) -> list[LogEntry]:
            nonlocal num_reads
            num_reads += 1
            return log.read_after(number)

        hands = Hands(read_after)
        assert await asyncio.gather(*(hands.ring.find(secret) for _ in range(20))) == [key] * 20
        assert num_reads == 1

    run(work())
