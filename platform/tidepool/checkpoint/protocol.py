"""The commit protocol on an object store (the architecture's "The object store").

    runs/<run>/log/<n>.json                                    claims, commits and removals, in one order (see `history`)
    runs/<run>/checkpoints/<step>/<incarnation>-<attempt>/     data objects and manifest.json, never overwritten
        model-0-of-2.safetensors ...                           a group of tensors, whole (model.safetensors) or in parts
        part-1.json                                            a writer of some parts says that they are there

Invariants:
- A commit is one put-if-absent of the log's next entry, made after every object it names is in the store at the size that
  was written.
- Readers see what a commit names and nothing else; what they read is checked against the sha256 that the writer
  computed. Bytes that differ raise `CorruptCheckpointError`, and the commit before counts instead.
- A step that was reported as committed is in the history of every later incarnation, unless it is damaged. A writer whose
  incarnation is not the newest stops with `SupersededError`.
- Retention says in the log what it removes, then removes a commit before its data; data without a commit is removed only
  when its incarnation is closed and it is a day old.

Which steps are worth a checkpoint, and what is in one, is the caller's business.
"""

import hashlib
import logging
import os
import re
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from tidepool.checkpoint.history import Commit, Entry, Incarnation, newest_incarnation, visible_commits
from tidepool.checkpoint.run_log import RunLog
from tidepool.errors import CorruptCheckpointError, ObjectExistsError, ObjectNotFoundError, StoreError, SupersededError
from tidepool.scratch import ScratchFolder
from tidepool.storage import ObjectStore, find_json, get_json, put_json

if TYPE_CHECKING:
    from torch import Tensor

_logger = logging.getLogger(__name__)
_CHUNK_BYTES = 16 * 2**20
_MAX_CLAIM_TRIES = 100  # each one lost means that another driver, or a commit of the one before, was first
_CHECKSUM_NICENESS = 5
_GARBAGE_AGE = timedelta(days=1)
_OBJECT = re.compile(r"([a-z]+)(?:-\d+-of-\d+)?(?:\.\d+)?\.safetensors")
StoredObject = dict[str, Any]
"""An object's entry in a manifest: `name`, `size_bytes`, `sha256`."""


class Checkpoints:
    """The checkpoints of one incarnation of a run, for its writer; `incarnation` is one that this run has claimed."""

    def __init__(self, store: ObjectStore, run: str, incarnation: Incarnation) -> None:
        self._store, self._run, self._incarnation = store, run, incarnation
        self._log = RunLog(store, run)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, "Tensor"]], details: Mapping[str, Any]) -> Commit:
        """Commit the state after `step` steps: each key of `tensors` becomes one object of named tensors.

        The parts of a commit in one call, for who has all of its tensors. Raises as they do.
        """
        from tidepool.checkpoint.snapshot import Snapshot  # which brings torch, as `load_file` does below

        commit = self.begin(step, uuid.uuid4().hex[:16])
        objects = []
        with ThreadPoolExecutor(1) as executor:
            for name, part in sorted(tensors.items()):
                snapshot = Snapshot()
                snapshot.begin({key: tensor.detach() for key, tensor in part.items()}, executor)
                objects.append(self.put(commit, f"{name}.safetensors", snapshot.data()))
        self.commit(commit, objects, details)
        return commit

    def begin(self, step: int, attempt: str) -> Commit:
        """What is to become a commit. `attempt` (hexadecimal) is used once for a step of this incarnation. Raises as `commit`."""
        self._read_own_log()  # a writer that was taken over learns it before it uploads
        return Commit(self._incarnation.number, step, attempt)

    def put(self, commit: Commit, name: str, data: memoryview) -> StoredObject:
        """Put an object of a commit; returns its entry in the manifest. Raises `StoreError`.

        `name` is that of a group of tensors (`model`), maybe with `-2-of-4` where it is in parts, maybe with `.1` after a try that
        failed, and `.safetensors`.
        """
        assert _OBJECT.fullmatch(name), name
        key = f"{_data_prefix(self._run, commit)}{name}"
        with ThreadPoolExecutor(1, "sha256", _yield_processor) as executor:  # beside the put, on another core
            digest = executor.submit(lambda: hashlib.sha256(data).hexdigest())
            self._store.put_if_absent(key, data)
        stored = self._store.size(key)
        if stored != len(data):
            raise StoreError(
                f"{self._store.url} holds {stored} bytes of {key} after a put of {len(data)}: this store loses data; use another."
            )
        return {"name": name, "size_bytes": len(data), "sha256": digest.result()}

    def note_part(self, commit: Commit, part: int, objects: list[StoredObject]) -> None:
        """Tell whoever makes the commit that this part of its objects is in the store. Raises `StoreError`."""
        with suppress(ObjectExistsError):  # by a try whose answer was lost
            put_json(self._store, _part_key(self._run, commit, part), {"objects": objects})

    def find_part(self, commit: Commit, part: int) -> list[StoredObject] | None:
        """What `note_part` told, None if it has not yet. Raises `StoreError`."""
        told = find_json(self._store, _part_key(self._run, commit, part))
        return told["objects"] if told else None

    def commit(self, commit: Commit, objects: list[StoredObject], details: Mapping[str, Any]) -> None:
        """Let a commit stand, all objects of which were put; `details` (JSON) go into the manifest. May be tried again.

        Raises `SupersededError`, `StoreError`.
        """
        manifest = {"run": self._run, "step": commit.step, "incarnation": commit.incarnation, "objects": objects, **details}
        with suppress(ObjectExistsError):  # an earlier try put it: what that one named is there, too
            put_json(self._store, f"{_data_prefix(self._run, commit)}manifest.json", manifest)
        self._append(commit)

    def _append(self, commit: Commit) -> None:
        while True:
            entries = self._read_own_log()
            if commit in entries.values():
                return
            try:
                self._log.append(commit, {}, entries)
            except ObjectExistsError:
                continue  # somebody else's entry: it says whether we may still commit
            return

    def _read_own_log(self) -> dict[int, Entry]:
        entries = self._log.read()
        newest = newest_incarnation(entries.values())
        if newest != self._incarnation.number:
            raise SupersededError(
                f"Run {self._run} was taken over: incarnation {newest} is newer than this one ({self._incarnation.number}). "
                "Nothing is lost; follow the newer driver, or give this run another name."
            )
        return entries

    def retain(self, keep: int) -> list[Commit]:
        """Remove all but the newest `keep` commits, commits beside the history, and old garbage; return those removed."""
        entries, removed = self._remove_entries(keep)
        for commit in removed:
            for info in list(self._store.list(_data_prefix(self._run, commit))):
                self._store.delete(info.key)
        self._remove_garbage({entry.name for entry in entries.values() if isinstance(entry, Commit)})
        return removed

    def _remove_entries(self, keep: int) -> tuple[dict[int, Entry], list[Commit]]:
        """The log as it was, and the commits that were taken out of it."""
        while True:
            entries = self._read_own_log()
            kept = visible_commits(entries.values())[:keep]
            removed = {number: entry for number, entry in entries.items() if isinstance(entry, Commit) and entry not in kept}
            if not removed:
                return entries, []
            try:
                self._log.remove(removed, entries)
            except ObjectExistsError:
                continue  # somebody else's entry: it says whether we may still remove
            return entries, list(removed.values())

    def _remove_garbage(self, committed: set[str]) -> None:
        oldest = datetime.now(UTC) - _GARBAGE_AGE
        for info in list(self._store.list(f"runs/{self._run}/checkpoints/")):
            step, writer = info.key.split("/")[3:5]
            incarnation, attempt = writer.split("-")
            closed = int(incarnation) < self._incarnation.number
            if closed and info.modified_at < oldest and f"{incarnation}-{step}-{attempt}" not in committed:
                self._store.delete(info.key)

    def restore(self, commit: Commit, name: str) -> dict[str, "Tensor"]:
        """The named tensors of one group of a commit, on the CPU, verified.

        Raises `CorruptCheckpointError` if the bytes are not those that were committed.
        """
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = {}
        entries = [entry for entry in read_manifest(self._store, self._run, commit)["objects"] if _group(entry["name"]) == name]
        with ScratchFolder("restore") as folder:
            for entry in entries:
                path = Path(folder) / entry["name"]
                with path.open("wb") as file:
                    for chunk in _verified_chunks(self._store, self._run, commit, entry):
                        file.write(chunk)
                try:
                    # Cloned, because the tensors of load_file live in a mapping of the file that is about to go.
                    tensors |= {key: tensor.clone() for key, tensor in load_file(path).items()}
                except SafetensorError as error:
                    raise _corrupt(self._run, commit, f"{entry['name']} is not a safetensors file") from error
                path.unlink()
        if not entries:
            raise _corrupt(self._run, commit, f"its manifest names no {name}.safetensors")
        return tensors


