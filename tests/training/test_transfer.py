"""The state from one worker to others: the same bits, whatever the shapes, in however many pieces."""

import pytest
import torch

from tests.training.test_process_group import connect, together
from tidepool.training import transfer
from tidepool.training.process_group import MeetingPoint
from tidepool.training.transfer import share_numbers, share_tensors

CPU = torch.device("cpu")


def test_tensors_and_numbers_arrive_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_PIECE_ELEMENTS", 7)  # so that pieces begin and end inside tensors
    points = [MeetingPoint("127.0.0.1") for _ in range(3)]
    tensors = [[torch.rand(shape, generator=torch.Generator().manual_seed(rank)) for shape in ((3, 5), (), (2,))] for rank in range(3)]
    expected = [tensor.clone() for tensor in tensors[1]]
    numbers = {"loss": [0.1, 1e-300], "none": [], "record": [float(2**52 - 1)]}
    received: dict[int, dict[str, list[float]]] = {}

    def share(rank: int) -> None:
        group = connect(points, "state", rank, 3)
        received[rank] = share_numbers(numbers if rank == 1 else None, 1, group, CPU)
        share_tensors(tensors[rank], 1, group, CPU)

    together(*(lambda rank=rank: share(rank) for rank in range(3)))  # type: ignore[misc]
    assert list(received.values()) == [numbers] * 3
    for own in tensors:
        assert all(torch.equal(one, other) for one, other in zip(own, expected, strict=True))
