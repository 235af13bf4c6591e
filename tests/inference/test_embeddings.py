"""Embeddings: the mean of transformers' last hidden states, however the prompt is cut and whatever else is computed."""

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inference.conftest import BASE, NAMES, answer, collect, request, run
from tests.inference.families import FAMILIES
from tidepool.errors import RequestError
from tidepool.inference import GenerationRequest, SamplingParameters
from tidepool.inference.limits import BLOCK_SIZE
from tidepool.inference.paged import PagedEngine
from tidepool.models import attach_adapter, build_model

PROMPT = tuple(range(60, 60 + 2 * BLOCK_SIZE + 4))


def embedding_request(prompt: tuple[int, ...], request_id: str = "e", adapter: str | None = None) -> GenerationRequest:
    return GenerationRequest(request_id, prompt, SamplingParameters(), adapter, is_embedding=True)


async def embed(engine: PagedEngine, prompt: tuple[int, ...], request_id: str = "e", adapter: str | None = None) -> torch.Tensor:
    (output,) = await collect(engine.submit(embedding_request(prompt, request_id, adapter)))
    assert (output.token_ids, output.text, output.finish_reason) == ((), "", "stop")
    return torch.tensor(output.embedding)


@torch.no_grad()
def expected_of(model: Any, prompt: tuple[int, ...]) -> torch.Tensor:
    hidden: torch.Tensor = model.base_model(torch.tensor([prompt])).last_hidden_state[0]
    return hidden.mean(dim=0)


@pytest.mark.parametrize(
    ("family", "max_step_tokens", "is_ahead"), [*((family, 7, False) for family in FAMILIES), ("llama", 512, False), ("llama", 7, True)]
)
def test_an_embedding_is_the_mean_of_the_last_hidden_states(tokenizer: Any, family: str, max_step_tokens: int, is_ahead: bool) -> None:
    model = build_model(FAMILIES[family], len(tokenizer), 1, tokenizer)
    expected = [expected_of(copy.deepcopy(model), prompt) for prompt in (PROMPT, PROMPT[:1])]

    async def play(engine: PagedEngine) -> None:
        before = await answer(engine, request(PROMPT, 6, "before"))  # whose blocks must not be used
        found = await asyncio.gather(
            embed(engine, PROMPT, "long"), embed(engine, PROMPT[:1], "short"), answer(engine, request(PROMPT, 6, "beside"))
        )
        for one, other in zip(found[:2], expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        assert found[2] == before, "who answers beside it, from its blocks, is not disturbed"

    run(model, tokenizer, play, max_batch_size=4, max_step_tokens=max_step_tokens, is_ahead=is_ahead)


def test_an_adapters_embedding_is_its_own_and_a_prompt_may_fill_the_context(llama: Any, tokenizer: Any, adapters: dict[str, Path]) -> None:
    digest, folder = NAMES["two"], adapters[NAMES["two"]]
    adapted = attach_adapter(copy.deepcopy(llama), folder, "x", BASE.digest).merge_and_unload()
    expected = expected_of(adapted, PROMPT)

    async def play(engine: PagedEngine) -> None:
        await engine.load_adapter(digest, folder)
        torch.testing.assert_close(await embed(engine, PROMPT, adapter=digest), expected, atol=1e-4, rtol=1e-4)
        assert (await embed(engine, PROMPT)).dist(expected) > 0.01
        full = tuple(range(60, 60 + engine.context_length))
        assert (await embed(engine, full)).isfinite().all()
        with pytest.raises(RequestError, match="must hold it: shorten it"):
            engine.submit(embedding_request((*full, 1)))

    run(llama, tokenizer, play, max_sequence_length=64, max_step_tokens=50, max_batch_size=4)
