"""The documents of a dataset's inputs, in a fixed order: text files, and rows of JSONL and Parquet.

Invariants:
- The same files give the same documents in the same order on every machine.
- A file or row that cannot be used is counted and shown with its place and reason, never dropped in silence.
- At most one text file, one JSONL line or one record batch is held in memory at a time; the list of files is held whole.

What a row may hold stands in `rows`; where the files are, in `inputs`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from tidepool.data.inputs import InputFile, check_unchanged, list_inputs, open_input, open_seekable
from tidepool.data.rows import COLUMNS, Document, parse_row
from tidepool.errors import DataError
from tidepool.specs import DataSpec

_MAX_EXAMPLES = 10
_BATCH_ROWS = 256
_BUFFER_BYTES = 2**20
"""Read at a time from a column of a Parquet file."""


@dataclass
class Skipped:
    """What could not be used: how many files and rows, and the first of them as `place: reason`."""

    num: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        """Count one, and remember it if it is among the first."""
        self.num += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(f"{place}: {reason}")

    def __str__(self) -> str:
        more = f" (and {self.num - len(self.examples)} more)" if self.num > len(self.examples) else ""
        return "; ".join(self.examples) + more


def read_documents(files: list[InputFile], skipped: Skipped) -> Iterator[Document]:
    """The documents of listed files in order; what cannot be used goes to `skipped`. Raises `DataError`."""
    for file in files:
        yield from _READERS[file.format](file, skipped)


def documents(spec: DataSpec) -> Iterator[Document]:
    """Every usable document of a spec's inputs, in order. Raises `DataError` for a path that cannot be read."""
    return read_documents(list_inputs(spec), Skipped())


def sample_texts(spec: DataSpec, max_bytes: int) -> Iterator[str]:
    """Texts to train a tokenizer on: all of them, or a sample of about `max_bytes` chosen by content where there is more."""
    files = list_inputs(spec)
    fraction = max_bytes / max(1, sum(file.size_bytes for file in files))
    for document in read_documents(files, Skipped()):
        if is_in_fraction(document.content_hash, fraction, "tokenizer"):
            yield document.plain_text


def is_in_fraction(content_hash: bytes, fraction: float, purpose: str) -> bool:
    """Whether a document belongs to the given fraction of all documents: a fixed draw by its content and a purpose."""
    draw = hashlib.sha256(purpose.encode() + content_hash).digest()
    return int.from_bytes(draw[:8], "big") < fraction * 2**64


def _read_text(file: InputFile, skipped: Skipped) -> Iterator[Document]:
    with open_input(file) as stream:
        data = stream.read()
    check_unchanged(file, hashlib.sha256(data).hexdigest())
    try:
        text = data.decode()
    except UnicodeDecodeError:
        skipped.add(file.name, "not UTF-8")
        return
    if text.strip():
        yield Document(file.name, text=text, loss=file.loss, weight=file.weight)
    else:
        skipped.add(file.name, "empty")


def _read_jsonl(file: InputFile, skipped: Skipped) -> Iterator[Document]:
    sha256 = hashlib.sha256()
    with open_input(file) as lines:
        for number, line in enumerate(lines, start=1):
            sha256.update(line)
            if line.strip():
                yield from _usable(_parse_json(line), file, number, skipped)
    check_unchanged(file, sha256.hexdigest())


def _read_parquet(file: InputFile, skipped: Skipped) -> Iterator[Document]:
    with open_seekable(file) as stream:
        try:
            rows = pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES)
            columns = [name for name in rows.schema_arrow.names if name in COLUMNS]
            if not columns:
                raise DataError(
                    f"{file.where} has the columns {', '.join(rows.schema_arrow.names)}: a Parquet input needs `text`, `messages`, or "
                    "`prompt` and `completion`. Rename its columns, or leave it out by `glob` in the spec's inputs."
                )
            number = 0
            for batch in rows.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield from _usable(row, file, number, skipped)
        except (pa.ArrowException, OSError) as error:  # OSError is what pyarrow raises for damaged pages
            raise DataError(
                f"{file.where} is not a Parquet file that can be read ({str(error).splitlines()[0]}): write it anew, or leave it out by "
                "`glob` in the spec's inputs."
            ) from error


_READERS: dict[str, Callable[[InputFile, Skipped], Iterator[Document]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}


class _NotJson:
    """Stands for a line that holds no JSON value."""


def _parse_json(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return _NotJson()


def _usable(row: object, file: InputFile, number: int, skipped: Skipped) -> Iterator[Document]:
    """The document of row `number`, unless it has to be skipped."""
    place = f"{file.name}:{number}"
    parsed = "not JSON" if isinstance(row, _NotJson) else parse_row(row, place, file.loss, file.weight)
    if isinstance(parsed, Document):
        yield parsed
    else:
        skipped.add(place, parsed)
