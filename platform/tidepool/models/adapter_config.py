"""What the configuration of an adapter that comes from elsewhere may say: plain LoRA, in bounded time.

Invariants:
- What is more than two matrices beside each of the base's (DoRA, biases, whole modules, ...) is refused, and so is a key that we do not
  know with a value that does something.
- Numbers are of the sizes that adapters have, so that nothing large is made before the weights are compared.
- Patterns that take long to match (regular expressions can take for ever) are refused. They are tried in a process of their own,
  which can be ended, on the names that they will be matched with.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tidepool.errors import ModelError

_PATTERN_TIMEOUT_S = 10.0
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # the others (PiSSA, LoftQ, ...) start by changing the base
}
"""Keys that would make an adapter more than LoRA, with the values that do not; for those that are not here: null, false and empty."""
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Matches as peft 0.21 does: whole names, ends of names, and the pattern of layers' names.
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for kind, pattern in patterns:
    for name in names:
        if kind == "whole":
            re.fullmatch(pattern, name)
        elif kind == "end":
            re.match(rf"(.*\\.)?({pattern})$", name)
        else:
            re.match(rf"(?:^|.*?\\.){pattern}\\.(?P<idx>\\d+)\\.", name)
"""

Rank = Annotated[int, Field(ge=1, le=65_536)]
Layer = Annotated[int, Field(ge=0, le=65_536)]
Word = Annotated[str, Field(max_length=500)]


class Lora(BaseModel):
    """What an adapter's configuration says of its matrices."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    r: Rank = 8
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)] = 8
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0
    target_modules: Word | list[Word]
    exclude_modules: Word | list[Word] | None = None
    layers_to_transform: Layer | list[Layer] | None = None
    layers_pattern: Word | list[Word] | None = None
    rank_pattern: dict[Word, Rank] = {}
    alpha_pattern: dict[Word, Annotated[float, Field(gt=0, le=1e6)]] = {}
    fan_in_fan_out: bool = False
    use_rslora: bool = False


def check_adapter_config(value: Mapping[str, Any], folder: Path) -> Lora:
    """Check that a parsed `adapter_config.json` is plain LoRA. Raises `ModelError`."""
    for key in sorted(value.keys() - Lora.model_fields.keys() - _WITHOUT_EFFECT):
        if value[key] not in _PLAIN.get(key, (None, False, [], {}, "")):
            raise ModelError(
                f"The adapter in {folder} does more than LoRA ({key[:100]}: {str(value[key])[:100]}), which cannot be computed beside "
                "other adapters on one base: train it without, or merge it where it was trained and import the whole model."
            )
    try:
        return Lora.model_validate({key: given for key, given in value.items() if key in Lora.model_fields})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where, given = ".".join(str(part)[:100] for part in first["loc"]), str(first["input"])[:100]
        raise ModelError(f"The adapter_config.json in {folder} cannot be used: {where}: {first['msg']} (got {given}).") from None


def check_adapter_patterns(lora: Lora, module_names: Iterable[str], folder: Path) -> None:
    """Check how long an adapter's patterns take to match with a base's modules of these names. Raises `ModelError`."""
    patterns = [("whole", one) for one in (lora.target_modules, lora.exclude_modules) if isinstance(one, str) and one != "all-linear"]
    patterns += [("end", one) for one in (*lora.rank_pattern, *lora.alpha_pattern)]
    in_layers = [lora.layers_pattern] if isinstance(lora.layers_pattern, str) else lora.layers_pattern or []
    patterns += [("layer", one) for one in in_layers]
    if patterns:
        _check_patterns(patterns, list(module_names), folder)


def _check_patterns(patterns: list[tuple[str, str]], names: list[str], folder: Path) -> None:
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    try:
        done = subprocess.run(
            command, input=json.dumps([patterns, names]), capture_output=True, text=True, timeout=_PATTERN_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"The patterns of the adapter in {folder} (target_modules, rank_pattern, ...) take too long to match: name modules in a list."
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended"])[-1]
        raise ModelError(f"The patterns of the adapter in {folder} (target_modules, rank_pattern, ...) cannot be matched: {reason[:200]}.")
