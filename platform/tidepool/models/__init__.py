"""Models: find, load, build and export causal language models, their tokenizers and their LoRA adapters.

Weights are safetensors only, and no code of a model is ever run (`trust_remote_code` never). Names are imported when they
are first used: finding a model (`source`) needs no torch, and neither does a process that only does that.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidepool.models.adapter import add_lora, attach_adapter, export_adapter
    from tidepool.models.attention import has_windows, use_given_masks
    from tidepool.models.imported import import_model
    from tidepool.models.lora_weights import read_lora
    from tidepool.models.merged import merge_model
    from tidepool.models.opened import OpenedModel, open_model
    from tidepool.models.packed import packed_attention_mask, packed_positions
    from tidepool.models.pretrained import (
        check_length,
        check_same_tokens,
        check_tokenizer,
        export_model,
        load_config,
        load_model,
        load_shapes,
        load_tokenizer,
    )
    from tidepool.models.scratch import build_model, new_config
    from tidepool.models.source import TOKENIZER_FILES, ModelSource, cache_folder, copy_files, copy_tokenizer, fetch_model, find_model
    from tidepool.models.tokenizer import train_tokenizer, use_chat_template

__all__ = [
    "TOKENIZER_FILES",
    "ModelSource",
    "OpenedModel",
    "add_lora",
    "attach_adapter",
    "build_model",
    "cache_folder",
    "check_length",
    "check_same_tokens",
    "check_tokenizer",
    "copy_files",
    "copy_tokenizer",
    "export_adapter",
    "export_model",
    "fetch_model",
    "find_model",
    "has_windows",
    "import_model",
    "load_config",
    "load_model",
    "load_shapes",
    "load_tokenizer",
    "merge_model",
    "new_config",
    "open_model",
    "packed_attention_mask",
    "packed_positions",
    "read_lora",
    "train_tokenizer",
    "use_chat_template",
    "use_given_masks",
]

_MODULES = {
    "adapter": ("add_lora", "attach_adapter", "export_adapter"),
    "attention": ("has_windows", "use_given_masks"),
    "imported": ("import_model",),
    "lora_weights": ("read_lora",),
    "merged": ("merge_model",),
    "opened": ("OpenedModel", "open_model"),
    "packed": ("packed_attention_mask", "packed_positions"),
    "pretrained": (
        "check_length",
        "check_same_tokens",
        "check_tokenizer",
        "export_model",
        "load_config",
        "load_model",
        "load_shapes",
        "load_tokenizer",
    ),
    "scratch": ("build_model", "new_config"),
    "source": ("TOKENIZER_FILES", "ModelSource", "cache_folder", "copy_files", "copy_tokenizer", "fetch_model", "find_model"),
    "tokenizer": ("train_tokenizer", "use_chat_template"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"tidepool.models.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
