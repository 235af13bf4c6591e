"""The mean loss on held-out samples, with the same bits for every world size.

Batches are fixed by the spec and dealt out to the workers; each batch's sum is exchanged exactly (float64, one worker
has each) and they are added in order.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from tidepool.data import Dataset
from tidepool.errors import DataError
from tidepool.training.batch import cut_batches
from tidepool.training.group import Group
from tidepool.training.objective import loss_sum, precision


def evaluate(
    model: PreTrainedModel,
    held_out: Dataset,
    num_samples: int,
    batch_size: int,
    dtype: torch.dtype,
    group: Group,
    tick: Callable[[str], None] = lambda _: None,
) -> float:
    """The mean loss in nats per target of the first `num_samples` held-out samples (all, if there are fewer).

    `tick(phase)` is told of each batch, and of the exchange. The model is left in the mode it was in. Raises `DataError` if
    nothing is held out, `QuorumLost`.
    """
    num_samples = min(num_samples, len(held_out))
    if num_samples == 0:
        raise DataError(
            "The dataset has no held-out samples to evaluate on: prepare it with a held_out_fraction above 0 and more documents."
        )
    device = next(model.parameters()).device
    starts = range(0, num_samples, batch_size)
    sums_B2 = torch.zeros(len(starts), 2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    with torch.no_grad(), precision(dtype, device):
        for i in range(group.rank, len(starts), group.size):
            tick("evaluate")
            samples = range(starts[i], min(starts[i] + batch_size, num_samples))
            for batch in cut_batches(held_out.read(samples), batch_size, device):
                sums_B2[i, 0] = loss_sum(model, batch).double()
                sums_B2[i, 1] = batch.targets_NT.sum()
    model.train(was_training)
    tick("exchange")
    group.all_reduce(sums_B2)
    total, num_targets = sums_B2.cpu().cumsum(0)[-1].tolist()
    return float(total / num_targets)
