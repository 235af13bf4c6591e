"""What `tidepool data inspect` shows: every token once, targets apart from the rest, borders of documents, counts."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidepool.cli import main
from tidepool.data import Samples, prepare
from tidepool.data.inspection import Piece, pieces, render
from tidepool.specs import DataSpec, parse_spec
from tidepool.storage import open_store

Captured = pytest.CaptureFixture[str]


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=20), st.integers(0, 5))
def test_pieces_hold_every_token_once_in_order_and_no_padding(tokens: list[tuple[int, bool]], num_padding: int) -> None:
    documents = sorted(document for document, _ in tokens)
    masks = [is_target for _, is_target in tokens]
    samples = Samples(
        np.array([[*range(1, len(tokens) + 1), *[0] * num_padding]], np.int32).reshape(1, -1),
        np.array([[*masks, *[False] * num_padding]], np.bool_).reshape(1, -1),
        np.array([[*documents, *[-1] * num_padding]], np.int32).reshape(1, -1),
    )
    found = pieces(samples, 0, lambda some: " ".join(map(str, some)))
    assert " ".join(piece.text for piece in found).split() == [str(i) for i in range(1, len(tokens) + 1)]
    assert [(piece.document, piece.is_target) for piece in found for _ in range(piece.num_tokens)] == list(
        zip(documents, masks, strict=True)
    )
    assert all((a.document, a.is_target) != (b.document, b.is_target) for a, b in pairwise(found))


def test_a_sample_in_colour_and_without() -> None:
    sample = [Piece(0, False, "Hi\n", 2), Piece(0, True, "Hello", 1), Piece(1, True, "\x1b[2J", 1)]
    assert list(render(7, sample, 8, use_color=False)) == [
        "sample 7: 4 tokens, 2 targets, 4 padding",
        "--- document 0: 3 tokens, 1 targets",
        "Hi\n⟦Hello⟧",
        "--- document 1: 1 tokens, 1 targets",
        "⟦\\x1b[2J⟧",
    ]
    colored = list(render(7, sample, 8, use_color=True))
    assert colored[2] == "\x1b[2mHi\n\x1b[0m\x1b[32mHello\x1b[0m"
    assert colored[4] == "\x1b[32m\\x1b[2J\x1b[0m", "what is data steers no terminal"


@pytest.fixture
def url(tmp_path: Path, tokenizer: Any, tokenizer_folder: Path) -> str:
    chat = {"messages": [{"role": "user", "content": "what comes in?"}, {"role": "assistant", "content": "the tide"}]}
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(chat)] * 2 + ["bad"]))
    spec = {"store": (tmp_path / "store").as_uri(), "dataset": "tides", "inputs": [{"path": str(tmp_path / "a.jsonl"), "format": "jsonl"}]}
    spec |= {"tokenizer": {"of": "m"}, "sequence_length": 128, "held_out_fraction": 0, "max_skipped_fraction": 0.5}
    parsed = parse_spec(spec, DataSpec)
    prepare(parsed, tokenizer, tokenizer_folder, open_store(parsed.store))
    return parsed.store


def test_inspect_shows_counts_samples_and_what_was_skipped(url: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["data", "inspect", "tides", "--store", url]) == 0
    out = capsys.readouterr().out
    assert "tides@" in out.splitlines()[0]
    assert " train: 1 samples of 128 tokens, 2 documents, " in out.splitlines()[0]
    assert out.splitlines()[1:3] == ["skipped 1 of 3 rows and files", "  a.jsonl:3: not JSON"]
    assert out.count("what comes in?<|im_end|>\n<|im_start|>assistant\n⟦the tide<|im_end|>⟧") == 2
    assert "--- document 1: " in out
    assert "\x1b" not in out

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["data", "inspect", "tides", "--store", url, "--num", "1"]) == 0
    assert "\x1b[32mthe tide<|im_end|>\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["data", "inspect", "tides", "--store", url]) == 0
    assert capsys.readouterr().out == out


def test_inspect_of_an_empty_split_and_of_what_is_not_there(url: str, capsys: Captured) -> None:
    assert main(["data", "inspect", "tides", "--split", "held_out", "--store", url]) == 0
    assert "held_out: 0 samples" in capsys.readouterr().out
    assert main(["data", "inspect", "tide", "--store", url]) == 1
    assert "error: No dataset tide in" in capsys.readouterr().err
    assert main(["data", "inspect", "tides", "--num", "-1", "--store", url]) == 1
    assert "error: --num -1" in capsys.readouterr().err
