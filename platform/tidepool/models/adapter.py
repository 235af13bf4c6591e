"""LoRA adapters (Hu et al. 2021) by peft: new ones to train, exports, and finished ones on top of their base.

Invariants:
- A new adapter's weights are a function of the seed and the model's shape; the caller's random state is untouched.
- An export names its base and the digest of the base's files in `tidepool.json`, beside what plain peft reads. The same
  weights give the same bytes.
- An adapter is attached to the base that it was trained on, with all of its weights, or not at all; a failure leaves the
  model as it was. A folder without `tidepool.json` (made by plain peft) is checked by its weights alone.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from tidepool.errors import BaseMismatchError, ModelError
from tidepool.models.adapter_config import check_adapter_config, check_adapter_patterns
from tidepool.models.pretrained import check_tokenizer, first_line, read_json, readable, tensor_shapes
from tidepool.models.scratch import seeded
from tidepool.models.source import ModelSource, model_files
from tidepool.specs import LoraSpec, canonical_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_RECORD = "tidepool.json"


def add_lora(model: PreTrainedModel, spec: LoraSpec, seed: int, base_ref: str) -> PeftModel:
    """Put a new adapter to train on a model, in place; all other weights are frozen. Raises `ModelError`.

    The adapter is float32: on a model in bf16, compute under autocast.
    """
    _check_targets(model, spec)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=spec.target_modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 keeps its weights transposed
    )
    with seeded(seed), _without_advice():
        adapted = get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # autocast casts the adapter's weights; peft would copy each input as float32 too
    adapted.peft_config["default"].base_model_name_or_path = base_ref
    return adapted


def export_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, base: ModelSource) -> None:
    """Write the adapter of `add_lora` and the tokenizer into a folder, as plain peft reads them, with the base's digest."""
    check_tokenizer(model.get_base_model(), tokenizer)
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink()
    record_base(folder, base)


def record_base(folder: Path, base: ModelSource) -> None:
    """Write into an adapter's folder what it belongs to: its base and the digest of the base's files."""
    config = read_json(folder / CONFIG)
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()  # peft keeps a set, whose order differs from process to process
    name, _, revision = base.ref.partition("@") if base.is_on_hub else (base.ref, "", "")
    config |= {"base_model_name_or_path": name, "revision": revision or None, "auto_mapping": None}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
    (folder / _RECORD).write_bytes(canonical_json({"base": base.ref, "base_digest": base.digest}))


def check_adapter(base_shapes: PreTrainedModel, folder: Path, base_digest: str) -> None:
    """Check that an adapter is plain LoRA and that its weights are those that its configuration has on a base, by their headers.

    `base_shapes` (of `load_shapes`) is changed. Raises `BaseMismatchError`, `ModelError`.
    """
    config = read_config(folder, base_digest)
    lora = check_adapter_config(read_json(folder / CONFIG), folder)
    check_adapter_patterns(lora, (name for name, _ in base_shapes.named_modules()), folder)
    found = tensor_shapes(folder / WEIGHTS)
    check_linear(found, folder)
    with readable(f"The adapter in {folder} does not fit this base"), _without_advice():
        adapted = get_peft_model(base_shapes, config, low_cpu_mem_usage=True)
    wanted = {key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()}
    if problem := difference(found, wanted):
        raise ModelError(f"The adapter in {folder} does not fit this base: {problem}")


def check_linear(names: Iterable[str], folder: Path) -> None:
    """Check by its weights' names that an adapter changes no embeddings. Raises `ModelError`."""
    if foreign := [name for name in names if ".lora_embedding_" in name]:
        raise ModelError(
            f"The adapter in {folder} changes more than linear layers ({min(foreign)[:200]}), which no engine here computes beside other "
            "adapters: train it on linear layers, or merge it where it was trained and import the whole model."
        )


