"""The loss: cross-entropy of the next token, summed over the targets of a batch.

A sum, not a mean: it is divided by the number of targets of the whole global batch later, so that each target weighs the
same wherever it stands.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from tidepool.models import has_windows, packed_attention_mask, packed_positions
from tidepool.training.batch import Batch

IGNORED = -100
"""The label of what is no target."""
_SLICE_SIZE = 2**18
"""Logits in a slice of the loss: such that it stays in a CPU's cache."""


def loss_sum(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The summed loss in nats, a float32 scalar, of the batch's targets, each predicted from its document alone."""
    logits_NTV = model(input_ids=batch.tokens_NT, use_cache=False, **_apart(model, batch)).logits
    # Labels move and not logits, and what is no target is ignored in place: logits are by far the largest, and none are gathered.
    labels_NT = torch.full_like(batch.tokens_NT, IGNORED)
    labels_NT[:, :-1] = torch.where(batch.targets_NT[:, 1:], batch.tokens_NT[:, 1:], IGNORED)
    loss: Tensor = _cross_entropy(logits_NTV.device).apply(logits_NTV.flatten(0, 1), labels_NT.flatten())  # type: ignore[no-untyped-call]
    return loss


def _apart(model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """What keeps documents apart. A mask keeps attention from its fastest kernels, and is left out where there is one document a sample."""
    documents_NT = batch.documents_NT
    if documents_NT is None and batch.tokens_NT.is_cuda and not torch.is_autocast_enabled("cuda"):
        documents_NT = torch.zeros_like(batch.tokens_NT)  # in float32 only a mask keeps grouped heads from the slowest
    if documents_NT is None:
        return {}
    positions = {"position_ids": packed_positions(documents_NT)}
    return positions if has_windows(model) else positions | {"attention_mask": packed_attention_mask(documents_NT)}


def _cross_entropy(device: torch.device) -> type[torch.autograd.Function]:
    if device.type != "cuda":
        return _CrossEntropy
    from tidepool.training.fused_cross_entropy import FusedCrossEntropy  # torch has Triton with it where it has CUDA

    return FusedCrossEntropy


class _CrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of logits_MV and labels_M, and beside it its gradient, a slice of tokens at a time.

    A slice is float32 while it is computed; what is kept is the gradient in the dtype of the logits. `cross_entropy` would
    hold all of them in float32 three times over: as such, as log-probabilities, and as their gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, labels_M: Tensor) -> Tensor:
        gradient_MV = torch.empty_like(logits_MV) if ctx.needs_input_grad[0] else None
        num_tokens = max(1, _SLICE_SIZE // logits_MV.shape[1])
        total = torch.zeros((), dtype=torch.float32, device=logits_MV.device)
        for start in range(0, len(labels_M), num_tokens):
            rows = slice(start, start + num_tokens)
            log_p_RV = log_softmax(logits_MV[rows].float(), dim=-1)
            is_target_R1 = (labels_M[rows] != IGNORED)[:, None]
            label_R1 = labels_M[rows].clamp(min=0)[:, None]
            total -= torch.where(is_target_R1, log_p_RV.gather(1, label_R1), 0).sum()
            if gradient_MV is not None:
                p_RV = log_p_RV.exp_()
                p_RV.scatter_(1, label_R1, -1.0, reduce="add")
                torch.mul(p_RV, is_target_R1, out=gradient_MV[rows])
        ctx.save_for_backward(gradient_MV)
        return total

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor, None]:
        (gradient_MV,) = ctx.saved_tensors
        return gradient_MV.mul_(loss_gradient), None  # in place: a second backward pass would be refused for that


@contextmanager
def precision(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Compute in `dtype` where it is safe (autocast) unless it is float32; parameters to train are float32 always."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield
