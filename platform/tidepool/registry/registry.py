"""Publishing, resolving, promoting and fetching model versions, in an object store.

    blobs/<sha256>                         files by content: a file that two versions share is stored once
    models/<name>/versions/<n>.json        an append-only log of versions
    models/<name>/aliases/<alias>/<k>.json an append-only log of where an alias points; the highest entry counts

Invariants:
- A version is visible when its log entry is, and then all of its files are in the store.
- An alias points to one version, and beside it, while a canary is out, to another one that gets a share of the requests.
- No version and no alias entry is ever changed. Two writers at once get different numbers, or one is told.
- Publishing the same files from the same run twice gives one version (a driver may die before it can say that it published).
- What `fetch` returns has been verified against the sha256 of each file.
"""

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tidepool.errors import AliasMovedError, ObjectExistsError, ObjectNotFoundError, RegistryError, StoreError
from tidepool.registry.versions import FileEntry, Kind, ModelVersion, describe_folder, files_digest, is_pickle
from tidepool.specs import Name
from tidepool.storage import LogEntry, ObjectStore, append, cached_folder, get_json, log_numbers, read_last, read_log

DEFAULT_ALIAS = "production"
_CHUNK_BYTES = 16 * 2**20
_name = TypeAdapter(Name)


@dataclass(frozen=True)
class Canary:
    """Version `number` gets `weight` of an alias's requests (0 to 1)."""

    number: int
    weight: float


@dataclass(frozen=True)
class AliasEntry:
    """One move of an alias, the `entry`th: to version `number`, and a canary; a rollback takes the move before it back."""

    entry: int
    number: int
    is_rollback: bool
    moved_at: str
    canary: Canary | None = None


@dataclass(frozen=True)
class Meaning:
    """The versions that a reference means: the second one for `weight` of the requests (0 to 1)."""

    version: ModelVersion
    canary: ModelVersion | None = None
    weight: float = 0.0


