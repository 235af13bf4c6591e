"""How long a text and how large a cache can be, for a model, a spec and the machine."""

from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from tidepool.errors import ModelError
from tidepool.specs import EngineSpec

BLOCK_SIZE = 16
"""Tokens in a block of the cache: what a prefix is shared by, and what is wasted at the end of a sequence, half of it on average."""
_SHARE_OF_MEMORY = {"cpu": 0.25, "cuda": 0.8}
"""Of what is available: on a CPU others need it too."""
_SHARE_OF_ADAPTERS = 0.1


def context_length(model: PreTrainedModel, spec: EngineSpec) -> int:
    """Tokens of a prompt and its answer together. Raises `ModelError`."""
    config = model.config.get_text_config()
    of_model = getattr(config, "max_position_embeddings", None)
    lengths = [length for length in (of_model, spec.max_sequence_length) if length is not None]
    if not lengths:
        raise ModelError("The model's config.json does not say how long its context is: set engine.max_sequence_length.")
    length = min(lengths)
    for rope in _ropes(getattr(config, "rope_parameters", None) or {}):
        kind = rope.get("rope_type", "default")
        constant_up_to = rope.get("original_max_position_embeddings") or of_model or length
        if kind in ("dynamic", "longrope") and length > constant_up_to:
            raise ModelError(
                f"The engine cannot run a context of {length} tokens with rotary positions of the type {kind}: beyond {constant_up_to} "
                f"tokens they depend on the longest sequence of a batch. Set engine.max_sequence_length to {constant_up_to} at most."
            )
    return length


def num_blocks(spec: EngineSpec, length: int, block_size_bytes: int, device: torch.device) -> int:
    """Blocks of the cache: as many as all places can use, or as memory allows. Raises `ModelError` if a context has no room."""
    per_sequence = -(-length // BLOCK_SIZE)
    if spec.cache_gb is not None:
        size_bytes = spec.cache_gb * 1e9
    elif device.type == "cuda":
        size_bytes = torch.cuda.mem_get_info(device)[0] * _SHARE_OF_MEMORY["cuda"]
    else:
        size_bytes = available_bytes() * _SHARE_OF_MEMORY["cpu"]
    possible = int(size_bytes // block_size_bytes)
    if possible < per_sequence:
        raise ModelError(
            f"A context of {length} tokens takes {per_sequence * block_size_bytes / 1e9:.3g} GB of cache, and there are "
            f"{size_bytes / 1e9:.3g} GB: raise engine.cache_gb, or lower engine.max_sequence_length."
        )
    return min(possible, per_sequence * spec.max_batch_size)


def adapters_bytes(spec: EngineSpec) -> int:
    """Memory of the host for adapters."""
    return int(available_bytes() * _SHARE_OF_ADAPTERS if spec.adapters_gb is None else spec.adapters_gb * 1e9)


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process may still take: the machine's, or its container's where that has a limit (cgroup v2) and less is left."""
    available = int(psutil.virtual_memory().available)
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - int(used)))


def _ropes(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """One set of rotary parameters, or one for each kind of layer."""
    return [one for one in parameters.values() if isinstance(one, dict)] or [parameters]
