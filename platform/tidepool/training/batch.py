"""Which samples a step reads, and how they reach the model. The step number is the data cursor.

Invariant: sample k of shard s at step t is the training split's sample number (t * batch + s * shard_size + k) in the
global order, epoch after epoch: who computes the shard, and what was computed before, play no part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tidepool.data import Layout, Samples, sample_at
from tidepool.specs import TrainingSpec


@dataclass(frozen=True)
class Batch:
    """N samples of T tokens on a device: tokens (int64), targets (bool), numbers of packed documents (int64, -1 padding).

    There are no numbers where no sample holds more than one document, for which plain causal attention is right: padding comes after.
    """

    tokens_NT: Tensor
    targets_NT: Tensor
    documents_NT: Tensor | None


def shard_samples(step: int, shard: int, spec: TrainingSpec, seed: int, layout: Layout) -> list[int]:
    """The numbers of the samples in one logical shard of a step (both counted from 0)."""
    first = step * spec.global_batch_size + shard * spec.shard_size
    places = (divmod(position, layout.num_samples) for position in range(first, first + spec.shard_size))
    return [sample_at(seed, epoch, index, layout) for epoch, index in places]


def cut_batches(samples: Samples, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """The samples, `batch_size` at a time (the last may be smaller)."""
    for start in range(0, len(samples.tokens_NT), batch_size):
        rows = slice(start, start + batch_size)
        documents_NT = samples.documents_NT[rows]
        yield Batch(
            _to(device, samples.tokens_NT[rows]).long(),
            _to(device, samples.loss_mask_NT[rows]),
            _to(device, documents_NT).long() if documents_NT.max() > 0 else None,
        )


def _to(device: torch.device, values: NDArray[Any]) -> Tensor:
    """On a GPU without waiting for what it has to do before: memory that can be paged out would have to be waited for."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
