"""A model or an adapter by reference, loaded and ready to compute: an adapter brings its base along."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tidepool.errors import ModelError
from tidepool.models.adapter import attach_adapter, recorded_base
from tidepool.models.pretrained import load_model, load_tokenizer
from tidepool.models.source import ModelSource, fetch_model, find_model
from tidepool.storage import ObjectStore


@dataclass(frozen=True)
class OpenedModel:
    """What was loaded; `base` is the adapter's, None for a whole model."""

    source: ModelSource
    base: ModelSource | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def open_model(ref: str, store: ObjectStore, cache: Path, dtype: torch.dtype | Literal["auto"]) -> OpenedModel:
    """Find, fetch and load a model or an adapter, in eval mode on the CPU. Raises `ModelError`, `StoreError`."""
    source = find_model(ref, store)
    folder = fetch_model(source, store, cache)
    if not (folder / "adapter_config.json").is_file():
        return OpenedModel(source, None, load_model(folder, dtype), load_tokenizer(folder))
    base_ref = source.version.base if source.version is not None else recorded_base(folder)
    if base_ref is None:
        raise ModelError(f"{ref} is an adapter that does not say which base it belongs to: publish it with its base, or merge it.")
    base = find_model(base_ref, store)
    base_folder = fetch_model(base, store, cache)
    model = attach_adapter(load_model(base_folder, dtype), folder, "adapter", base.digest)
    return OpenedModel(source, base, model, load_tokenizer(base_folder))
