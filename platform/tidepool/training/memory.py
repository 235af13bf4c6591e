"""Advice for a worker whose memory did not suffice: what to lower in the spec, and to what. Pure, but for `told_of_memory`.

An estimate in bytes, to compare one spec with another: the weights; gradients (a shard's, and what is left of the tree) and
AdamW's two moments in float32 for what is trained; activations of 34 values of 8 bits for each token, layer and hidden unit
in 16 bits (Korthikanti et al. 2022, without the attention matrix), twice that in float32, or the layers' inputs and one
layer with checkpointing; the logits and their gradient. It is rough, so what is proposed is at most three quarters of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psutil
import torch
from transformers import PreTrainedModel

from tidepool.errors import OutOfMemoryError
from tidepool.specs import RunSpec, TrainingSpec

_SAVING = 0.75
_MIN_SEQUENCE_LENGTH = 8
_TEXTS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides its memory; `value_bytes` is 2 or 4, what it computes in, `weights_bytes` as they are kept."""

    weights_bytes: int
    num_trained: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    value_bytes: int


@dataclass(frozen=True)
class Demand:
    """What of a spec decides the memory of a step."""

    micro_batch_size: int
    gradient_checkpointing: bool
    sequence_length: int


def state_bytes(size: ModelSize, num_shards: int) -> int:
    """Weights, gradients and moments: what no choice of the batch changes."""
    num_gradients = num_shards.bit_length()  # see `reduction`: log2(S) + 1, the one that is being computed among them
    return size.weights_bytes + 4 * size.num_trained * (num_gradients + 2)


def step_bytes(size: ModelSize, demand: Demand) -> int:
    """Activations and logits of one micro-batch."""
    num_tokens = demand.micro_batch_size * demand.sequence_length
    layer = 17 * size.hidden_size * size.value_bytes
    kept = layer + size.num_layers * size.hidden_size * size.value_bytes if demand.gradient_checkpointing else size.num_layers * layer
    return num_tokens * (kept + 2 * size.value_bytes * size.vocab_size)


def advise(size: ModelSize, demand: Demand, training: TrainingSpec, capacity_bytes: int) -> str:
    """What to change so that the step needs at most three quarters of what it did, and fits; the first of these that does:

    smaller micro-batches, checkpointing with the largest micro-batch that it allows, and shorter samples with both.
    """
    state, step = state_bytes(size, training.num_shards), step_bytes(size, demand)
    limit = min(_SAVING * step, capacity_bytes - state)
    for choice in _choices(demand, training.shard_size):
        if step_bytes(size, choice) <= limit:
            return (
                f"{_changes(demand, choice)}. By our estimate a step then takes {_shown(step_bytes(size, choice))} in place of "
                f"{_shown(step)}, beside {_shown(state)} of weights, gradients and optimizer state"
            )
    trains_all = size.num_trained * 4 >= size.weights_bytes
    instead = "train a LoRA adapter (model.lora) in place of the whole model, or " if trains_all else ""
    return (
        f"By our estimate {_shown(state)} are weights, gradients and optimizer state, and no batch is small enough: {instead}use a "
        "smaller base or a device with more memory"
    )


def _choices(demand: Demand, shard_size: int) -> Iterator[Demand]:
    """From what costs least to what costs most."""
    smaller = [n for n in range(demand.micro_batch_size - 1, 0, -1) if shard_size % n == 0]
    yield from (replace(demand, micro_batch_size=n) for n in smaller)
    checkpointed = replace(demand, gradient_checkpointing=True)
    if not demand.gradient_checkpointing:
        yield from (replace(checkpointed, micro_batch_size=n) for n in [demand.micro_batch_size, *smaller])
    length = demand.sequence_length // 2
    while length >= _MIN_SEQUENCE_LENGTH:
        yield replace(checkpointed, micro_batch_size=1, sequence_length=length)
        length //= 2


def _changes(old: Demand, new: Demand) -> str:
    changes = []
    if new.micro_batch_size != old.micro_batch_size:
        changes.append(f"lower training.micro_batch_size from {old.micro_batch_size} to {new.micro_batch_size}")
    if new.gradient_checkpointing != old.gradient_checkpointing:
        changes.append("set training.gradient_checkpointing to true")
    if new.sequence_length != old.sequence_length:
        changes.append(f"prepare the dataset with a sequence_length of {new.sequence_length}, not {old.sequence_length}")
    text = ", and ".join(changes)
    return text[0].upper() + text[1:]


def _shown(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:,.1f} MB"


def model_size(model: PreTrainedModel, dtype: torch.dtype) -> ModelSize:
    """The size of a model that computes in `dtype`."""
    config = model.config.get_text_config()
    return ModelSize(
        weights_bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        num_trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        value_bytes=dtype.itemsize,
    )


@contextmanager
def told_of_memory(who: str, device: torch.device, advice: Callable[[int], str]) -> Iterator[None]:
    """Maps a lack of memory in the block to `OutOfMemoryError`; `advice` gets what the device has in all, in bytes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        is_gpu = device.type == "cuda" and torch.cuda.is_available()
        capacity = torch.cuda.get_device_properties(device).total_memory if is_gpu else psutil.virtual_memory().total
        said = (next(iter(str(error).splitlines()), "") or type(error).__name__).rstrip(".")
        raise OutOfMemoryError(
            f"{who} ran out of memory ({device.type}, {_shown(capacity)} in all): {said}. {advice(capacity)}."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch or CUDA says that memory did not suffice."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in _TEXTS)


def loading_advice(spec: RunSpec) -> str:
    """What to do where not even the model could be loaded."""
    instead = "" if spec.model.lora else "a LoRA adapter (model.lora) needs less than the whole model; "
    return (
        f"That was while it loaded the model, which no batch size changes: {instead}use a smaller base, a device with more memory, or "
        "fewer workers on a node (raise workers.cpus_per_worker)"
    )
