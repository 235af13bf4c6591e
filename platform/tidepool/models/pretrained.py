"""Causal language models and tokenizers as folders: loaded from safetensors, written so that plain `transformers` loads them.

Invariants:
- No pickle is read and no code of a model is run; nothing is downloaded: a folder is all there is.
- A model comes back with every weight that its architecture has, or not at all.
- What `export_model` writes is only what makes the model (see `source`), so that its digest is the same wherever it lies.
"""

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.logging import disable_progress_bar

from tidepool.errors import ModelError
from tidepool.models.source import model_files

disable_progress_bar()  # thousands of lines in a log of many workers, and one of them the last


def load_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a folder, in eval mode on the CPU. Raises `ModelError`."""
    _check_config(folder)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(f"Cannot load the model in {folder}: {first_line(error)}") from error
    if absent := sorted(loading["missing_keys"]):
        raise ModelError(f"Cannot load the model in {folder}: {len(absent)} weights are missing from its files, {absent[0]} for one.")
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises `ModelError`, also if it has no end-of-text token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"Cannot load the tokenizer in {folder}: {first_line(error)}") from error
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


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a whole model and its tokenizer into a folder, as plain `transformers` reads them. Raises `ModelError`."""
    check_tokenizer(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_config(folder: Path) -> None:
    names = model_files(folder)
    if "config.json" not in names:
        raise ModelError(f"{folder} holds an adapter, not a model: load its base model, then the adapter.")
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise ModelError(
            f"The model in {folder} ({kind}) needs Python code of its own, which Tidepool never runs: use a model whose architecture "
            "is part of transformers."
        )
    near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=1)
    hint = f" Did you mean {near[0]}?" if near else " A newer transformers may know it."
    raise ModelError(f"The model in {folder} is of the unknown type {kind!r}.{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ModelError`."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return value


def first_line(error: Exception) -> str:
    """What another library's error says, without the pages that follow."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
