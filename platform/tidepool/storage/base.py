"""What Tidepool asks of an object store: five calls and one guarantee.

Invariants that every implementation keeps:
- *Absent or whole*: an object becomes visible with all of its bytes, or not at all, whatever dies when.
- *First writer wins*: of any number of concurrent `put_if_absent` calls for one key exactly one returns; the others
  raise `ObjectExistsError`. There is no call that overwrites. (Large files are the exception: see `storage.remote`.)
- *Read after write*: once a put has returned, every later `get`, `size` and `list` sees the object.

A call that fails without an answer (`StoreUnreachableError`) may or may not have happened: a writer that must know
reads the key back and compares (see `storage.log` and `checkpoint`). A store holds sockets or handles: each process
opens its own with `open_store(url)`; URLs travel between processes, stores do not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from tidepool.errors import StoreError


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing; `modified_at` is the store's clock, in UTC."""

    key: str
    size_bytes: int
    modified_at: datetime


Data = bytes | memoryview | Path
"""What can be put: bytes (also those that lie in somebody's memory, who must leave them as they are until the put is done), or a file."""


class ObjectStore(Protocol):
    """See the module's docstring. Keys are relative, with `/` between parts that match `[A-Za-z0-9._@=+-]+`."""

    @property
    def url(self) -> str:
        """What `open_store` needs to open the same store elsewhere; it never holds a secret."""
        ...

    def put_if_absent(self, key: str, data: Data) -> None:
        """Write `data` (bytes, or the content of the file at a path, streamed) unless `key` exists.

        Raises `ObjectExistsError` if it does, whatever it holds.
        """
        ...

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes `[start, start + length)` of an object, to its end by default; shorter where the object ends."""
        ...

    def size(self, key: str) -> int:
        """The size of an object in bytes. Raises `ObjectNotFoundError`."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object below `prefix` (empty, or ending in `/`), at any depth, in the order of the keys."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; no error if there is none."""
        ...


_PART_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._@=+-")


def check_key(key: str) -> str:
    """Return `key` if it is a valid object key, else raise `StoreError`.

    A part that is `.` or `..` or holds other characters is refused in every store alike, so that what works in a
    local directory works in S3 and no name reaches outside the store.
    """
    for part in key.split("/"):
        if part in ("", ".", "..") or not _PART_CHARACTERS.issuperset(part):
            raise StoreError(
                f"{key!r} is not a valid object key: each part between slashes needs at least one of the characters "
                "A-Z a-z 0-9 . _ @ = + - and cannot be '.' or '..'. Choose a name of those characters."
            )
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it is empty or a valid key and a slash, else raise `StoreError`."""
    if prefix:
        if not prefix.endswith("/"):
            raise StoreError(f"{prefix!r} is not a valid prefix to list: it must be empty or end in '/'.")
        check_key(prefix[:-1])
    return prefix
