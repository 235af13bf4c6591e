"""Causal language models and tokenizers as folders: loaded from safetensors, written so that plain `transformers` loads them.

Invariants:
- No pickle is read and no code of a model is run; nothing is downloaded: a folder is all there is.
- A model comes back with every weight that its architecture has, or not at all.
- What `export_model` writes is only what makes the model (see `source`), so that its digest is the same wherever it lies.
- A model's memory is that of its weights, once, whatever its files: weights in their own dtype are mapped from the files and
  copied page by page where somebody writes to them, those in another dtype are converted one at a time; an export is written
  from there. Fetching and hashing take chunks of 16 MiB. So 8 GB of weights need at most 8 GB to compute with, and a layer's
  more to merge; next to nothing to be exported again, 50 MB to be fetched; and `load_shapes` reads headers alone.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from tidepool.errors import ModelError, TidepoolError
from tidepool.models.source import model_files

SHARD_SIZE = "4GB"
"""Of the files of an export: what a store takes in one put, and another try costs."""
_MAX_REASON = 400
disable_progress_bar()  # thousands of lines in a log of many workers, and one of them the last


def load_model(folder: Path, dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    """The causal language model of a folder, in eval mode on the CPU; `auto` is the dtype of its files. Raises `ModelError`."""
    return _load(folder, dtype=dtype)


def load_shapes(folder: Path) -> PreTrainedModel:
    """The model of a folder on the meta device: every name, shape and dtype, and no weight is read.

    Raises `ModelError` for a folder that `load_model` would refuse.
    """
    return _load(folder, dtype="auto", device_map="meta")


def _load(folder: Path, **options: Any) -> PreTrainedModel:
    _check_config(folder)
    with readable(f"Cannot load the model in {folder}"), _silent():
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that we learn which ones, and refuse them below
            **options,
        )
    if absent := sorted(loading["missing_keys"]):
        raise ModelError(f"Cannot load the model in {folder}: {len(absent)} weights are missing from its files, {absent[0]} for one.")
    if wrong := sorted(loading["mismatched_keys"]):
        key, found, wanted = wrong[0]
        raise ModelError(
            f"Cannot load the model in {folder}: {len(wrong)} weights have another shape than its config.json says, {key} for one "
            f"({tuple(found)}, not {tuple(wanted)})."
        )
    return model.eval()


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from printing what we say in an error of our own."""
    before = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(before)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises `ModelError`, also if it has no end-of-text token."""
    with readable(f"Cannot load the tokenizer in {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"The tokenizer in {folder} has no end-of-text token: add an eos_token to its tokenizer_config.json.")
    for trace in ("is_local", "local_files_only"):  # of this call; saved along, they would change the tokenizer's digest
        tokenizer.init_kwargs.pop(trace, None)
    return tokenizer


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ModelError` if the tokenizer has tokens that the model has no embedding for."""
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > num_embeddings:
        raise ModelError(
            f"The tokenizer has {len(tokenizer)} tokens and the model embeddings for {num_embeddings}: they do not belong together. "
            "Prepare the dataset with the model's own tokenizer (`tokenizer: {of: MODEL}` in the data spec)."
        )


def check_same_tokens(tokenizer: PreTrainedTokenizerBase, of_data: PreTrainedTokenizerBase) -> None:
    """Raises `ModelError` if a model's tokenizer and the one that prepared a dataset give words other numbers."""
    if tokenizer.get_vocab() != of_data.get_vocab():
        raise ModelError(
            f"The dataset was prepared with another tokenizer than the model's own ({len(of_data)} tokens, the model's has "
            f"{len(tokenizer)}): its numbers mean other words to the model. Prepare it with `tokenizer: {{of: MODEL}}` in the data spec."
        )


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a model's folder, which may hold nothing else. Raises `ModelError`."""
    value = read_json(folder / "config.json")
    _check_kind(value, folder)
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[value["model_type"]].from_dict(value)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"Cannot read {folder / 'config.json'}: {first_line(error)}") from error
    return config


def check_length(config: PreTrainedConfig, sequence_length: int) -> None:
    """Raises `ModelError` if a dataset's samples are longer than a model allows (where its configuration says so)."""
    allowed = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(allowed, int) and sequence_length > allowed:
        raise ModelError(
            f"The dataset's samples have {sequence_length} tokens and the model allows {allowed} (max_position_embeddings): prepare the "
            f"dataset with sequence_length: {allowed} or less, or take a model that allows more (a new one by max_position_embeddings in "
            "model.config)."
        )


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a whole model and its tokenizer into a folder, as plain `transformers` reads them. Raises `ModelError`."""
    check_tokenizer(model, tokenizer)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)


def _check_config(folder: Path) -> None:
    names = model_files(folder)
    if "config.json" not in names:
        raise ModelError(f"{folder} holds an adapter, not a model: load its base model, then the adapter.")
    _check_kind(read_json(folder / "config.json"), folder)


def _check_kind(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise ModelError(
            f"The model in {folder} ({str(kind)[:100]}) needs Python code of its own, which Tidepool never runs: use a model whose "
            "architecture is part of transformers."
        )
    near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=1)
    hint = f" Did you mean {near[0]}?" if near else " A newer transformers may know it."
    raise ModelError(f"The model in {folder} is of the unknown type {str(kind)[:100]!r}.{hint}")


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file, by its header, which is checked against the file. Raises `ModelError`."""
    with readable(f"{path} is no whole safetensors file"), safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (it is no mapping)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ModelError`."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"Cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return value


@contextmanager
def readable(problem: str) -> Iterator[None]:
    """Maps what another library makes of somebody's file to a `ModelError` that begins with `problem`.

    The file may be anything, so the error may be too: of any kind, or the panic of a library in Rust, which is no `Exception`.
    """
    try:
        yield
    except (TidepoolError, MemoryError):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelError(f"{problem}: {first_line(error)}") from error
        raise


def first_line(error: BaseException) -> str:
    """What another library's error says, without the pages that follow, or what it quotes of a file in full."""
    return next(iter(str(error).splitlines()), "")[:_MAX_REASON] or type(error).__name__
