"""Prepare a dataset: text or chats in, packed token shards in the object store out.

    python jobs/prepare.py jobs/prepare.yaml

A relative `path` in the spec's inputs starts at the current directory. Preparing the same text again writes nothing. The
last line of the output names the dataset; a run's spec gives that name as its `dataset`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from tidepool.data import DatasetInfo, Progress, prepare, sample_texts
from tidepool.errors import TidepoolError
from tidepool.models import copy_tokenizer, fetch_model, find_model, load_tokenizer, train_tokenizer, use_chat_template
from tidepool.scratch import ScratchFolder
from tidepool.specs import DataSpec, load_spec
from tidepool.storage import ObjectStore, open_store
from tidepool.telemetry import configure_logging


def main() -> int:
    """Run the job that the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description="Prepare a dataset from text or chats.")
    parser.add_argument("spec", help="a YAML file, for example jobs/prepare.yaml")
    arguments = parser.parse_args()
    configure_logging()
    try:
        spec = load_spec(arguments.spec, DataSpec)
        info = prepare_dataset(spec, open_store(spec.store))
    except TidepoolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    train, held_out = info.splits["train"], info.splits["held_out"]
    print(
        f"Dataset {info.ref} is in {spec.store}: {train.num_samples} samples of {info.sequence_length} tokens to train on "
        f"({train.num_target_tokens} targets), {held_out.num_samples} held out."
    )
    return 0


def prepare_dataset(spec: DataSpec, store: ObjectStore) -> DatasetInfo:
    """Train or fetch the tokenizer, then prepare the dataset with it."""
    with ScratchFolder("tokenizer") as folder:
        tokenizer_folder = Path(folder) / "tokenizer"
        make_tokenizer(spec, store, tokenizer_folder, Path(folder) / "models")
        return prepare(spec, load_tokenizer(tokenizer_folder), tokenizer_folder, store, print_progress)


def make_tokenizer(spec: DataSpec, store: ObjectStore, folder: Path, cache: Path) -> None:
    """Fill `folder` with the files of the tokenizer that the spec asks for."""
    train, of = spec.tokenizer.train, spec.tokenizer.of
    if train is not None:
        print(f"Training a tokenizer of {train.vocab_size} tokens", flush=True)
        tokenizer: Any = train_tokenizer(sample_texts(spec, train.max_bytes), train.vocab_size)
        tokenizer.save_pretrained(folder)
    if of is not None:
        print(f"Taking the tokenizer of {of}", flush=True)
        copy_tokenizer(fetch_model(find_model(of, store), store, cache), folder)
    if spec.tokenizer.chat_template is not None:
        use_chat_template(folder, spec.tokenizer.chat_template)


def print_progress(progress: Progress) -> None:
    """One line for each report."""
    print(
        f"{progress.num_documents} documents, {progress.num_tokens} tokens, {progress.num_samples} samples; {progress.num_skipped} skipped",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
