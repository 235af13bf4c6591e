"""Tiny models of each family that we train, and what transformers makes of a prompt."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from tests.models.conftest import CONFIGS

_SMALL = {key: value for key, value in CONFIGS["llama"].items() if key != "model_type"}
_HEADS = {"head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": CONFIGS["llama"],
    "qwen2": _SMALL | {"model_type": "qwen2"},
    "qwen3": _SMALL | _HEADS | {"model_type": "qwen3"},
    "mistral": _SMALL | {"model_type": "mistral", "sliding_window": 8},
    "gemma": _SMALL | _HEADS | {"model_type": "gemma"},
    "gemma3_text": _SMALL
    | _HEADS
    | {
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "gpt2": CONFIGS["gpt2"],
}
TIE = 1e-4
"""Two logits that are closer than this may change places with the shape of a batch: float32 has 24 bits, and logits here go to 50."""


class Reference:
    """Transformers' own greedy answers, each alone, by a copy of the model."""

    def __init__(self, model: Any) -> None:
        self._model = copy.deepcopy(model)
        self.num_ties = 0

    @torch.no_grad()
    def answer(self, prompt: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        tokens = torch.tensor([list(prompt)])
        found = self._model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_tokens, do_sample=False)
        return tuple(found[0, len(prompt) :].tolist())

    def check(self, prompt: Sequence[int], max_tokens: int, answered: tuple[int, ...]) -> None:
        """Assert that the answer is transformers', up to a tie, which is counted."""
        expected = self.answer(prompt, max_tokens)
        if answered == expected:
            return
        index = next(i for i, (one, other) in enumerate(zip(answered, expected, strict=False)) if one != other)
        with torch.no_grad():
            logits = self._model(torch.tensor([[*prompt, *expected[:index]]])).logits[0, -1]
        gap = float(logits[expected[index]] - logits[answered[index]])
        assert abs(gap) < TIE, f"token {index} is {answered[index]} in place of {expected[index]}, which is better by {gap}"
        self.num_ties += 1
