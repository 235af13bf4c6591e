"""A new model from a configuration, with random weights.

Invariants: the same configuration and seed give the same weights on every machine with the same torch; the caller's own
random state is untouched; a key that the architecture does not know is refused, never ignored.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tidepool.errors import ModelError
from tidepool.models.pretrained import check_tokenizer, first_line
from tidepool.models.tokenizer import END_OF_TURN

_CANNOT_BUILD = (StrictDataclassError, ValueError, TypeError, KeyError, RuntimeError, ArithmeticError, AssertionError)


def build_model(config: Mapping[str, Any], vocab_size: int, seed: int, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """A causal language model in float32 on the CPU, in eval mode, with the ids of `tokenizer`'s special tokens.

    `config` has `model_type` and keys of that type's configuration in transformers. Raises `ModelError`.
    """
    kind = str(config.get("model_type"))
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos", "pad")}
    try:
        with seeded(seed):
            built = new_config(config, vocab_size, **ids)
            model = AutoModelForCausalLM.from_config(built, dtype=torch.float32, attn_implementation="sdpa")
    except _CANNOT_BUILD as error:
        raise ModelError(f"Cannot build a {kind} model from this configuration: {first_line(error)}") from error
    if tokenizer is not None:
        check_tokenizer(model, tokenizer)
        _stop_at_end_of_turn(model, tokenizer)
    return model.eval()


def new_config(config: Mapping[str, Any], vocab_size: int, **token_ids: int | None) -> PreTrainedConfig:
    """The whole configuration of a new model. Raises `ModelError`."""
    kind, keys = _check_keys(config, vocab_size)
    try:
        built: PreTrainedConfig = CONFIG_MAPPING[kind](**{**keys, **token_ids, "vocab_size": vocab_size})
    except _CANNOT_BUILD as error:
        raise ModelError(f"Cannot build a {kind} model from this configuration: {first_line(error)}") from error
    return built


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for the block alone (weights are drawn on the CPU, whatever the device)."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _check_keys(config: Mapping[str, Any], vocab_size: int) -> tuple[str, dict[str, Any]]:
    keys = dict(config)
    kind = str(keys.pop("model_type", None))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"config.model_type: {kind} is no causal language model of transformers; {_nearest(kind, _known_kinds())}")
    valid = _valid_keys(CONFIG_MAPPING[kind])
    for key in keys:
        if key not in valid:
            raise ModelError(f"config.{key}: a {kind} model has no such key; {_nearest(key, valid)}")
    if keys.pop("vocab_size", vocab_size) != vocab_size:
        raise ModelError(f"config.vocab_size: it is {vocab_size}, from the tokenizer of the dataset; leave it out.")
    return kind, keys


def _valid_keys(config_class: type[PreTrainedConfig]) -> list[str]:
    return sorted({field.name for field in dataclasses.fields(config_class) if field.init} | set(config_class.attribute_map))


def _known_kinds() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _nearest(word: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(word, valid, n=1)
    return f"did you mean `{near[0]}`?" if near else f"it can be {', '.join(valid)}"


def _stop_at_end_of_turn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Record that a chat's turn ends the answer too, where every engine looks for it."""
    if END_OF_TURN in tokenizer.get_vocab():
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
