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

_IGNORED = -100


def loss_sum(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The summed loss in nats, a float32 scalar, of the batch's targets, each predicted from its document alone."""
    logits_NTV = model(
        input_ids=batch.tokens_NT,
        attention_mask=packed_attention_mask(batch.documents_NT),
        position_ids=packed_positions(batch.documents_NT),
        use_cache=False,
    ).logits
    # Labels move and not logits, and what is no target is ignored in place: logits are by far the largest, and none are gathered.
    labels_NT = torch.full_like(batch.tokens_NT, _IGNORED)
    labels_NT[:, :-1] = torch.where(batch.targets_NT[:, 1:], batch.tokens_NT[:, 1:], _IGNORED)
    return cross_entropy(logits_NTV.flatten(0, 1).float(), labels_NT.flatten(), ignore_index=_IGNORED, reduction="sum")


@contextmanager
def precision(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Compute in `dtype` where it is safe (autocast) unless it is float32; parameters to train are float32 always."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield
