"""A prepared dataset's manifest, and how datasets are found by name.

    datasets/<name>/<digest>/<split>/<nnnnn>.parquet     token shards (see `shards`)
    datasets/<name>/<digest>/tokenizer/<file>            the tokenizer that made them
    datasets/<name>/<digest>/manifest.json               put last: the dataset exists when this does
    datasets/<name>/versions/<n>.json                    a log of digests; the newest is what the bare name means

Invariants: a manifest lists every object with its size and sha256; it is never changed; the same digest has the same manifest.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tidepool.data.order import Layout
from tidepool.errors import DataError, ObjectNotFoundError
from tidepool.registry import FileEntry, describe_folder, files_digest
from tidepool.storage import ObjectStore, fill_folder, find_json, read_log

FORMAT = 2
WINDOW_ROW_GROUPS = 16
"""Row groups that a reader in the global order moves among at a time. Part of what a seed means: it never changes."""

BYTES_PER_TOKEN = 9
"""Of a sample in memory, see `packing.Samples`."""

SplitName = Literal["train", "held_out"]
_REF = re.compile(r"[a-z0-9][a-z0-9._-]*(@[0-9a-f]+)?")


@dataclass(frozen=True)
class Shard:
    """One Parquet object of a split."""

    key: str
    size_bytes: int
    sha256: str
    num_samples: int


@dataclass(frozen=True)
class Split:
    """What a split holds; `num_tokens` leaves padding out."""

    num_documents: int
    num_samples: int
    num_tokens: int
    num_target_tokens: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class DatasetInfo:
    """A prepared dataset, as its manifest describes it."""

    name: str
    digest: str
    spec_digest: str
    tokenizer_digest: str
    tokenizer_files: tuple[FileEntry, ...]
    sequence_length: int
    samples_per_row_group: int
    row_groups_per_shard: int
    splits: Mapping[str, Split]
    num_read: int
    """Rows and text files that were looked at, those that were skipped included; each counts once, whatever its weight."""
    num_skipped: int
    skipped_examples: tuple[str, ...]

    @property
    def ref(self) -> str:
        """`name@digest`, which always means this dataset."""
        return f"{self.name}@{self.digest}"

    @property
    def prefix(self) -> str:
        """Where its objects stand in the store."""
        return dataset_prefix(self.name, self.digest)

    @property
    def row_group_bytes(self) -> int:
        """What a row group takes in memory, decoded: tokens, mask and document numbers."""
        return self.samples_per_row_group * self.sequence_length * BYTES_PER_TOKEN

    @property
    def num_samples(self) -> dict[str, int]:
        """Samples in each split."""
        return {name: split.num_samples for name, split in self.splits.items()}

    def layout(self, split: SplitName) -> Layout:
        """How a split's samples are stored, for `order.sample_at`."""
        return Layout(self.splits[split].num_samples, self.samples_per_row_group, WINDOW_ROW_GROUPS)

    def object_sizes(self) -> dict[str, int]:
        """Every object but the manifest, by key, with its size in bytes."""
        shards = {shard.key: shard.size_bytes for split in self.splits.values() for shard in split.shards}
        return shards | {f"{self.prefix}tokenizer/{file.path}": file.size_bytes for file in self.tokenizer_files}


def dataset_prefix(name: str, digest: str) -> str:
    """The prefix of a dataset's objects."""
    return f"datasets/{name}/{digest}/"


def versions_prefix(name: str) -> str:
    """The prefix of the log of a dataset's digests."""
    return f"datasets/{name}/versions/"


def to_json(info: DatasetInfo) -> dict[str, Any]:
    """The manifest's content."""
    return {"format": FORMAT} | asdict(info)


def read_manifest(store: ObjectStore, name: str, digest: str) -> DatasetInfo | None:
    """The dataset of a name and digest, None if it was never completed. Raises `DataError` for a damaged manifest."""
    key = f"{dataset_prefix(name, digest)}manifest.json"
    if (value := find_json(store, key)) is None:
        return None
    try:
        if value["format"] != FORMAT:
            raise DataError(
                f"{key} has format {value['format']}, this Tidepool reads {FORMAT}: run jobs/prepare.py again with the same spec and "
                "text, or use the version that prepared it."
            )
        return _from_json(value)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{key} in {store.url} is damaged ({error!r}): delete it and run jobs/prepare.py again.") from error


def find_dataset(store: ObjectStore, ref: str) -> DatasetInfo:
    """The dataset that `name` (its newest digest) or `name@digest` means. Raises `DataError` naming what exists."""
    if not _REF.fullmatch(ref):
        raise DataError(f"{ref!r} is not the name of a dataset: give `name` or `name@digest`.")
    name, _, digest = ref.partition("@")
    known = [str(entry.value["digest"]) for entry in read_log(store, versions_prefix(name))]
    digest = digest or (known[-1] if known else "")
    info = read_manifest(store, name, digest) if digest else None
    if info is None:
        exists = f"{name} has the digests {', '.join(dict.fromkeys(known))}" if known else f"there are: {_names(store)}"
        raise DataError(f"No dataset {ref} in {store.url}; {exists}. Prepare it with jobs/prepare.py, or correct the name or the store.")
    return info


def fetch_tokenizer(store: ObjectStore, info: DatasetInfo, folder: Path) -> Path:
    """The dataset's tokenizer as files below `folder`, written whole or not at all; what is there already is used."""

    def fill(temporary: Path) -> None:
        for file in info.tokenizer_files:
            path = temporary / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_get(store, f"{info.prefix}tokenizer/{file.path}", info))
        if files_digest(describe_folder(temporary)) != info.tokenizer_digest:
            raise damaged(info, f"{info.prefix}tokenizer/")

    return fill_folder(folder / info.tokenizer_digest, fill)


def damaged(info: DatasetInfo, key: str) -> DataError:
    """The error for an object whose bytes are not those that were prepared."""
    return DataError(
        f"{key} of dataset {info.ref} is damaged: its bytes are not those that were prepared. Delete it from the store and run "
        "jobs/prepare.py with the same spec and text again, which writes it anew."
    )


def missing(info: DatasetInfo, key: str) -> DataError:
    """The error for an object that the manifest lists and the store does not have."""
    return DataError(
        f"{key} of dataset {info.ref} is missing from the store. Run jobs/prepare.py with the same spec and text again, which restores it."
    )


def _get(store: ObjectStore, key: str, info: DatasetInfo) -> bytes:
    try:
        return store.get(key)
    except ObjectNotFoundError as error:
        raise missing(info, key) from error


def _from_json(value: dict[str, Any]) -> DatasetInfo:
    fields = {key: item for key, item in value.items() if key != "format"}
    fields["tokenizer_files"] = tuple(FileEntry(**file) for file in value["tokenizer_files"])
    fields["skipped_examples"] = tuple(value["skipped_examples"])
    fields["splits"] = {name: _split(split) for name, split in value["splits"].items()}
    return DatasetInfo(**fields)


def _split(value: dict[str, Any]) -> Split:
    return Split(**{**value, "shards": tuple(Shard(**shard) for shard in value["shards"])})


def _names(store: ObjectStore) -> str:
    names = {key.split("/")[1] for key in (entry.key for entry in store.list("datasets/")) if key.split("/")[2] == "versions"}
    return ", ".join(sorted(names)) or "none yet"
