"""Sequences that are computed together, and their keys and values.

Invariants: each row's tokens stand at the right end of the cache, behind padding that attention never sees, and have the
positions that they would have alone. At least one row has no padding. A sequence is prefilled alone and then joins, so the
model never computes a padding token.

Every row takes as much memory as the longest: this is the plain engine.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from tidepool.inference.sequence import Sequence


class Batch:
    """B sequences with a cache of T positions; key and value tensors are (B, heads, T, head size) in each layer."""

    def __init__(self) -> None:
        self._rows: list[Sequence] = []
        self._cache = DynamicCache()
        self._mask_BT = torch.zeros(0, 0, dtype=torch.long)
        self._newcomer: tuple[Sequence, DynamicCache] | None = None

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._rows or (self._newcomer is not None and sequence is self._newcomer[0])

    def prefill(self, model: PreTrainedModel, sequence: Sequence) -> Tensor:
        """Compute a prompt, whose sequence joins with the next `decode`; returns the logits (V) of its last token."""
        assert self._newcomer is None
        tokens_1T = torch.tensor([sequence.request.prompt_tokens], device=model.device)
        cache = DynamicCache()
        logits_V = _forward(model, tokens_1T, torch.ones_like(tokens_1T), cache)[0]
        self._newcomer = sequence, cache
        return logits_V

    def decode(self, model: PreTrainedModel, sequences: list[Sequence]) -> Tensor:
        """Compute the last token of each of these, which are here in the order in which they came; all others go.

        Returns logits (B, V). If it fails, the batch cannot be used any more.
        """
        self._keep([row for row, sequence in enumerate(self._rows) if sequence in sequences])
        if self._newcomer is not None:
            newcomer, cache = self._newcomer
            self._newcomer = None
            if newcomer in sequences:
                self._join(newcomer, cache, model.device)
        assert self._rows == sequences
        tokens_B1 = torch.tensor([[sequence.last_token] for sequence in self._rows], device=model.device)
        self._mask_BT = pad(self._mask_BT, (0, 1), value=1)
        return _forward(model, tokens_B1, self._mask_BT, self._cache)

    def _keep(self, rows: list[int]) -> None:
        """Drop all other rows, and the padding that is then in every row."""
        if len(rows) == len(self._rows):
            return
        self._rows = [self._rows[row] for row in rows]
        if not rows:
            self._cache = DynamicCache()
            return
        mask_BT = self._mask_BT[rows]
        first = mask_BT.shape[1] - int(mask_BT.sum(dim=1).max())
        self._mask_BT = mask_BT[:, first:]
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[rows, :, first:], layer.values[rows, :, first:]

    def _join(self, sequence: Sequence, cache: DynamicCache, device: torch.device) -> None:
        mask_1T = torch.ones(1, cache.get_seq_length(), dtype=torch.long, device=device)
        if not self._rows:
            self._cache, self._mask_BT = cache, mask_1T
        else:
            length = max(self._mask_BT.shape[1], mask_1T.shape[1])
            self._mask_BT = torch.cat([_pad_left(self._mask_BT, length, 1), _pad_left(mask_1T, length, 1)])
            for mine, new in zip(self._cache.layers, cache.layers, strict=True):
                mine.keys = torch.cat([_pad_left(mine.keys, length, 2), _pad_left(new.keys, length, 2)])
                mine.values = torch.cat([_pad_left(mine.values, length, 2), _pad_left(new.values, length, 2)])
        self._rows.append(sequence)


def _forward(model: PreTrainedModel, tokens_BN: Tensor, mask_BT: Tensor, cache: DynamicCache) -> Tensor:
    """Compute the N newest tokens of each row, which lengthens the cache; returns the logits (B, V) of the last."""
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    output = model(
        input_ids=tokens_BN,
        attention_mask=mask_BT,
        position_ids=positions_BT[:, -tokens_BN.shape[1] :],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits_BV: Tensor = output.logits[:, -1]
    return logits_BV


def _pad_left(tensor: Tensor, length: int, dimension: int) -> Tensor:
    widths = [0, 0] * (tensor.dim() - 1 - dimension) + [length - tensor.shape[dimension], 0]
    return pad(tensor, widths)
