"""S3 and memory through `obstore`.

Invariants:
- A small put is one conditional request. One without an answer is tried again, and if the object is there then, its
  bytes decide whether it is ours.
- Every small call ends within the store's deadline, with an answer or with `StoreUnreachableError`.
- A client that was carried across a fork would hang; it is refused instead.

What is larger than `_SMALL_BYTES` goes up in parts, a few of them in memory: each part is tried again by itself, then the whole upload.
The client asks for no condition there (and Ceph would keep none at the end of such an upload), so the key is looked up
before: two writers that race for one key with large files may both return. By design no two do: such keys hold an attempt's
id or the content's digest.
"""

import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import MemoryStore, S3Store

from tidepool.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreFullError,
    StoreUnreachableError,
)
from tidepool.storage.base import Data, ObjectInfo, check_key, check_prefix
from tidepool.storage.credentials import client_settings

_logger = logging.getLogger(__name__)
_SMALL_BYTES = 8 * 2**20
_PART_BYTES, _PARTS_AT_ONCE = 8 * 2**20, 8  # a store takes 10,000 parts, so files up to 80 GiB; 64 MiB of memory
_REQUEST_TIMEOUT_S = 30.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.1, 5.0
_PART_RETRIES = 8
_METADATA_HOST = "169.254.169.254"  # asked for credentials where the environment has none
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_FULL_CODES = ("QuotaExceeded", "InsufficientStorage", "XMinioStorageFull")
_ACCESS_ADVICE = {
    "ExpiredToken": "the session of these credentials has ended: renew them and start this process again",
    "RequestTimeTooSkewed": "this machine's clock is not the store's: set it (NTP)",
}
_ResultT = TypeVar("_ResultT")
_memory: dict[str, MemoryStore] = {}


def memory_store(name: str) -> "RemoteStore":
    """The store of this name in this process."""
    client = _memory.setdefault(name, MemoryStore())
    return RemoteStore(f"memory://{name}", client, client, 0.0)


def s3_store(bucket: str, prefix: str, deadline_s: float) -> "RemoteStore":
    """A bucket (or a prefix in one) at AWS or at `AWS_ENDPOINT_URL`."""
    settings = client_settings()
    timeout = timedelta(seconds=min(_REQUEST_TIMEOUT_S, deadline_s))

    def client(retries: int) -> S3Store:
        return S3Store(
            bucket,
            prefix=prefix or None,
            **settings,
            client_options={"allow_http": True, "timeout": timeout, "connect_timeout": min(timeout, timedelta(seconds=5))},
            retry_config={"max_retries": retries, "retry_timeout": timedelta(seconds=max(deadline_s, _REQUEST_TIMEOUT_S))},
        )

    try:
        return RemoteStore(f"s3://{bucket}/{prefix}".rstrip("/"), client(0), client(_PART_RETRIES), deadline_s)
    except (BaseError, ValueError) as error:
        raise StoreError(f"The settings for s3://{bucket} in the environment (AWS_...) cannot be used: {_first_line(error)}") from error


