"""A tokenizer and two tiny models, of the two kinds that treat positions and weights differently."""

import copy
from typing import Any

import pytest

from tidepool.models import build_model, train_tokenizer

TEXT = "the tide comes in and the pool fills; the tide goes out and the pool keeps what it holds. "
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2},
}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer([TEXT] * 4, vocab_size=300)


@pytest.fixture(scope="session")
def _models(tokenizer: Any) -> dict[str, Any]:
    return {kind: build_model(config, len(tokenizer), seed=1, tokenizer=tokenizer) for kind, config in CONFIGS.items()}


@pytest.fixture(params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest, _models: dict[str, Any]) -> Any:
    """A model of each kind, the test's own."""
    return copy.deepcopy(_models[request.param])


@pytest.fixture
def llama(_models: dict[str, Any]) -> Any:
    return copy.deepcopy(_models["llama"])
