"""Preparing a dataset: documents in, packed token shards and a manifest out.

Invariants:
- The digest is a function of the text, the tokenizer (its chat template included) and what in the spec shapes the samples;
  where the input stands, where the output goes and what the dataset is called do not matter. Preparing the same thing twice
  writes nothing.
- The dataset exists when its manifest does, which is put after every object it names. Objects are never overwritten: what a
  killed preparation left is taken over if it has the same bytes, and is an error if it does not. So a preparation that was
  killed and run again gives the digest and the bytes of one that was not.
- A document is on the same side (train or held out) in every dataset with the same `held_out_fraction`: its content decides.
- An input's weight decides how often its documents are read for training, never whether they are held out. A document that is
  read more than once is read in passes over all inputs, so that its copies lie far apart.
- A dataset of which more than `max_skipped_fraction` had to be skipped is refused.
- Memory holds a few batches of documents, the open samples and one row group per split; the corpus passes through.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tidepool.data.inputs import InputFile, list_inputs
from tidepool.data.manifest import (
    FORMAT,
    DatasetInfo,
    Split,
    SplitName,
    dataset_prefix,
    read_manifest,
    to_json,
    versions_prefix,
)
from tidepool.data.packing import Packer
from tidepool.data.rows import Document
from tidepool.data.shards import ShardWriter, put_same
from tidepool.data.sources import Skipped, is_in_fraction, read_documents
from tidepool.data.tokenization import Encoded, Encoder, Unusable, encode_ahead
from tidepool.errors import DataError, ObjectExistsError
from tidepool.registry import FileEntry, describe_folder, files_digest
from tidepool.scratch import ScratchFolder
from tidepool.specs import DataSpec, canonical_json
from tidepool.storage import ObjectStore, append, put_json, read_log

_logger = logging.getLogger(__name__)
_REPORT_EVERY_TOKENS = 1_000_000
_REPORT_EVERY_DOCUMENTS = 1_000


@dataclass(frozen=True)
class Progress:
    """How far a preparation is."""

    num_documents: int
    num_tokens: int
    num_samples: int
    num_skipped: int


def prepare(
    spec: DataSpec, tokenizer: Any, tokenizer_folder: Path, store: ObjectStore, progress: Callable[[Progress], None] = lambda _: None
) -> DatasetInfo:
    """Prepare the dataset of a spec, or find that it is there, and make it the newest of its name.

    `tokenizer` is a `transformers` tokenizer and `tokenizer_folder` holds its files and nothing else. `progress` is called
    every thousand documents or million tokens, and at the end. Raises `DataError` and `StoreError`.
    """
    plan = _Plan(spec, list_inputs(spec), tokenizer_folder, describe_folder(tokenizer_folder))
    info = read_manifest(store, spec.dataset, plan.digest)
    if info is not None and _is_whole(store, info):
        _logger.info("Dataset %s was prepared before from the same text and tokenizer: nothing to do", info.ref)
    else:
        info = _write(plan, Encoder(tokenizer), store, progress)
    _check_skipped(spec, info.num_read, info.num_skipped, "; ".join(info.skipped_examples))
    _make_newest(store, info)
    return info


@dataclass(frozen=True)
class _Plan:
    """Everything that decides what the dataset will hold."""

    spec: DataSpec
    files: list[InputFile]
    tokenizer_folder: Path
    tokenizer_files: tuple[FileEntry, ...]

    @property
    def tokenizer_digest(self) -> str:
        return files_digest(self.tokenizer_files)

    @property
    def shape(self) -> dict[str, Any]:
        keys = {"sequence_length", "held_out_fraction", "samples_per_row_group", "row_groups_per_shard"}
        return self.spec.model_dump(mode="json", include=keys)

    @cached_property
    def digest(self) -> str:
        inputs = [[file.format, file.name, file.sha256, file.loss, file.weight] for file in self.files]
        return hashlib.sha256(canonical_json([FORMAT, self.shape, inputs, self.tokenizer_digest])).hexdigest()

    @property
    def prefix(self) -> str:
        return dataset_prefix(self.spec.dataset, self.digest)


class _SplitWriter:
    """Packs one split's documents, writes its shards and counts."""

    def __init__(self, plan: _Plan, store: ObjectStore, folder: Path, name: SplitName) -> None:
        spec = plan.spec
        self._packer = Packer(spec.sequence_length)
        self._shards = ShardWriter(
            store,
            f"{plan.prefix}{name}/",
            folder / f"{name}.parquet",
            sequence_length=spec.sequence_length,
            samples_per_row_group=spec.samples_per_row_group,
            row_groups_per_shard=spec.row_groups_per_shard,
        )
        self.num_documents = self.num_samples = self.num_tokens = self.num_target_tokens = 0

    def add(self, document: Encoded) -> None:
        self.num_documents += 1
        for sample in self._packer.add(document):
            self._add_sample(sample)

    def finish(self) -> Split:
        for sample in self._packer.finish():
            self._add_sample(sample)
        shards = self._shards.finish()
        return Split(self.num_documents, self.num_samples, self.num_tokens, self.num_target_tokens, shards)

    def close(self) -> None:
        self._shards.close()

    def _add_sample(self, sample: list[Encoded]) -> None:
        self.num_samples += 1
        self.num_tokens += sum(len(piece.tokens_T) for piece in sample)
        self.num_target_tokens += sum(int(piece.targets_T.sum()) for piece in sample)
        self._shards.add(sample)