class RemoteStore:
    """See the module's docstring. `once` makes one request a call; `parts` tries the parts of an upload again by itself."""

    def __init__(self, url: str, once: Any, parts: Any, deadline_s: float) -> None:
        self.url = url
        self._once, self._parts, self._deadline_s = once, parts, deadline_s
        self._pid = os.getpid()

    def put_if_absent(self, key: str, data: Data) -> None:
        check_key(key)
        if isinstance(data, memoryview) and isinstance(self._once, MemoryStore):
            data = bytes(data)  # it would keep no copy
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        if size > _SMALL_BYTES:
            self._put_in_parts(key, data, size)
            return
        content, is_ambiguous = data.read_bytes() if isinstance(data, Path) else data, False

        def put() -> None:
            nonlocal is_ambiguous
            try:
                obstore.put(self._once, key, content, mode="create", use_multipart=False)
            except AlreadyExistsError:
                if not is_ambiguous or bytes(obstore.get(self._once, key).bytes()) != content:
                    raise
            except BaseError:
                is_ambiguous = True
                raise

        self._try(key, put)

    def _put_in_parts(self, key: str, data: Data, size: int) -> None:
        is_ambiguous = False

        def put() -> None:
            nonlocal is_ambiguous
            if (found := self._find_size(key)) is not None:
                if is_ambiguous and found == size:
                    return  # ours: only the answer to the end of the upload was lost
                raise AlreadyExistsError(key)
            is_ambiguous = True
            obstore.put(self._parts, key, data, use_multipart=True, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)

        self._try(key, put, is_long=True)

    def _find_size(self, key: str) -> int | None:
        try:
            return int(obstore.head(self._once, key)["size"])
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise
            return None

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        check_key(key)
        if length == 0:
            self.size(key)
            return b""
        wanted = {"offset": start} if length is None else (start, start + length)
        options = {} if (start, length) == (0, None) else {"options": {"range": wanted}}
        try:
            return self._try(key, lambda: bytes(obstore.get(self._once, key, **options).bytes()))
        except _StartsPastTheEndError:
            return b""

    def size(self, key: str) -> int:
        check_key(key)
        return int(self._try(key, lambda: obstore.head(self._once, key))["size"])

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        pages = self._try(prefix, lambda: tuple(obstore.list(self._once, prefix=prefix or None)))
        for info in sorted((one for page in pages for one in page), key=lambda one: one["path"]):
            yield ObjectInfo(info["path"], info["size"], info["last_modified"])

    def delete(self, key: str) -> None:
        check_key(key)
        try:
            self._try(key, lambda: obstore.delete(self._once, key))
        except ObjectNotFoundError:
            return

    def _try(self, key: str, call: Callable[[], _ResultT], is_long: bool = False) -> _ResultT:
        """Make a call until it has an answer or the deadline has passed; that of a long one begins when it first fails."""
        if os.getpid() != self._pid:
            raise StoreError(
                f"{self.url} was opened in another process: a client must not cross a fork. Open the store anew in each process."
            )
        deadline, backoff_s = time.monotonic() + self._deadline_s, _FIRST_BACKOFF_S
        while True:
            try:
                return call()
            except (BaseError, FileNotFoundError) as error:
                mapped = self._map(error, key)
                pause_s = backoff_s * random.uniform(0.5, 1.0)
                if is_long:
                    deadline, is_long = time.monotonic() + self._deadline_s, False
                if not isinstance(mapped, StoreUnreachableError) or time.monotonic() + pause_s >= deadline:
                    raise mapped from error
                _logger.warning("trying %s in %s again: %s", key, self.url, _first_line(error))
            time.sleep(pause_s)
            backoff_s = min(_MAX_BACKOFF_S, backoff_s * 2)

    def _map(self, error: Exception, key: str) -> StoreError:
        text, where = str(error), key or "its list"
        status, code = _status_and_code(text)
        if status == 507 or code in _FULL_CODES:
            return StoreFullError(
                f"{self.url} is full: it refused {where} ({code or status}). What was committed is there; make room (delete old runs, "
                "lower checkpoint.keep) or have the quota raised, then submit again."
            )
        is_refused = isinstance(error, UnauthenticatedError | PermissionDeniedError) or status in (401, 403)
        if is_refused or code in _ACCESS_ADVICE or _METADATA_HOST in text:
            return self._access_error(where, status, code)
        if _is_transient(error, status, text):
            return StoreUnreachableError(
                f"{self.url} gave no answer for {where} within {self._deadline_s:g} s ({_first_line(error)}): check the network, "
                "AWS_ENDPOINT_URL, and that the store is up."
            )
        if isinstance(error, AlreadyExistsError):
            return ObjectExistsError(f"{key} exists already in {self.url}.")
        if "NoSuchBucket" in text:
            return StoreError(f"There is no bucket for {self.url}: make it first, or correct the name.")
        if isinstance(error, FileNotFoundError):
            return ObjectNotFoundError(f"No object {key} in {self.url}.")
        if status == 416 or "StartTooLarge" in text:
            return _StartsPastTheEndError(text)
        return StoreError(f"{self.url} failed at {where}: {_first_line(error)}")

    def _access_error(self, where: str, status: int | None, code: str | None) -> StoreAccessError:
        why = ", ".join(part for part in (f"status {status}" if status else "no credentials", code) if part)
        advice = _ACCESS_ADVICE.get(
            code or "",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL, if it is not AWS; AWS_SESSION_TOKEN, if the keys are "
            "temporary and have not expired) on every node, with the right to read and write there",
        )
        return StoreAccessError(f"{self.url} refused access to {where} ({why}): {advice}.")


class _StartsPastTheEndError(StoreError):
    """A range that starts where the object has ended. Caught in `get`."""


def _status_and_code(text: str) -> tuple[int | None, str | None]:
    """The HTTP status and S3's error code in what the client says of an answer, where it has them."""
    status, code = _STATUS.search(text), _CODE.search(text)
    return int(status[1]) if status else None, code[1] if code else None


def _is_transient(error: Exception, status: int | None, text: str) -> bool:
    """Whether the same request may succeed later: no answer, an overloaded server, or a race that is not decided yet."""
    if status is None:
        return "HTTP error" in text
    # S3 answers 409, not 412, where writers race so closely that it cannot say yet who wins.
    return status >= 500 or status in (408, 429) or (isinstance(error, AlreadyExistsError) and status == 409)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
