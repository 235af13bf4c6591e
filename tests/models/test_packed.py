"""A packed sample gives each document the logits that it has alone."""

from typing import Any

import pytest
import torch

from tidepool.models import packed_attention_mask, packed_positions

DOCUMENTS = torch.tensor([[0] * 7 + [1] * 12 + [2] * 2 + [-1] * 3, [0] * 24], dtype=torch.int32)


@torch.no_grad()
def test_packed_logits_are_those_of_each_document_alone(model: Any) -> None:
    tokens = torch.randint(3, 300, DOCUMENTS.shape, generator=torch.Generator().manual_seed(0))
    packed = model(tokens, attention_mask=packed_attention_mask(DOCUMENTS), position_ids=packed_positions(DOCUMENTS)).logits
    assert packed.isfinite().all()
    for row, numbers in enumerate(DOCUMENTS):
        for number in range(int(numbers.max()) + 1):
            alone = model(tokens[row : row + 1, numbers == number]).logits[0]
            torch.testing.assert_close(packed[row, numbers == number], alone, atol=1e-5, rtol=0)


def test_mask_and_positions() -> None:
    documents = torch.tensor([[0, 0, 1, -1, -1]])
    assert packed_positions(documents).tolist() == [[0, 1, 0, 0, 1]]
    assert packed_positions(documents).dtype == torch.int64
    mask = packed_attention_mask(documents)
    assert mask.dtype == torch.bool
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


def test_gradients_are_finite_with_padding(model: Any) -> None:
    tokens = torch.full(DOCUMENTS.shape, 5)
    loss = model(tokens, attention_mask=packed_attention_mask(DOCUMENTS), position_ids=packed_positions(DOCUMENTS)).logits.square().mean()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("length", [1, 2])
def test_short_samples(length: int) -> None:
    documents = torch.zeros(1, length, dtype=torch.int32)
    assert packed_positions(documents).tolist() == [list(range(length))]