class Registry:
    """The registry of one object store."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    # --- Writing -----------------------------------------------------------------------------------------------------

    def publish(
        self,
        name: str,
        kind: Kind,
        folder: Path,
        *,
        base: str | None = None,
        base_digest: str | None = None,
        lineage: Mapping[str, Any],
        metrics: Mapping[str, float],
        alias: str | None = DEFAULT_ALIAS,
    ) -> ModelVersion:
        """Store a folder as the next version of `name` and point `alias` at it (unless None).

        `lineage` (JSON) says where it came from; the same files with the same lineage are one version, however often
        they are published. Raises `RegistryError` for a folder that is empty or holds pickles, `StoreError`.
        """
        _check_name(name)
        files = describe_folder(folder)
        if not files:
            raise RegistryError(f"{folder} holds no files to publish as {name}.")
        if pickles := [file.path for file in files if is_pickle(file.path)]:
            raise RegistryError(
                f"{folder} holds {', '.join(pickles)}: only safetensors are published, never pickles. Convert or remove them."
            )
        for file in files:
            self._put_blob(file, folder / file.path)
        wanted = ModelVersion(
            name,
            0,
            kind,
            files_digest(files),
            files,
            base,
            base_digest,
            dict(lineage),
            dict(metrics),
            datetime.now(UTC).isoformat("T", "seconds"),
        )
        version = self._find_same(wanted)
        if version is None:
            entry = append(self._store, _versions_prefix(name), wanted.to_json())
            version = ModelVersion.from_json(name, entry.number, entry.value)
        # An alias that has pointed here and was moved on since (a rollback, say) is not moved back by publishing again.
        if alias is not None and version.number not in (entry.number for entry in self.history(name, alias)):
            self.promote(name, version.number, alias)
        return version

    def promote(
        self, name: str, number: int, alias: str = DEFAULT_ALIAS, *, expected: int | None = None, canary_weight: float | None = None
    ) -> None:
        """Point an alias at a version; with `expected`, only if it points to that version now.

        With `canary_weight` the alias stays where it is, and the version gets that share of its requests beside it. Raises `RegistryError`
        if there is no such version, or no alias to be a canary of, `AliasMovedError` if somebody else moved the alias meanwhile.
        """
        _check_name(alias)
        self._version(name, number)
        last = read_last(self._store, _alias_prefix(name, alias))
        now = _alias_entry(last) if last else None
        if expected is not None and (now is None or now.number != expected):
            where = f"{name}@{now.number}" if now else "nothing yet"
            raise AliasMovedError(f"{name}:{alias} points to {where}, not to {name}@{expected}: look again before you move it.")
        canary = None
        if canary_weight is not None:
            if not 0 < canary_weight < 1:
                raise RegistryError(f"A canary gets a share of the requests between 0 and 1, not {canary_weight:g}.")
            if now is None or now.number == number:
                where = f"{name}@{number} itself" if now else "nothing yet"
                raise RegistryError(f"{name}:{alias} points to {where}: a canary needs another version beside it. Promote that one first.")
            canary, number = Canary(number, canary_weight), now.number
        self._move(name, alias, AliasEntry((now.entry if now else 0) + 1, number, False, "", canary))

    def rollback(self, name: str, alias: str = DEFAULT_ALIAS) -> ModelVersion:
        """Take the last move of an alias back, a canary's too; again and again goes further back.

        Raises `RegistryError` if there is no such model or was none before, `AliasMovedError` if somebody else moved the alias meanwhile.
        """
        history = self.history(name, alias)
        before = _before(history)
        if before is None:
            self._numbers(name)  # for its error: there may be no such model at all
            raise RegistryError(
                f"{name}:{alias} has no version to go back to" + (": it was never moved." if history else ": it does not exist.")
            )
        version = self._version(name, before.number)
        self._move(name, alias, AliasEntry(history[-1].entry + 1, before.number, True, "", before.canary))
        return version

    def _move(self, name: str, alias: str, to: AliasEntry) -> None:
        value: dict[str, Any] = {
            "number": to.number,
            "is_rollback": to.is_rollback,
            "moved_at": datetime.now(UTC).isoformat("T", "seconds"),
        }
        if to.canary is not None:
            value["canary"] = asdict(to.canary)
        try:
            append(self._store, _alias_prefix(name, alias), value, expected_number=to.entry)
        except ObjectExistsError as error:
            raise AliasMovedError(
                f"Somebody else moved {name}:{alias} at the same time: look where it points now, then try again."
            ) from error

    def _put_blob(self, file: FileEntry, path: Path) -> None:
        with suppress(ObjectExistsError):  # the same content; an object is absent or whole
            self._store.put_if_absent(_blob_key(file.sha256), path)
        stored = self._store.size(_blob_key(file.sha256))
        if stored != file.size_bytes:
            raise StoreError(
                f"{self._store.url} holds {stored} bytes of {_blob_key(file.sha256)}, which has {file.size_bytes} ({file.path}): "
                "delete that object and publish again."
            )

    def _find_same(self, wanted: ModelVersion) -> ModelVersion | None:
        same = (
            v
            for v in self.versions(wanted.name)
            if (v.digest, v.base_digest, v.lineage) == (wanted.digest, wanted.base_digest, wanted.lineage)
        )
        return next(same, None)

    # --- Reading -----------------------------------------------------------------------------------------------------

    def resolve(self, ref: str) -> ModelVersion:
        """The version that `name` (where `production` points, else the newest), `name@3` or `name:alias` means, without canaries.

        Raises `RegistryError` naming what there is.
        """
        return self._resolve(ref, with_canary=False).version

    def meaning(self, ref: str) -> Meaning:
        """The same, with the alias's canary. Raises `RegistryError`."""
        return self._resolve(ref, with_canary=True)

    def _resolve(self, ref: str, with_canary: bool) -> Meaning:
        name, at, number = ref.partition("@")
        if at:
            if not number.isdigit():
                raise RegistryError(f"{ref!r} is not a version: write {name}@3 for the third one, {name}:ALIAS for an alias.")
            return Meaning(self._version(name, int(number)))
        name, colon, alias = ref.partition(":")
        entry = self._last(name, alias or DEFAULT_ALIAS)
        if entry is not None:
            version = self._version(name, entry.number)
            if entry.canary is None or not with_canary:
                return Meaning(version)
            return Meaning(version, self._version(name, entry.canary.number), entry.canary.weight)
        numbers = self._numbers(name)
        if colon:
            exist = ", ".join(sorted(self.aliases(name))) or "none"
            raise RegistryError(f"{name} has no alias {alias!r}; its aliases: {exist}.")
        return Meaning(self._version(name, numbers[-1]))

    def names(self) -> list[str]:
        """All models that have a version, sorted."""
        return sorted({key[1] for key in (info.key.split("/") for info in self._store.list("models/")) if key[2] == "versions"})

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of a name, ascending; none if there are none."""
        return [ModelVersion.from_json(name, entry.number, entry.value) for entry in read_log(self._store, _versions_prefix(name))]

    def aliases(self, name: str) -> dict[str, int]:
        """Where each alias of a name points."""
        names = {info.key.split("/")[3] for info in self._store.list(f"models/{name}/aliases/")}
        return {alias: entry.number for alias in sorted(names) if (entry := self._last(name, alias)) is not None}

    def history(self, name: str, alias: str = DEFAULT_ALIAS) -> list[AliasEntry]:
        """Every move of an alias, the first one first."""
        return [_alias_entry(entry) for entry in read_log(self._store, _alias_prefix(name, alias))]

    def fetch(self, version: ModelVersion, cache: Path) -> Path:
        """The version's files in `cache/<digest>`, fetched once for all processes of the node (see `storage.cache`).

        They stay there until this process ends or calls `storage.release`. Raises what `download` raises, `DiskError`.
        """
        _check_digest(version)
        return cached_folder(cache, version.digest, lambda: version.size_bytes, lambda folder: self.download(version, folder))

    def download(self, version: ModelVersion, folder: Path, names: Iterable[str] | None = None) -> None:
        """Put the version's files (of `names`, those that it has) into an empty folder, verified while they pass.

        A chunk of 16 MiB is in memory at a time. Raises `RegistryError` for a file that is missing or not the one that was
        published; what came before it is left.
        """
        _check_digest(version)
        for file in version.files:
            if names is not None and file.path not in names:
                continue
            path = folder / file.path
            if not path.resolve().is_relative_to(folder.resolve()):
                raise RegistryError(f"{version.ref} names the file {file.path!r}, which is outside its folder: do not use this version.")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fetch_file(version, file, path)

    def _fetch_file(self, version: ModelVersion, file: FileEntry, path: Path) -> None:
        sha256 = hashlib.sha256()
        try:
            with path.open("wb") as output:
                for chunk in self._chunks(file):
                    sha256.update(chunk)
                    output.write(chunk)
        except ObjectNotFoundError as error:
            raise RegistryError(
                f"{file.path} of {version.ref} is missing from the store: use another version, or publish it again."
            ) from error
        if sha256.hexdigest() != file.sha256:
            raise RegistryError(
                f"{file.path} of {version.ref} is not what was published (sha256 differs): use another version, or delete "
                f"{_blob_key(file.sha256)} from the store and publish it again."
            )

    def _chunks(self, file: FileEntry) -> Iterator[bytes]:
        for start in range(0, file.size_bytes, _CHUNK_BYTES):
            yield self._store.get(_blob_key(file.sha256), start, _CHUNK_BYTES)
        if file.size_bytes == 0:
            self._store.size(_blob_key(file.sha256))

    def _last(self, name: str, alias: str) -> AliasEntry | None:
        _check_name(name)
        _check_name(alias)
        last = read_last(self._store, _alias_prefix(name, alias))
        return _alias_entry(last) if last else None

    def _numbers(self, name: str) -> list[int]:
        numbers = log_numbers(self._store, _versions_prefix(name))
        if not numbers:
            known = self.names()
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known) or 'none yet'}."
            raise RegistryError(f"No model {name!r} in {self._store.url}; {hint}")
        return numbers

    def _version(self, name: str, number: int) -> ModelVersion:
        _check_name(name)
        try:
            value = get_json(self._store, f"{_versions_prefix(name)}{number}.json")
        except ObjectNotFoundError as error:
            numbers = self._numbers(name)
            raise RegistryError(f"No version {number} of {name}; its versions: {', '.join(map(str, numbers))}.") from error
        except ValueError as error:
            raise RegistryError(f"Version {number} of {name} in the registry is damaged ({error}): use another version.") from error
        return ModelVersion.from_json(name, number, value)


def _check_digest(version: ModelVersion) -> None:
    if files_digest(version.files) != version.digest:
        raise RegistryError(f"The files of {version.ref} are not those of its digest: its entry is damaged. Use another version.")


def _before(history: list[AliasEntry]) -> AliasEntry | None:
    """The move before the present one: the moves as a stack, from which each rollback takes the last one off."""
    stack: list[AliasEntry] = []
    for entry in history:
        if entry.is_rollback:
            stack.pop()
        else:
            stack.append(entry)
    return stack[-2] if len(stack) > 1 else None


def _alias_entry(entry: LogEntry) -> AliasEntry:
    value = entry.value
    try:
        canary = Canary(int(value["canary"]["number"]), float(value["canary"]["weight"])) if "canary" in value else None
        return AliasEntry(entry.number, int(value["number"]), bool(value["is_rollback"]), str(value["moved_at"]), canary)
    except (KeyError, ValueError, TypeError) as error:
        raise RegistryError(f"Entry {entry.number} of an alias is damaged ({error!r}): promote the version that you want again.") from error


def _check_name(name: str) -> None:
    try:
        _name.validate_python(name)
    except ValidationError as error:
        raise RegistryError(
            f"{name!r} cannot be the name of a model or an alias: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
        ) from error


def _versions_prefix(name: str) -> str:
    return f"models/{name}/versions/"


def _alias_prefix(name: str, alias: str) -> str:
    return f"models/{name}/aliases/{alias}/"


def _blob_key(sha256: str) -> str:
    return f"blobs/{sha256}"
