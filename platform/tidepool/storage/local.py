"""A local or mounted directory as an object store that survives a power cut.

A put writes a temporary file, syncs it, links it to its name (which fails if the name is taken) and syncs the folders
whose entries changed. Temporary names hold a `~`, which no key can, so no listing shows them; those that a dead writer
left are removed a day later.

It asks the file system for hard links and for `link` to be atomic: local file systems and NFS have both.
"""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, unquote

from tidepool.errors import ObjectExistsError, ObjectNotFoundError, StoreAccessError, StoreError, StoreFullError
from tidepool.storage.base import Data, ObjectInfo, check_key, check_prefix
from tidepool.storage.direct import write_all

_TEMPORARY = "~tmp"
_TEMPORARY_AGE_S = 86_400


class LocalStore:
    """See the module's docstring. `path` is the absolute path of the directory, as it stands in a URL; a put makes it."""

    def __init__(self, path: str) -> None:
        self._root = Path(unquote(path))
        self.url = f"file://{quote(str(self._root))}"
        self._remove_old_temporaries()

    def put_if_absent(self, key: str, data: Data) -> None:
        target = self._path(key)
        with self._errors(key):
            temporary = self._write_temporary(data)
            try:
                self._link(temporary, target, key)
            finally:
                temporary.unlink()

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        with self._errors(key), self._path(key).open("rb") as file:
            file.seek(start)
            return file.read() if length is None else file.read(length)

    def size(self, key: str) -> int:
        with self._errors(key):
            path = self._path(key)
            if path.is_dir():
                raise IsADirectoryError(str(path))
            return path.stat().st_size

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        top = self._root / check_prefix(prefix)
        with self._errors(prefix):
            keys = sorted(
                (Path(folder) / name).relative_to(self._root).as_posix()
                for folder, folders, names in os.walk(top, onerror=_raise_unless_missing)
                if not _drop_temporaries(folders)
                for name in names
            )
        for key in keys:
            try:
                status = (self._root / key).stat()
            except FileNotFoundError:  # deleted since it was listed
                continue
            yield ObjectInfo(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._errors(key):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return
            for folder in path.parents:
                if folder == self._root:
                    break
                try:
                    folder.rmdir()
                except OSError:  # not empty, or gone by the hand of another deleter
                    break
            for folder in path.parents:
                with suppress(FileNotFoundError):  # removed as we removed ours, or by another deleter
                    _sync_folder(folder)
                    break

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _write_temporary(self, data: Data) -> Path:
        folder = self._root / _TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / uuid.uuid4().hex
        try:
            with path.open("xb") as file:
                if isinstance(data, Path):
                    with data.open("rb") as source:
                        shutil.copyfileobj(source, file, 2**20)
                else:
                    write_all(file, data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:  # also of an interrupt: what cannot be finished must not lie around
            path.unlink(missing_ok=True)
            raise
        return path

    def _link(self, temporary: Path, target: Path, key: str) -> None:
        while True:
            created = self._make_folders(target.parent)
            try:
                os.link(temporary, target)
            except FileNotFoundError:  # a deleter removed the empty folder under our feet
                if not temporary.exists():
                    raise
                continue
            except FileExistsError as error:
                raise ObjectExistsError(f"{key} exists already in {self.url}.") from error
            for folder in created:
                _sync_folder(folder.parent)
            _sync_folder(target.parent)
            return

    def _make_folders(self, folder: Path) -> Sequence[Path]:
        """Make a folder and those above it; returns those that may be new (and whose parents need a sync)."""
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        return missing

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except IsADirectoryError as error:
            raise ObjectNotFoundError(f"No object {key} in {self.url} (it is a folder).") from error
        except FileNotFoundError as error:
            raise ObjectNotFoundError(f"No object {key} in {self.url}.") from error
        except (NotADirectoryError, FileExistsError) as error:
            raise StoreError(f"{key} cannot be used in {self.url}: a part of it is an object there, not a folder.") from error
        except PermissionError as error:
            raise StoreAccessError(
                f"No permission for {error.filename or self.url}: give this user access, or use another store."
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFullError(
                    f"{self.url} is full: it refused {key} ({error.strerror}). What was committed is there; make room on its disk (delete "
                    "old runs, lower checkpoint.keep) or have the quota raised, then submit again."
                ) from error
            raise StoreError(f"{self.url} failed at {key}: {error.strerror or error}. Check the disk and try again.") from error

    def _remove_old_temporaries(self) -> None:
        limit = time.time() - _TEMPORARY_AGE_S
        with suppress(OSError):  # none there, or not ours to remove: nothing depends on it
            for path in (self._root / _TEMPORARY).iterdir():
                if path.stat().st_mtime < limit:
                    path.unlink(missing_ok=True)


def _drop_temporaries(folders: list[str]) -> bool:
    """Keep `os.walk` out of the folder of temporary files; returns False."""
    folders[:] = [name for name in folders if name != _TEMPORARY]
    return False


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
