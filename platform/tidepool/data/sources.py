"""The documents of a dataset's inputs, in a fixed order: text files and JSONL rows.

Invariants:
- The same files give the same documents in the same order on every machine (inputs as listed, files sorted by name).
- A file or row that cannot be used is counted and shown with its place and reason, never dropped in silence.
- At most one text file, or one JSONL line, is held in memory at a time; the list of files is held whole.
- A file that is not the one that was hashed when it was listed raises `DataError`: a digest never lies about its text.

Formats: `text` (each file is a document) and `jsonl` (each line is `{"text": ...}` or `{"messages": [{"role", "content"}, ...]}`;
other keys of a row are ignored, other keys of a message make the row unusable, because dropping them would change what it says).
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tidepool.errors import DataError
from tidepool.specs import DataSpec, InputSpec, canonical_json

_MAX_EXAMPLES = 10


@dataclass(frozen=True)
class InputFile:
    """A file to read; `name` is its path inside its input, so that moving the whole input changes nothing."""

    path: Path
    name: str
    format: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Document:
    """Text, or the messages of a chat (each with `role` and `content`), and where it stands."""

    place: str
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None

    @cached_property
    def content_hash(self) -> bytes:
        """sha256 of what the document says, wherever it stands."""
        return hashlib.sha256(canonical_json([self.text, self.messages])).digest()

    @property
    def plain_text(self) -> str:
        """All of its words, for training a tokenizer."""
        return self.text if self.text is not None else "\n".join(message["content"] for message in self.messages or ())


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


def list_inputs(spec: DataSpec) -> list[InputFile]:
    """Every input file with the hash of its bytes. Raises `DataError` for a path that is missing, empty or unreadable."""
    return [_describe(path, name, one.format) for one in spec.inputs for name, path in _find(one)]


def read_documents(files: list[InputFile], skipped: Skipped) -> Iterator[Document]:
    """The documents of listed files in order; what cannot be used goes to `skipped`. Raises `DataError`."""
    for file in files:
        yield from (_read_text if file.format == "text" else _read_jsonl)(file, skipped)


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


def _find(one: InputSpec) -> list[tuple[str, Path]]:
    root = Path(one.path)
    try:
        if root.is_file():
            return [(root.name, root)]
        if not root.is_dir():
            raise DataError(f"There is no file or folder {one.path} (looked for {root.absolute()}): correct `path` in the spec's inputs.")
        found = sorted((path.relative_to(root).as_posix(), path) for path in root.glob(one.glob) if path.is_file())
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"Cannot list {one.glob!r} below {one.path}: {error}. Correct `path` or `glob` in the spec's inputs.") from error
    if not found:
        raise DataError(f"No file below {root.absolute()} matches {one.glob!r}: correct `path` or `glob` in the spec's inputs.")
    return found


def _describe(path: Path, name: str, format: str) -> InputFile:
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return InputFile(path, name, format, file.tell(), sha256)
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_text(file: InputFile, skipped: Skipped) -> Iterator[Document]:
    try:
        data = file.path.read_bytes()
    except OSError as error:
        raise _unreadable(file.path, error) from error
    _check_unchanged(file, hashlib.sha256(data).hexdigest())
    try:
        text = data.decode()
    except UnicodeDecodeError:
        skipped.add(file.name, "not UTF-8")
        return
    if text.strip():
        yield Document(file.name, text=text)
    else:
        skipped.add(file.name, "empty")


def _read_jsonl(file: InputFile, skipped: Skipped) -> Iterator[Document]:
    sha256 = hashlib.sha256()
    try:
        with file.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                sha256.update(line)
                if not line.strip():
                    continue
                place = f"{file.name}:{number}"
                row = _parse_row(line, place)
                if isinstance(row, Document):
                    yield row
                else:
                    skipped.add(place, row)
    except OSError as error:
        raise _unreadable(file.path, error) from error
    _check_unchanged(file, sha256.hexdigest())


def _parse_row(line: bytes, place: str) -> Document | str:
    """The document of a JSONL line, or the reason why there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON"
    if not isinstance(row, dict) or ("text" in row) == ("messages" in row):
        return 'expected {"text": ...} or {"messages": [...]}'
    if "messages" in row:
        return _parse_messages(row["messages"], place)
    if not isinstance(row["text"], str) or not row["text"].strip():
        return "`text` is not a string with something in it"
    return Document(place, text=row["text"]) if _is_unicode(row["text"]) else "not valid Unicode"


def _parse_messages(messages: Any, place: str) -> Document | str:
    if not isinstance(messages, list) or not messages:
        return "`messages` is not a list with something in it"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return f"message {number} needs `role` and `content`, both strings"
        if unknown := sorted(message.keys() - {"role", "content"}):
            return f"message {number} has keys that are not supported: {', '.join(unknown)}"
        if not _is_unicode(message["role"] + message["content"]):
            return "not valid Unicode"
    if not any(message["role"] == "assistant" for message in messages):
        return "no message of role `assistant` to learn from"
    return Document(place, messages=tuple(messages))


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can spell and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_unchanged(file: InputFile, sha256: str) -> None:
    if sha256 != file.sha256:
        raise DataError(f"{file.path} changed while it was being prepared: run this again when nothing writes to it.")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"Cannot read {path}: {error.strerror or error}. Make it readable, or leave it out by `glob` in the spec's inputs.")
