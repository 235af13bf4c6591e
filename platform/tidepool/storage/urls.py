"""From a URL to a store. Credentials never stand in a URL: S3's come from the environment, as every AWS tool reads them."""

from urllib.parse import urlsplit

from tidepool.errors import StoreError
from tidepool.storage.base import ObjectStore
from tidepool.storage.local import LocalStore
from tidepool.storage.remote import memory_store, s3_store

_DEADLINE_S = 90.0  # a store that is away for a minute costs a wait, not a run


def open_store(url: str, deadline_s: float = _DEADLINE_S) -> ObjectStore:
    """Open `file:///folder`, `s3://bucket/prefix` or `memory://name` (the same store for one name, in this process alone).

    Opening contacts nothing. A call on a store over the network is tried again until `deadline_s` has passed.
    S3 reads `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL` and the like.
    Raises `StoreError` for a URL of another kind.
    """
    parts = urlsplit(url)
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise StoreError(
            f"The store's URL has parts that it cannot have (?, # or @): give s3://bucket/prefix or file:///folder, not {url}."
        )
    if parts.scheme == "file" and not parts.netloc and parts.path.startswith("/"):
        return LocalStore(parts.path)
    if parts.scheme == "s3" and parts.netloc:
        return s3_store(parts.netloc, parts.path.strip("/"), deadline_s)
    if parts.scheme == "memory" and parts.netloc and not parts.path.strip("/"):
        return memory_store(parts.netloc)
    raise StoreError(f"{url!r} is not the URL of a store: give s3://bucket/prefix, or file:/// and an absolute path.")
