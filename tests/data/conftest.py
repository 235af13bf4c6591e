"""A small tokenizer with a chat template, trained once."""

from pathlib import Path
from typing import Any

import pytest

from tidepool.models import train_tokenizer

WORDS = "the tide comes in and the pool fills; the tide goes out and the pool keeps what it holds"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer([WORDS] * 4, vocab_size=300)


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder
