"""Which samples a step reads, and how they reach the model. The step number is the data cursor.

Invariant: sample k of shard s at step t is the training split's sample number (t * batch + s * shard_size + k) in the
global order, epoch after epoch: who computes the shard, and what was computed before, play no part.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tidepool.data import Layout, Samples, sample_at
from tidepool.specs import TrainingSpec


@dataclass(frozen=True)
class Batch:
    """N samples of T tokens on a device: tokens (int64), targets (bool), numbers of packed documents (int64, -1 padding)."""

    tokens_NT: Tensor
    targets_NT: Tensor
    documents_NT: Tensor


def shard_samples(step: int, shard: int, spec: TrainingSpec, seed: int, layout: Layout) -> list[int]:
    """The numbers of the samples in one logical shard of a step (both counted from 0)."""
    first = step * spec.global_batch_size + shard * spec.shard_size
    places = (divmod(position, layout.num_samples) for position in range(first, first + spec.shard_size))
    return [sample_at(seed, epoch, index, layout) for epoch, index in places]


def cut_batches(samples: Samples, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """The samples, `batch_size` at a time (the last may be smaller)."""
    for start in range(0, len(samples.tokens_NT), batch_size):
        rows = slice(start, start + batch_size)
        yield Batch(
            torch.from_numpy(samples.tokens_NT[rows]).to(device, torch.int64),
            torch.from_numpy(samples.loss_mask_NT[rows]).to(device),
            torch.from_numpy(samples.documents_NT[rows]).to(device, torch.int64),
        )
