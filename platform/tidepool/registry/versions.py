"""What a model version is: a name and a number, files by their content, and where it came from. Pure but for hashing files."""

import fnmatch
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tidepool.errors import RegistryError
from tidepool.specs import canonical_json

Kind = Literal["full", "adapter"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


@dataclass(frozen=True)
class FileEntry:
    """One file of a folder: its path with `/` between parts, its size in bytes and the sha256 of its content (hex)."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ModelVersion:
    """One published version. `base` and `base_digest` are those of the model that an adapter or a further training started from."""

    name: str
    number: int
    kind: Kind
    digest: str
    files: tuple[FileEntry, ...]
    base: str | None
    base_digest: str | None
    lineage: Mapping[str, Any]
    metrics: Mapping[str, float]
    published_at: str

    @property
    def ref(self) -> str:
        """`name@number`, which always means this version."""
        return f"{self.name}@{self.number}"

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(file.size_bytes for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """What the log keeps: everything but the name and the number, which are its key."""
        value = asdict(self)
        del value["name"], value["number"]
        return value

    @classmethod
    def from_json(cls, name: str, number: int, value: Mapping[str, Any]) -> "ModelVersion":
        """Raises `RegistryError` if the entry is not one of a version."""
        try:
            files = tuple(FileEntry(**file) for file in value["files"])
            fields = {key: value[key] for key in ("kind", "digest", "base", "base_digest", "lineage", "metrics", "published_at")}
        except (KeyError, TypeError) as error:
            raise RegistryError(f"Version {number} of {name} in the registry is damaged ({error!r}): use another version.") from error
        return cls(name, number, files=files, **fields)


def files_digest(files: Iterable[FileEntry]) -> str:
    """sha256 (hex) over the paths, sizes and hashes of files, in whatever order they are given."""
    return hashlib.sha256(canonical_json(sorted([f.path, f.size_bytes, f.sha256] for f in files))).hexdigest()


def describe_folder(folder: Path) -> tuple[FileEntry, ...]:
    """Every file below a folder, sorted by path; contents are streamed."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(sorted((_describe(path, folder) for path in paths), key=lambda entry: entry.path))


def is_pickle(path: str) -> bool:
    """Whether a file may hold a pickle, by its name."""
    return any(fnmatch.fnmatchcase(path.rpartition("/")[2], pattern) for pattern in PICKLES)


def _describe(path: Path, folder: Path) -> FileEntry:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(path.relative_to(folder).as_posix(), file.tell(), sha256)
