"""Packing: no target lost, none repeated, none without a token to be predicted from; samples are full."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tidepool.data.packing import PADDING, Packer, Samples, stack
from tidepool.data.tokenization import Encoded

lengths = st.lists(st.integers(0, 70), max_size=60)


def number_documents(lengths: list[int], start: int = 1) -> list[Encoded]:
    """Documents of these lengths whose tokens are all different, so that each can be found again."""
    documents = []
    for length in lengths:
        documents.append(Encoded(np.arange(start, start + length, dtype=np.int32), np.ones(length, np.bool_)))
        start += length
    return documents


def pack(documents: list[Encoded], sequence_length: int) -> Samples:
    packer = Packer(sequence_length)
    samples = [sample for document in documents for sample in packer.add(document)]
    return stack([*samples, *packer.finish()], sequence_length)


@given(lengths, st.integers(8, 33))
def test_every_token_but_a_documents_first_is_a_target_exactly_once(lengths: list[int], sequence_length: int) -> None:
    documents = number_documents(lengths)
    samples = pack(documents, sequence_length)
    expected = [token for document in documents for token in document.tokens_T[1:].tolist()]
    assert sorted(samples.tokens_NT[samples.loss_mask_NT].tolist()) == expected


@given(lengths, st.integers(8, 33))
def test_a_target_follows_its_own_documents_token_before_it(lengths: list[int], sequence_length: int) -> None:
    samples = pack(number_documents(lengths), sequence_length)
    assert not samples.loss_mask_NT[:, :1].any()
    rows, columns = np.nonzero(samples.loss_mask_NT)
    assert (samples.documents_NT[rows, columns] == samples.documents_NT[rows, columns - 1]).all()
    assert (samples.tokens_NT[rows, columns] == samples.tokens_NT[rows, columns - 1] + 1).all()


@given(lengths, st.integers(8, 33))
def test_padding_stands_at_the_end_and_is_never_a_target(lengths: list[int], sequence_length: int) -> None:
    samples = pack(number_documents(lengths), sequence_length)
    is_padding = samples.documents_NT == PADDING
    assert (np.diff(is_padding.astype(int), axis=1) >= 0).all()
    assert not samples.loss_mask_NT[is_padding].any()
    assert not samples.tokens_NT[is_padding].any()
    steps = np.diff(np.where(is_padding, samples.documents_NT.max(axis=1, initial=0, keepdims=True), samples.documents_NT), axis=1)
    assert set(steps.reshape(-1).tolist()) <= {0, 1}, "documents are numbered in order"


@given(lengths, st.integers(8, 33))
def test_every_sample_has_a_target(lengths: list[int], sequence_length: int) -> None:
    assert pack(number_documents(lengths), sequence_length).loss_mask_NT.any(axis=1).all()


def test_pieces_without_a_target_are_left_out() -> None:
    tokens = np.arange(1, 101, dtype=np.int32)
    targets = tokens > 90
    samples = pack([Encoded(tokens, targets)], sequence_length=16)
    assert samples.tokens_NT[samples.loss_mask_NT].tolist() == list(range(91, 101))
    assert len(samples.tokens_NT) == 2


def test_most_of_the_room_is_used() -> None:
    random = np.random.default_rng(0)
    samples = pack(number_documents(random.integers(2, 200, 400).tolist()), sequence_length=64)
    assert (samples.documents_NT == PADDING).mean() < 0.02


def test_memory_holds_a_fixed_number_of_open_samples() -> None:
    packer, most = Packer(64), 0
    for document in number_documents([40] * 1000):
        for _ in packer.add(document):
            pass
        most = max(most, len(packer._open))
    assert most == 64