def _yield_processor() -> None:
    """Let this thread have what others leave: where a step is computed beside a put, it is not to wait for a checksum."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _CHECKSUM_NICENESS)


def claim_incarnation(store: ObjectStore, run: str, details: Mapping[str, Any]) -> Incarnation:
    """Claim the next incarnation of a run from its newest commit that verifies; `details` (JSON) is kept with it.

    The claim comes first, so that no older driver goes on, and then its base is read; if that does not verify, another
    incarnation is claimed from the commit before, with a warning. Raises `SupersededError` if another driver claims the
    run at the same time, `StoreError`.
    """
    log, damaged = RunLog(store, run), set[Commit]()
    while True:
        claimed = _claim(log, run, damaged, details)
        if claimed.base is None:
            return claimed
        try:
            verify(store, run, claimed.base)
        except CorruptCheckpointError as error:
            damaged.add(claimed.base)
            _logger.warning("falling back to the commit before: %s", error)
        else:
            return claimed


def _claim(log: RunLog, run: str, damaged: set[Commit], details: Mapping[str, Any]) -> Incarnation:
    for _ in range(_MAX_CLAIM_TRIES):
        entries = log.read()
        base = next((commit for commit in visible_commits(entries.values()) if commit not in damaged), None)
        claim = Incarnation(newest_incarnation(entries.values()) + 1, base)
        try:
            log.append(claim, details, entries)
        except ObjectExistsError:
            continue
        return claim
    raise SupersededError(f"Run {run} is being started by another driver at the same time. Let one of them run, or choose another name.")


def verify(store: ObjectStore, run: str, commit: Commit) -> None:
    """Read a whole checkpoint and compare it with its manifest. Raises `CorruptCheckpointError`."""
    for entry in read_manifest(store, run, commit)["objects"]:
        for _ in _verified_chunks(store, run, commit, entry):
            pass


def read_manifest(store: ObjectStore, run: str, commit: Commit) -> dict[str, Any]:
    """The manifest of a commit: `objects` (name, size_bytes, sha256), `step`, and the details its writer gave."""
    try:
        manifest = get_json(store, f"{_data_prefix(run, commit)}manifest.json")
    except ObjectNotFoundError as error:
        raise _corrupt(run, commit, "its manifest is missing") from error
    except ValueError as error:
        raise _corrupt(run, commit, "its manifest is not JSON") from error
    if manifest.get("step") != commit.step or not isinstance(manifest.get("objects"), list):
        raise _corrupt(run, commit, "its manifest is not the one of this commit")
    return manifest


def _verified_chunks(store: ObjectStore, run: str, commit: Commit, entry: Mapping[str, Any]) -> Iterator[bytes]:
    """The bytes of an object in chunks; raises `CorruptCheckpointError` at the end if they are not those committed."""
    key, hasher, start = f"{_data_prefix(run, commit)}{entry['name']}", hashlib.sha256(), 0
    try:
        while start < entry["size_bytes"]:
            chunk = store.get(key, start, min(_CHUNK_BYTES, entry["size_bytes"] - start))
            if not chunk:
                break
            hasher.update(chunk)
            start += len(chunk)
            yield chunk
    except ObjectNotFoundError as error:
        raise _corrupt(run, commit, f"{entry['name']} is missing") from error
    if hasher.hexdigest() != entry["sha256"]:
        raise _corrupt(run, commit, f"{entry['name']} is not what was committed (sha256 differs)")


def _corrupt(run: str, commit: Commit, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"Checkpoint {commit.name} (step {commit.step}) of run {run} cannot be used: {what}.")


def _group(name: str) -> str:
    match = _OBJECT.fullmatch(name)
    return match[1] if match else name


def _part_key(run: str, commit: Commit, part: int) -> str:
    return f"{_data_prefix(run, commit)}part-{part}.json"


def _data_prefix(run: str, commit: Commit) -> str:
    return f"runs/{run}/checkpoints/{commit.step}/{commit.incarnation}-{commit.attempt}/"
