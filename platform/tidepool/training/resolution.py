"""What the names of a new run's spec mean, and whether they belong together: before anything is started."""

import tempfile
from pathlib import Path

from tidepool.data import DatasetInfo, fetch_tokenizer, find_dataset
from tidepool.errors import DataError, ModelError
from tidepool.models import (
    TOKENIZER_FILES,
    ModelSource,
    check_length,
    check_same_tokens,
    copy_files,
    find_model,
    load_config,
    load_tokenizer,
    new_config,
)
from tidepool.scratch import ScratchFolder
from tidepool.specs import RunSpec
from tidepool.storage import ObjectStore, local_disk
from tidepool.training.task import Pins


def resolve(spec: RunSpec, store: ObjectStore) -> Pins:
    """Look the names of a spec up. Raises `DataError`, `ModelError`, `StoreError`."""
    info = find_dataset(store, spec.dataset)
    for split, purpose in (("train", "train on"), ("held_out", "evaluate on")):
        if not info.num_samples[split]:
            raise DataError(f"Dataset {info.ref} has nothing to {purpose}: prepare it from more text, with a held_out_fraction above 0.")
    if spec.model.base is None:
        _check_fit(spec, info, None, store)
        return Pins(info.ref, None, None)
    source = find_model(spec.model.base, store)
    if source.version is not None and source.version.kind == "adapter":
        raise ModelError(f"{source.ref} is an adapter: give the base it was trained on ({source.version.base}) as model.base.")
    _check_fit(spec, info, source, store)
    return Pins(info.ref, source.ref, source.digest)


def _check_fit(spec: RunSpec, info: DatasetInfo, source: ModelSource | None, store: ObjectStore) -> None:
    """Check that model and dataset belong together, by their small files: before a worker is started. Raises `ModelError`."""
    with (
        local_disk(Path(tempfile.gettempdir()), "set TMPDIR to a folder on a larger disk"),
        ScratchFolder("check") as folder,
    ):
        tokenizer = load_tokenizer(fetch_tokenizer(store, info, Path(folder)))
        if source is None:
            assert spec.model.config is not None
            check_length(new_config(spec.model.config, len(tokenizer)), info.sequence_length)
            return
        base = Path(folder) / "base"
        base.mkdir()
        copy_files(source, store, ("config.json", *TOKENIZER_FILES), base)
        check_same_tokens(load_tokenizer(base), tokenizer)
        check_length(load_config(base), info.sequence_length)
