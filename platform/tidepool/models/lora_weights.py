"""The matrices of a LoRA adapter, read from its folder for whoever adds them to linear layers without peft.

Invariants:
- What is read is what peft would compute with: the same layers, ranks and scales. An adapter has all of its matrices, in their shapes, and
  no others; what is more than plain LoRA on linear layers is refused, as it is at import.
- Patterns are matched without a limit of time: import has tried them.
"""

from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tidepool.errors import ModelError
from tidepool.models.adapter import CONFIG, WEIGHTS, check_linear, difference, read_config
from tidepool.models.adapter_config import check_adapter_config
from tidepool.models.pretrained import first_line, read_json

_PREFIX = "base_model.model."


def read_lora(
    folder: Path, sizes: Mapping[str, tuple[int, int]], output_layer: str | None, base_digest: str
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A (rank x input size), B (output size x rank) and the scale of their product, by the name of the layer that they belong to.

    `sizes` are those (input, output) of the base's linear layers; `output_layer` makes its logits. Raises `BaseMismatchError` if the
    adapter was trained on another base than the one with `base_digest`, else `ModelError`.
    """
    config = read_config(folder, base_digest)
    check_adapter_config(read_json(folder / CONFIG), folder)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"Cannot load the adapter in {folder}: {first_line(error)}") from error
    check_linear(weights, folder)
    ranks = {name: _of(config.rank_pattern, name, config.r) for name in _targets(config, sizes, output_layer)}
    wanted = {_key(name, "A"): (rank, sizes[name][0]) for name, rank in ranks.items()}
    wanted |= {_key(name, "B"): (sizes[name][1], rank) for name, rank in ranks.items()}
    if problem := difference({key: tuple(tensor.shape) for key, tensor in weights.items()}, wanted):
        raise ModelError(f"The adapter in {folder} does not fit this model: {problem}")
    if not ranks:
        raise ModelError(f"The adapter in {folder} changes no layer of this model.")
    return {
        name: (weights[_key(name, "A")], weights[_key(name, "B")], _scale(config, _of(config.alpha_pattern, name, config.lora_alpha), rank))
        for name, rank in ranks.items()
    }


def _targets(config: LoraConfig, sizes: Mapping[str, tuple[int, int]], output_layer: str | None) -> list[str]:
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = set(sizes) - {output_layer}
    return [name for name in sizes if check_target_module_exists(config, name)]


def _of(pattern: Mapping[str, int], name: str, otherwise: int) -> int:
    return pattern.get(get_pattern_key(list(pattern), name), otherwise)


def _scale(config: LoraConfig, alpha: float, rank: int) -> float:
    return float(alpha) / (rank**0.5 if config.use_rslora else rank)


def _key(name: str, matrix: str) -> str:
    return f"{_PREFIX}{name}.lora_{matrix}.weight"
