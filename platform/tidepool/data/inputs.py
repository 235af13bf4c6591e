"""The files of a dataset's inputs: found, hashed and opened, on this machine or behind any URL that `fsspec` reads.

Invariants:
- The same files give the same list on every machine (inputs as listed, files sorted by name), wherever they stand.
- A file is opened as a stream; one that is not the one that was hashed when it was listed raises `DataError`: a digest never
  lies about its text.
- Whatever goes wrong on the way to the bytes is a `DataError` that names the file; credentials come from the environment.

A Parquet file behind a URL passes through a temporary file, because it is read out of order: one download, one check.
"""

import errno
import hashlib
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

import fsspec

from tidepool.errors import DataError, TidepoolError
from tidepool.specs import DataSpec, InputSpec, Loss

_BLOCK_BYTES = 8 * 2**20
"""Read at a time from a URL, and the memory that an open file takes."""
_WAY_OUT = "correct `path` or `glob` in the spec's inputs."


@dataclass(frozen=True)
class InputFile:
    """A file to read; `name` is its path inside its input, so that moving the whole input changes nothing.

    `where` is its path or URL; `loss` and `weight` are its input's.
    """

    where: str
    name: str
    format: str
    size_bytes: int
    sha256: str
    loss: Loss = "assistant"
    weight: float = 1.0


def list_inputs(spec: DataSpec) -> list[InputFile]:
    """Every input file with the hash of its bytes. Raises `DataError` for a path that is missing, empty or unreadable."""
    return [_describe(where, name, one) for one in spec.inputs for name, where in _find(one)]


@contextmanager
def open_input(file: InputFile) -> Iterator[IO[bytes]]:
    """The bytes of a file from its start, streamed; whoever reads them calls `check_unchanged` with their hash."""
    with _errors(file.where), _open(file.where) as stream:
        yield stream


@contextmanager
def open_seekable(file: InputFile) -> Iterator[IO[bytes]]:
    """A file to be read in any order, checked before it is handed out."""
    with _errors(file.where), _open(file.where) as stream:
        if _local_path(file.where) is not None:
            check_unchanged(file, _digest(stream)[0])
            stream.seek(0)
            yield stream
            return
        with tempfile.TemporaryFile(prefix="tidepool-input-") as copy:
            check_unchanged(file, _digest(stream, copy)[0])
            copy.seek(0)
            yield copy


def check_unchanged(file: InputFile, sha256: str) -> None:
    """Raises `DataError` if the bytes that were read are not those that were listed."""
    if sha256 != file.sha256:
        raise _changed(file.where)


def _changed(where: str) -> DataError:
    return DataError(f"{where} changed while it was being prepared: run this again when nothing writes to it.")


def _find(one: InputSpec) -> list[tuple[str, str]]:
    path = _local_path(one.path)
    found = _find_remote(one) if path is None else _find_local(one, path)
    if not found:
        raise DataError(f"No file below {one.path if path is None else path.absolute()} matches {one.glob!r}: {_WAY_OUT}")
    return sorted(found)


def _find_local(one: InputSpec, root: Path) -> list[tuple[str, str]]:
    try:
        if root.is_file():
            return [(root.name, str(root))]
        if not root.is_dir():
            raise DataError(f"There is no file or folder {one.path} (looked for {root.absolute()}): correct `path` in the spec's inputs.")
        return [(path.relative_to(root).as_posix(), str(path)) for path in root.glob(one.glob) if path.is_file()]
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"Cannot list {one.glob!r} below {one.path}: {error}. Correct `path` or `glob` in the spec's inputs.") from error


def _find_remote(one: InputSpec) -> list[tuple[str, str]]:
    with _errors(one.path):
        files, root = fsspec.core.url_to_fs(one.path)
        files.invalidate_cache()  # it keeps listings for as long as the process lives
        if files.info(root)["type"] == "file":
            return [(root.rsplit("/", 1)[-1], one.path)]
        root = root.rstrip("/")
        found = files.glob(f"{root}/{one.glob}", detail=True)
        names = (name for name, info in found.items() if info["type"] == "file" and not name.endswith("/"))
        return [(name.removeprefix(f"{root}/"), files.unstrip_protocol(name)) for name in names]


def _describe(where: str, name: str, one: InputSpec) -> InputFile:
    with _errors(where), _open(where) as stream:
        sha256, size_bytes = _digest(stream)
    return InputFile(where, name, one.format, size_bytes, sha256, one.loss, one.weight)


def _digest(stream: IO[bytes], copy: IO[bytes] | None = None) -> tuple[str, int]:
    """sha256 and length of what is left of a stream, which is copied on the way if there is a place for it."""
    sha256, size_bytes = hashlib.sha256(), 0
    while chunk := stream.read(2**20):
        sha256.update(chunk)
        size_bytes += len(chunk)
        if copy is not None:
            copy.write(chunk)
    return sha256.hexdigest(), size_bytes


@contextmanager
def _open(where: str) -> Iterator[IO[bytes]]:
    if (path := _local_path(where)) is not None:
        with path.open("rb") as stream:
            yield stream
        return
    files, name = fsspec.core.url_to_fs(where)
    with files.open(name, "rb", block_size=_BLOCK_BYTES) as remote, io.BufferedReader(remote, 2**20) as buffered:
        yield buffered


def _local_path(path: str) -> Path | None:
    """The path on this machine, None for a URL of another place."""
    if path.startswith("file://"):
        return Path(unquote(urlsplit(path).path))
    return None if "://" in path else Path(path)


@contextmanager
def _errors(where: str) -> Iterator[None]:
    try:
        yield
    except TidepoolError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"Cannot read {where}: there is no such file, folder or bucket. Correct `path` in the spec's inputs.") from error
    except PermissionError as error:
        raise DataError(
            f"Cannot read {where}: {_said(error)}. Make it readable (for a URL, set the credentials in the environment where the job "
            "runs: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL), or leave it out by `glob` in the spec's inputs."
        ) from error
    except Exception as error:  # each of fsspec's file systems has errors of its own; all of them mean that the bytes do not come
        if _local_path(where) is not None and not isinstance(error, OSError):
            raise
        if getattr(error, "errno", None) == errno.EBUSY:  # what s3fs says if the object has another ETag than when it was listed
            raise _changed(where) from error
        raise DataError(
            f"Cannot read {where}: {_said(error)}. Check the address, the network and the credentials in the environment, and try again."
        ) from error


def _said(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0].rstrip(".")