def difference(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with an adapter's weights, by their names and shapes; nothing if they are those that are wanted."""
    absent, foreign = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if absent or foreign:
        return f"{len(absent)} weights are missing, {len(foreign)} belong nowhere ({[*absent, *foreign][0]})."
    wrong = [key for key in sorted(wanted) if found[key] != wanted[key]]
    return f"{len(wrong)} weights have another shape, {wrong[0]} for one ({found[wrong[0]]}, not {wanted[wrong[0]]})." if wrong else ""


def attach_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str, base_digest: str) -> PeftModel:
    """Load an adapter under a name (its digest, say) beside those that `model` has; returns the model that holds them all.

    Raises `BaseMismatchError` if it was trained on another base than the one with `base_digest`, else `ModelError`.
    """
    config = read_config(folder, base_digest)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"Cannot load the adapter in {folder}: {first_line(error)}") from error
    is_first = not isinstance(model, PeftModel)
    with torch.random.fork_rng(devices=[]), _without_advice():  # peft draws initial weights; the adapter's own replace them
        try:
            adapted = _add(model, config, name)
        except ValueError as error:
            raise ModelError(f"The adapter in {folder} does not fit this model: {first_line(error)}") from error
        if problem := _load(adapted, weights, name):
            _remove(adapted, name, is_first)
            raise ModelError(f"The adapter in {folder} does not fit this model: {problem}")
    return adapted.eval()


def recorded_base(folder: Path) -> str | None:
    """The reference of the base that an adapter's folder names, if it does."""
    if (folder / _RECORD).is_file():
        return _text(read_json(folder / _RECORD).get("base"))
    return _text(read_json(folder / CONFIG).get("base_model_name_or_path"))


def _text(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) else None


@contextmanager
def _without_advice() -> Iterator[None]:
    """Hide what peft 0.21 uses of transformers against its advice, and what it says of tied weights (`merged` looks after them)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer", category=UserWarning)
        yield


def _add(model: PreTrainedModel | PeftModel, config: LoraConfig, name: str) -> PeftModel:
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    return get_peft_model(model, config, adapter_name=name)


def _load(adapted: PeftModel, weights: dict[str, Tensor], name: str) -> str:
    """Put the weights in their places; returns what is wrong with them, or nothing."""
    try:
        result = set_peft_model_state_dict(adapted, weights, adapter_name=name)
    except RuntimeError as error:
        return " ".join(str(error).split())
    absent = [key for key in result.missing_keys if f".{name}." in key]
    if absent or result.unexpected_keys:
        return f"{len(absent)} weights are missing, {len(result.unexpected_keys)} belong nowhere ({[*absent, *result.unexpected_keys][0]})"
    return ""


def _remove(adapted: PeftModel, name: str, is_first: bool) -> None:
    if is_first:
        adapted.unload()
    else:
        adapted.delete_adapter(name)


def read_config(folder: Path, base_digest: str) -> LoraConfig:
    """The configuration in an adapter's folder. Raises `BaseMismatchError`, and `ModelError` if it is no LoRA adapter."""
    names = model_files(folder)
    if not {CONFIG, WEIGHTS} <= set(names):
        raise ModelError(f"{folder} is no LoRA adapter: it needs {CONFIG} and {WEIGHTS}.")
    if _RECORD in names:
        record = read_json(folder / _RECORD)
        if record.get("base_digest") != base_digest:
            raise BaseMismatchError(
                f"The adapter in {folder} was trained on {_text(record.get('base'))} (files {str(record.get('base_digest'))[:12]}), not on "
                f"this base (files {base_digest[:12]}). Serve it with its own base, or train it again on this one."
            )
    kind = read_json(folder / CONFIG).get("peft_type")
    if kind != "LORA":
        raise ModelError(f"The adapter in {folder} is of the kind {str(kind)[:100]}; only LORA can be used.")
    with readable(f"Cannot read {folder / CONFIG}"):
        config = LoraConfig.from_pretrained(folder)
    config.inference_mode = True
    config.base_model_name_or_path = None  # peft would compare it with a name that the model does not have
    return config


def _check_targets(model: PreTrainedModel, spec: LoraSpec) -> None:
    if isinstance(spec.target_modules, str):
        return
    existing = {name for name, module in model.named_modules() if isinstance(module, Linear | Conv1D)}
    for target in spec.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in existing):
            last_parts = sorted({name.rpartition(".")[2] for name in existing})
            raise ModelError(f"lora.target_modules: the model has no linear layer {target}; it has {', '.join(last_parts)}.")
