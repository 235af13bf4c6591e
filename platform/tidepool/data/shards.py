"""Token shards: Parquet objects of fixed-size lists, written once and read by row group.

Columns, one row a sample: `tokens` int32[T], `loss_mask` bool[T], `documents` int32[T] (see `packing.Samples`). A row group
holds `samples_per_row_group` samples and a shard `row_groups_per_shard` row groups; only the last of a split is shorter.

Invariants:
- The same samples give the same bytes (with the same pyarrow), so that an interrupted preparation can be continued.
- Every page carries a checksum, which is verified when it is read: a row group comes back as it was written, or not at all.
- Reading a row group takes ranged reads of its bytes alone, after the footer, which is read once while the shard is open.
"""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import DTypeLike, NDArray

from tidepool.data.manifest import DatasetInfo, Shard, damaged, missing
from tidepool.data.packing import Samples, stack
from tidepool.data.tokenization import Encoded
from tidepool.errors import DataError, ObjectExistsError, ObjectNotFoundError, StoreError
from tidepool.storage import ObjectStore

_CHUNK_BYTES = 16 * 2**20


class ShardWriter:
    """Writes one split's samples below `prefix`, a shard at a time through the file `path`."""

    def __init__(
        self, store: ObjectStore, prefix: str, path: Path, *, sequence_length: int, samples_per_row_group: int, row_groups_per_shard: int
    ) -> None:
        self._store, self._prefix, self._path = store, prefix, path
        self._length, self._group_size = sequence_length, samples_per_row_group
        self._shard_size = samples_per_row_group * row_groups_per_shard
        self._schema = pa.schema(
            [
                (name, pa.list_(kind, sequence_length))
                for name, kind in (("tokens", pa.int32()), ("loss_mask", pa.bool_()), ("documents", pa.int32()))
            ]
        )
        self._row_group: list[list[Encoded]] = []
        self._writer: pq.ParquetWriter | None = None
        self._num_in_shard = 0
        self._shards: list[Shard] = []

    def add(self, sample: list[Encoded]) -> None:
        """Append a sample, given as its pieces."""
        self._row_group.append(sample)
        if len(self._row_group) == self._group_size:
            self._write_row_group()
        if self._num_in_shard == self._shard_size:
            self._put_shard()

    def finish(self) -> tuple[Shard, ...]:
        """Write what is left; returns all shards in order."""
        if self._row_group:
            self._write_row_group()
        if self._num_in_shard:
            self._put_shard()
        return tuple(self._shards)

    def close(self) -> None:
        """Close the file of a shard that an error left unfinished."""
        if self._writer is not None:
            self._writer.close()

    def _write_row_group(self) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._path, self._schema, compression="zstd", use_dictionary=False, write_statistics=False, write_page_checksum=True
            )
        samples = stack(self._row_group, self._length)
        columns = (samples.tokens_NT, samples.loss_mask_NT, samples.documents_NT)
        arrays = [pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), self._length) for column in columns]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema), row_group_size=self._group_size)
        self._num_in_shard += len(self._row_group)
        self._row_group = []

    def _put_shard(self) -> None:
        assert self._writer is not None
        self._writer.close()
        self._writer = None
        key = f"{self._prefix}{len(self._shards):05d}.parquet"
        with self._path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size_bytes = self._path.stat().st_size
        put_same(self._store, key, self._path, size_bytes, sha256)
        self._shards.append(Shard(key, size_bytes, sha256, self._num_in_shard))
        self._num_in_shard = 0


def put_same(store: ObjectStore, key: str, path: Path, size_bytes: int, sha256: str) -> None:
    """Put a file unless the object is there with the same bytes. Raises `DataError` if it is there with others.

    What is there is looked at first: a preparation that goes on after a kill uploads nothing twice.
    """
    found: str | None = None
    try:
        found = _stored_sha256(store, key, size_bytes)
    except ObjectNotFoundError:
        try:
            store.put_if_absent(key, path)
        except ObjectExistsError:  # another preparation of the same was first
            found = _stored_sha256(store, key, size_bytes)
    if found not in (None, sha256):
        raise DataError(
            f"{key} in {store.url} was left there with other bytes by a preparation that did not finish (damaged, or written by "
            "another version of pyarrow): delete it from the store and run jobs/prepare.py again."
        )
    stored = store.size(key)
    if stored != size_bytes:
        raise StoreError(f"{store.url} holds {stored} bytes of {key} after a put of {size_bytes}: this store loses data; use another.")


def _stored_sha256(store: ObjectStore, key: str, size_bytes: int) -> str:
    if store.size(key) != size_bytes:
        return ""
    sha256 = hashlib.sha256()
    for start in range(0, size_bytes, _CHUNK_BYTES):
        sha256.update(store.get(key, start, _CHUNK_BYTES))
    return sha256.hexdigest()


class ShardReader:
    """Reads the row groups of one shard, in any number of threads. Raises `DataError` if its object is missing or damaged."""

    def __init__(self, store: ObjectStore, info: DatasetInfo, shard: Shard) -> None:
        self._store, self._info, self._shard = store, info, shard
        with self._errors():
            self._footer = self._open(None).metadata

    def read(self, row_group: int) -> Samples:
        """Every sample of a row group of this shard."""
        with self._errors():
            table = self._open(self._footer).read_row_group(row_group, use_threads=False)
            return Samples(
                _matrix(table, "tokens", np.int32, self._info.sequence_length),
                _matrix(table, "loss_mask", np.bool_, self._info.sequence_length),
                _matrix(table, "documents", np.int32, self._info.sequence_length),
            )

    def _open(self, footer: pq.FileMetaData | None) -> pq.ParquetFile:
        source = pa.PythonFile(_ObjectFile(self._store, self._shard), mode="r")
        return pq.ParquetFile(source, metadata=footer, pre_buffer=True, page_checksum_verification=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ObjectNotFoundError as error:
            raise missing(self._info, self._shard.key) from error
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise damaged(self._info, self._shard.key) from error


def _matrix(table: pa.Table, name: str, dtype: DTypeLike, length: int) -> NDArray[Any]:
    flat = table.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, dtype=dtype).reshape(-1, length)


class _ObjectFile(io.RawIOBase):
    """An object as a seekable file: each read is one ranged get."""

    def __init__(self, store: ObjectStore, shard: Shard) -> None:
        super().__init__()
        self._store, self._shard, self._position = store, shard, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._shard.size_bytes}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._shard.size_bytes - self._position)
        length = left if size < 0 else min(size, left)
        data = self._store.get(self._shard.key, self._position, length) if length else b""
        self._position += len(data)
        return data