@dataclass
class _Preparation:
    """What a preparation has done so far."""

    writers: dict[SplitName, _SplitWriter]
    skipped: Skipped = field(default_factory=Skipped)
    num_parsed: int = 0
    num_refused: int = 0

    @property
    def num_read(self) -> int:
        return self.num_parsed + self.skipped.num - self.num_refused

    @property
    def progress(self) -> Progress:
        splits = self.writers.values()
        return Progress(
            sum(one.num_documents for one in splits),
            sum(one.num_tokens for one in splits),
            sum(one.num_samples for one in splits),
            self.skipped.num,
        )


def _write(plan: _Plan, encoder: Encoder, store: ObjectStore, progress: Callable[[Progress], None]) -> DatasetInfo:
    with ScratchFolder("prepare") as folder:
        names: tuple[SplitName, ...] = ("train", "held_out")
        work = _Preparation({name: _SplitWriter(plan, store, Path(folder), name) for name in names})
        try:
            _write_documents(plan, encoder, work, progress)
            splits = {name: writer.finish() for name, writer in work.writers.items()}
        finally:
            for writer in work.writers.values():
                writer.close()
    skipped = work.skipped
    if skipped.num:
        _logger.warning("Skipped %d files or rows that cannot be used: %s", skipped.num, skipped)
    if not splits["train"].num_samples:
        raise DataError(
            f"The inputs of dataset {plan.spec.dataset} hold nothing to train on: {splits['held_out'].num_documents} documents are held "
            f"out, {skipped.num} files or rows cannot be used. {skipped}".rstrip()
        )
    _check_skipped(plan.spec, work.num_read, skipped.num, str(skipped))
    for file in plan.tokenizer_files:
        put_same(store, f"{plan.prefix}tokenizer/{file.path}", plan.tokenizer_folder / file.path, file.size_bytes, file.sha256)
    progress(work.progress)
    return _put_manifest(plan, splits, work, store)


def _write_documents(plan: _Plan, encoder: Encoder, work: _Preparation, progress: Callable[[Progress], None]) -> None:
    reported = work.progress
    with closing(encode_ahead(encoder, _documents(plan, work))) as encoded_documents:
        for document, encoded in encoded_documents:
            if isinstance(encoded, Unusable):
                if document.copy == 0:
                    work.skipped.add(document.place, encoded.reason)
                    work.num_refused += 1
                continue
            work.writers[_split(plan.spec, document)].add(encoded)
            now = work.progress
            if (
                now.num_documents - reported.num_documents >= _REPORT_EVERY_DOCUMENTS
                or now.num_tokens - reported.num_tokens >= _REPORT_EVERY_TOKENS
            ):
                progress(now)
                reported = now


def _documents(plan: _Plan, work: _Preparation) -> Iterator[Document]:
    """All documents as often as they are wanted, one pass over the inputs after the other."""
    for number in range(max(math.ceil(file.weight) for file in plan.files)):
        again = Skipped()  # what is skipped counts once
        for document in read_documents([file for file in plan.files if file.weight > number], again if number else work.skipped):
            work.num_parsed += number == 0
            if number < _num_copies(plan.spec, document):
                yield replace(document, copy=number)


def _num_copies(spec: DataSpec, document: Document) -> int:
    """How often a document is read in an epoch: its weight, where a fixed draw decides about the fraction of one."""
    if _split(spec, document) == "held_out":
        return 1
    whole = int(document.weight)
    return whole + is_in_fraction(document.content_hash, document.weight - whole, "mixture")


def _split(spec: DataSpec, document: Document) -> SplitName:
    return "held_out" if is_in_fraction(document.content_hash, spec.held_out_fraction, "held out") else "train"


def _check_skipped(spec: DataSpec, num_read: int, num_skipped: int, examples: str) -> None:
    if num_skipped > spec.max_skipped_fraction * num_read:
        raise DataError(
            f"{num_skipped} of {num_read} rows and files of dataset {spec.dataset} cannot be used, more than max_skipped_fraction "
            f"({spec.max_skipped_fraction:g}) allows. The first of them: {examples}. Correct the inputs, or raise max_skipped_fraction in "
            "the spec if all of these may be left out."
        )


def _put_manifest(plan: _Plan, splits: dict[SplitName, Split], work: _Preparation, store: ObjectStore) -> DatasetInfo:
    info = DatasetInfo(
        name=plan.spec.dataset,
        digest=plan.digest,
        spec_digest=hashlib.sha256(canonical_json(plan.shape)).hexdigest(),
        tokenizer_digest=plan.tokenizer_digest,
        tokenizer_files=plan.tokenizer_files,
        sequence_length=plan.spec.sequence_length,
        samples_per_row_group=plan.spec.samples_per_row_group,
        row_groups_per_shard=plan.spec.row_groups_per_shard,
        splits={str(name): split for name, split in splits.items()},
        num_read=work.num_read,
        num_skipped=work.skipped.num,
        skipped_examples=tuple(work.skipped.examples),
    )
    key = f"{plan.prefix}manifest.json"
    try:
        put_json(store, key, to_json(info))
    except ObjectExistsError:
        if read_manifest(store, info.name, info.digest) != info:
            raise DataError(
                f"{key} in {store.url} describes other objects than the same text gives now (prepared by another version of Tidepool or "
                f"its libraries): delete {plan.prefix} from the store and run jobs/prepare.py again."
            ) from None
    return info


def _is_whole(store: ObjectStore, info: DatasetInfo) -> bool:
    stored = {entry.key: entry.size_bytes for entry in store.list(info.prefix)}
    return info.object_sizes().items() <= stored.items()


def _make_newest(store: ObjectStore, info: DatasetInfo) -> None:
    prefix = versions_prefix(info.name)
    while True:
        log = read_log(store, prefix)
        if log and log[-1].value["digest"] == info.digest:
            return
        try:
            append(store, prefix, {"digest": info.digest}, expected_number=log[-1].number + 1 if log else 1)
        except ObjectExistsError:
            continue  # another preparation was first: look at what it appended
