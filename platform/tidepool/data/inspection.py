"""A prepared sample as lines for a person: which of its tokens are learned, where documents begin, how many there are.

Targets are green and the rest is dim; without colour, targets stand in ⟦brackets⟧. Characters that would steer the terminal are
shown by their codes: what is printed is data. Pure: samples and the tokenizer's `decode` are handed in.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from tidepool.data.manifest import DatasetInfo, SplitName
from tidepool.data.packing import PADDING, Samples

_TARGET, _CONTEXT, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one document that are all targets, or all not."""

    document: int
    is_target: bool
    text: str
    num_tokens: int


def summary(info: DatasetInfo, split: SplitName) -> list[str]:
    """What a split holds, and what was skipped on the way to it."""
    one = info.splits[split]
    share = f"{one.num_target_tokens / one.num_tokens:.1%}" if one.num_tokens else "none"
    lines = [
        f"{info.ref} {split}: {one.num_samples} samples of {info.sequence_length} tokens, {one.num_documents} documents, "
        f"{one.num_tokens} tokens, {one.num_target_tokens} of them targets ({share})",
        f"skipped {info.num_skipped} of {info.num_read} rows and files",
    ]
    return lines + [f"  {example}" for example in info.skipped_examples]


def pieces(samples: Samples, row: int, decode: Callable[[Sequence[int]], str]) -> list[Piece]:
    """A sample cut where documents and targets begin and end, without its padding."""
    documents_T, targets_T = samples.documents_NT[row], samples.loss_mask_NT[row]
    positions = np.flatnonzero(documents_T != PADDING).tolist()
    cut = groupby(positions, key=lambda i: (int(documents_T[i]), bool(targets_T[i])))
    runs = ((key, [int(samples.tokens_NT[row, i]) for i in run]) for key, run in cut)
    return [Piece(document, is_target, decode(tokens), len(tokens)) for (document, is_target), tokens in runs]


def render(number: int, sample: Sequence[Piece], sequence_length: int, use_color: bool) -> Iterator[str]:
    """The lines of a sample."""
    num_tokens, num_targets = (sum(one.num_tokens for one in chosen) for chosen in (sample, [one for one in sample if one.is_target]))
    yield f"sample {number}: {num_tokens} tokens, {num_targets} targets, {sequence_length - num_tokens} padding"
    for document, run in groupby(sample, key=lambda one: one.document):
        parts = list(run)
        counts = f"{sum(one.num_tokens for one in parts)} tokens, {sum(one.num_tokens for one in parts if one.is_target)} targets"
        yield f"--- document {document}: {counts}"
        yield "".join(_paint(one, use_color) for one in parts)


def _paint(piece: Piece, use_color: bool) -> str:
    text = "".join(letter if letter.isprintable() or letter in "\n\t" else f"\\x{ord(letter):02x}" for letter in piece.text)
    if use_color:
        return f"{_TARGET if piece.is_target else _CONTEXT}{text}{_PLAIN}"
    return f"⟦{text}⟧" if piece.is_target else text
