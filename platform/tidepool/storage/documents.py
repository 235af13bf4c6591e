"""Small JSON documents in an object store. They are written once, in canonical form, and never changed."""

import json
from collections.abc import Mapping
from typing import Any

from tidepool.errors import ObjectNotFoundError
from tidepool.specs import canonical_json
from tidepool.storage.base import ObjectStore


def put_json(store: ObjectStore, key: str, value: Mapping[str, Any]) -> None:
    """Write a document unless the key exists. Raises `ObjectExistsError`."""
    store.put_if_absent(key, canonical_json(dict(value)))


def get_json(store: ObjectStore, key: str) -> dict[str, Any]:
    """Read a document. Raises `ObjectNotFoundError`, and `ValueError` if it is not a JSON object."""
    value = json.loads(store.get(key))
    if not isinstance(value, dict):
        raise ValueError(f"{key} holds JSON of the type {type(value).__name__}, not an object")
    return value


def find_json(store: ObjectStore, key: str) -> dict[str, Any] | None:
    """The same, None where there is none."""
    try:
        return get_json(store, key)
    except ObjectNotFoundError:
        return None
