"""Keys to the API: made, listed and revoked in the object store, and known to a gateway. Knows no HTTP and no Ray.

    keys/<n>.json      an append-only log: a key was created (its hash, scopes, limits), or revoked

Invariants:
- The store holds the sha256 of a key, never the key, which is shown once, to who creates it. A key has 256 random bits, so that
  a fast hash is enough: there is no list of likely ones to try.
- A key is found by its id, which is no secret; its hash is compared in constant time.
- A key that is revoked stays so. A key never changes: other scopes or limits are another key.
- A gateway reads what is new in the log every `refresh_s` (`KeyRing`), whether or not requests come, and requests never wait
  for that, nor it for them: it has a thread of its own. So a revocation counts within `refresh_s` and the time of one listing.
- While the log cannot be read, keys go on as they were last known, for `max_age_s`: a store that is away takes no revocation
  from anybody, and must not take serving along. After that nobody is let in, since a gateway that alone is cut off from the store
  would honour a stolen key for ever. A gateway that has never read the log lets nobody in.
- An entry that is damaged, or that this version does not understand, may be a revocation: the log then counts as unreadable.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from tidepool.errors import ApiKeyError, ClusterError
from tidepool.serving.limits import Limits
from tidepool.specs import Name
from tidepool.storage import LogEntry, ObjectStore, append, log_numbers, read_entry

_logger = logging.getLogger(__name__)
_PREFIX = "keys/"
_SECRET = re.compile(r"tp-([0-9a-f]{12})-[A-Za-z0-9_-]{43}", re.ASCII)
_NOBODYS_SHA256 = "0" * 64
REFRESH_S = 1.0
_name = TypeAdapter(Name)


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key. `models`: names that it may ask for (with their versions and aliases) or refs as they stand; None: all."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    id: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    name: str
    project: str | None
    models: tuple[str, ...] | None
    is_admin: bool
    limits: Limits
    created_at: str
    revoked_at: str | None = None

    def may_use(self, ref: str) -> bool:
        """Whether requests for `name`, `name@3` or `name:alias` are in its scope."""
        return self.models is None or ref in self.models or re.split("[@:]", ref, maxsplit=1)[0] in self.models


def fold_keys(entries: Iterable[LogEntry], keys: Mapping[str, ApiKey] | None = None) -> dict[str, ApiKey]:
    """The keys after more entries of the log. Raises `ApiKeyError` for an entry that cannot be understood."""
    found = dict(keys or {})
    for entry in entries:
        try:
            match entry.value["event"]:
                case "created":
                    key = _key.validate_python({name: given for name, given in entry.value.items() if name not in ("event", "attempt")})
                    if key.id in found or key.revoked_at is not None:
                        raise ValueError("a key that is there already, or born revoked")
                    found[key.id] = key
                case "revoked":
                    key = found[entry.value["id"]]
                    found[key.id] = replace(key, revoked_at=key.revoked_at or str(entry.value["revoked_at"]))
                case other:
                    raise ValueError(f"an event {other!r}")
        except (KeyError, TypeError, ValueError) as error:  # pydantic's are ValueErrors
            raise ApiKeyError(
                f"{_PREFIX}{entry.number}.json cannot be understood ({type(error).__name__}): use the version of Tidepool that wrote it, "
                "or restore it from a backup of the store."
            ) from error
    return found


_key = TypeAdapter(ApiKey)


class KeyLog:
    """The keys in one object store."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def create(
        self,
        name: str,
        project: str | None = None,
        models: Iterable[str] | None = None,
        is_admin: bool = False,
        limits: Limits | None = None,
    ) -> tuple[ApiKey, str]:
        """A new key, and the secret itself, which nobody can show again. Raises `ApiKeyError`, `StoreError`."""
        for label in (name, project):
            _check_label(label)
        key_id = secrets.token_hex(6)
        secret = f"tp-{key_id}-{secrets.token_urlsafe(32)}"
        scope = None if models is None else tuple(models)
        now = datetime.now(UTC).isoformat("T", "seconds")
        key = ApiKey(key_id, _hash(secret), name, project, scope, is_admin, limits or Limits(), now)
        value = {name: given for name, given in asdict(key).items() if name != "revoked_at"}
        append(self._store, _PREFIX, {"event": "created", **value})
        return key, secret

    def revoke(self, key_id: str) -> ApiKey:
        """Revoke a key; one that is revoked already stays as it was. Raises `ApiKeyError` if there is none, `StoreError`."""
        keys = fold_keys(self.read_after(0))
        if key_id not in keys:
            raise ApiKeyError(f"No key {key_id!r} in {self._store.url}: `tidepool keys list` shows their ids.")
        if keys[key_id].revoked_at is None:
            now = datetime.now(UTC).isoformat("T", "seconds")
            append(self._store, _PREFIX, {"event": "revoked", "id": key_id, "revoked_at": now})
            return replace(keys[key_id], revoked_at=now)
        return keys[key_id]

    def all(self) -> list[ApiKey]:
        """All keys ever made, the oldest first."""
        return list(fold_keys(self.read_after(0)).values())

    def read_after(self, number: int) -> list[LogEntry]:
        """The entries after a number. Raises `StoreError`."""
        return [read_entry(self._store, _PREFIX, new) for new in log_numbers(self._store, _PREFIX) if new > number]


