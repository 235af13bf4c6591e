"""The loss: cross-entropy of the next token, summed over the targets of a batch.

A sum, not a mean: it is divided by the number of targets of the whole global batch later, so that each target weighs the
same wherever it stands.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from tidepool.models import packed_attention_mask, packed_positions
from tidepool.training.batch import Batch


def loss_sum(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The summed loss in nats, a float32 scalar, of the batch's targets, each predicted from its document alone."""
    logits_NTV = model(
        input_ids=batch.tokens_NT,
        attention_mask=packed_attention_mask(batch.documents_NT),
        position_ids=packed_positions(batch.documents_NT),
        use_cache=False,
    ).logits
    wanted_NT = batch.targets_NT[:, 1:]
    return cross_entropy(logits_NTV[:, :-1][wanted_NT].float(), batch.tokens_NT[:, 1:][wanted_NT], reduction="sum")


@contextmanager
def precision(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Compute in `dtype` where it is safe (autocast) unless it is float32; parameters to train are float32 always."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield
