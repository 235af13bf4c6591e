"""The state of a run from one worker to others, by broadcast: what a joiner or a torn worker takes in place of a checkpoint.

The tensors are sent in their fixed order in large pieces, and received in place: nothing is held twice but one piece.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from tidepool.training.group import Group

_PIECE_ELEMENTS = 8 * 2**20


def share_tensors(tensors: Iterable[Tensor], source: int, group: Group, device: torch.device) -> None:
    """Give every member the float32 values of rank `source`, in place; all members hand in tensors of the same shapes and order."""
    for pieces in _cut([tensor.detach().view(-1) for tensor in tensors]):
        buffer = torch.empty(sum(piece.numel() for piece in pieces), dtype=torch.float32, device=device)
        parts = torch.split(buffer, [piece.numel() for piece in pieces])
        if group.rank == source:
            for piece, part in zip(pieces, parts, strict=True):
                part.copy_(piece)
        group.broadcast(buffer, source)
        if group.rank != source:
            for piece, part in zip(pieces, parts, strict=True):
                piece.copy_(part)


def share_numbers(numbers: Mapping[str, list[float]] | None, source: int, group: Group, device: torch.device) -> dict[str, list[float]]:
    """The lists of float64 that rank `source` hands in, by name, on every member (the others hand in None)."""
    names = torch.zeros(2, dtype=torch.int64, device=device)
    if numbers is not None:
        heading = "\n".join(f"{name} {len(values)}" for name, values in numbers.items()).encode()
        names[0], names[1] = len(heading), sum(len(values) for values in numbers.values())
    group.broadcast(names, source)
    text = torch.empty(int(names[0]), dtype=torch.uint8, device=device)
    values = torch.empty(int(names[1]), dtype=torch.float64, device=device)
    if numbers is not None:
        text.copy_(torch.frombuffer(bytearray(heading), dtype=torch.uint8))
        values.copy_(torch.tensor([value for column in numbers.values() for value in column], dtype=torch.float64))
    group.broadcast(text, source)
    group.broadcast(values, source)
    shape = [line.split(" ") for line in bytes(text.tolist()).decode().split("\n")]
    columns = torch.split(values.cpu(), [int(length) for _, length in shape])
    return {name: column.tolist() for (name, _), column in zip(shape, columns, strict=True)}


def _cut(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Flat tensors as lists of views of at most `_PIECE_ELEMENTS` together."""
    pieces: list[Tensor] = []
    room = _PIECE_ELEMENTS
    for tensor in tensors:
        start = 0
        while start < tensor.numel():
            piece = tensor[start : start + room]
            pieces.append(piece)
            start += piece.numel()
            room -= piece.numel()
            if not room:
                yield pieces
                pieces, room = [], _PIECE_ELEMENTS
    if pieces:
        yield pieces