class KeyRing:
    """The keys as one gateway knows them, in one event loop. `read_after` is that of a `KeyLog`, which blocks: it has a thread."""

    def __init__(
        self,
        read_after: Callable[[int], list[LogEntry]],
        max_age_s: float,
        refresh_s: float = REFRESH_S,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._read_after, self._max_age_s, self._refresh_s, self._clock, self._wait = read_after, max_age_s, refresh_s, clock, wait
        self._thread = ThreadPoolExecutor(1, "keys")  # the event loop's own are for the lookups of requests, which may fill them
        self._keys: dict[str, ApiKey] = {}
        self._last_number = 0
        self._read_at: float | None = None
        self._tried = asyncio.Event()
        self._refreshing: asyncio.Task[None] | None = None
        self._problem = ""

    async def find(self, secret: str) -> ApiKey | None:
        """The key that a secret opens, revoked or not; None if there is none. Raises `ClusterError` while keys cannot be known."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._keep_fresh())
        await self._tried.wait()
        if self._read_at is None or self._clock() - self._read_at > self._max_age_s:
            raise ClusterError("Keys cannot be checked now, as the object store does not answer: try again.")
        shape = _SECRET.fullmatch(secret)
        key = self._keys.get(shape[1]) if shape else None
        is_same = hmac.compare_digest(_hash(secret), key.sha256 if key else _NOBODYS_SHA256)
        return key if is_same else None

    def is_revoked(self, key: ApiKey) -> bool:
        """Whether a key that was let in has been revoked since."""
        return self._keys[key.id].revoked_at is not None

    def all(self) -> list[ApiKey]:
        """All keys as last read."""
        return list(self._keys.values())

    async def refresh(self) -> None:
        """Read what is new in the log. Raises `ApiKeyError`, `StoreError`."""
        began_at = self._clock()
        entries = await asyncio.get_running_loop().run_in_executor(self._thread, self._read_after, self._last_number)
        self._keys = fold_keys(entries, self._keys)
        self._last_number = entries[-1].number if entries else self._last_number
        self._read_at = began_at

    async def _keep_fresh(self) -> None:
        while True:
            try:
                await self.refresh()
                self._problem = ""
            except Exception as error:  # noqa: BLE001  whatever fails, the log is read again; `max_age_s` ends it if nothing helps
                if str(error) != self._problem:  # once, not every second
                    self._problem = str(error)
                    _logger.warning("The log of keys cannot be read (%s): keys go on as they were known.", error)
            self._tried.set()
            await self._wait(self._refresh_s)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _check_label(label: str | None) -> None:
    if label is None:
        return
    try:
        _name.validate_python(label)
    except ValidationError as error:
        raise ApiKeyError(
            f"{label!r} cannot be the name of a key or a project: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
        ) from error
