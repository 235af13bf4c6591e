"""The object store: put-if-absent, get, size, list, delete, over a local directory, S3 and memory; JSON and logs on top."""

from tidepool.storage.base import ObjectInfo, ObjectStore, check_key
from tidepool.storage.cache import CACHE_VARIABLE, cached_folder, release
from tidepool.storage.disk import local_disk
from tidepool.storage.documents import find_json, get_json, put_json
from tidepool.storage.fitness import Finding, check_fitness, endpoint, require_fit
from tidepool.storage.folders import fill_folder
from tidepool.storage.log import LogEntry, append, log_numbers, read_entry, read_last, read_log
from tidepool.storage.urls import open_store

__all__ = [
    "CACHE_VARIABLE",
    "Finding",
    "LogEntry",
    "ObjectInfo",
    "ObjectStore",
    "append",
    "cached_folder",
    "check_fitness",
    "check_key",
    "endpoint",
    "fill_folder",
    "find_json",
    "get_json",
    "local_disk",
    "log_numbers",
    "open_store",
    "put_json",
    "read_entry",
    "read_last",
    "read_log",
    "release",
    "require_fit",
]
