"""What keeps the documents of a packed sample from seeing one another: the attention mask and the positions.

A model given both computes for each document what it would compute for that document alone. N samples of T tokens;
`documents_NT` (int) numbers the document of each token, -1 for padding.
"""

import torch
from torch import Tensor


def packed_attention_mask(documents_NT: Tensor) -> Tensor:
    """Bool (N, 1, T, T), True where the row's token may look at the column's: the same document, not later.

    Padding looks at the padding before it and at itself, so that no row is empty and no softmax is NaN.
    """
    length = documents_NT.shape[1]
    same_NTT = documents_NT[:, :, None] == documents_NT[:, None, :]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=documents_NT.device).tril()
    return (same_NTT & causal_TT)[:, None]


def packed_positions(documents_NT: Tensor) -> Tensor:
    """Int64 (N, T): 0, 1, 2, ... anew in each document, and in the padding."""
    length = documents_NT.shape[1]
    index_T = torch.arange(length, device=documents_NT.device)
    starts_NT = torch.ones_like(documents_NT, dtype=torch.bool)
    starts_NT[:, 1:] = documents_NT[:, 1:] != documents_NT[:, :-1]
    return index_T - torch.where(starts_NT, index_T, 0).cummax(dim=1).values
