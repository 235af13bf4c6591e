"""Greedy and seeded answers are the same alone and in any company: cut, preempted, found in the cache, for each family that we train."""

import asyncio
import random
from typing import Any

import pytest
import torch

from tests.inference.conftest import answer, request, run, tokens_of
from tests.inference.families import FAMILIES, Reference
from tidepool.inference import native
from tidepool.inference.engine import EngineStats, GenerationRequest
from tidepool.inference.limits import BLOCK_SIZE
from tidepool.inference.linear import weights_dtype
from tidepool.inference.paged import PagedEngine
from tidepool.models import build_model

NUM_BLOCKS = 9
"""Two more than one of these can need, and a third of what eight do."""
_ROOM = {"max_batch_size": 8, "max_step_tokens": 24}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    return build_model(FAMILIES[request.param], len(tokenizer), 1, tokenizer)


def traffic(rng: random.Random) -> list[tuple[list[int], int]]:
    """Prompts and lengths of answers; some begin alike, some are longer than a step."""
    common = [rng.randrange(3, 300) for _ in range(2 * BLOCK_SIZE + 5)]
    prompts = [[rng.randrange(3, 300) for _ in range(rng.randint(1, 60))] for _ in range(8)]
    prompts += [[*common[: rng.randint(BLOCK_SIZE + 1, len(common))], rng.randrange(3, 300)] for _ in range(6)]
    return [(prompt, rng.choice([1, 30, 45])) for prompt in rng.sample(prompts, len(prompts))]


def cache_gb(model: Any, num_blocks: int) -> float:
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return num_blocks * BLOCK_SIZE * 2 * num_groups * head_size * config.num_hidden_layers * model.dtype.itemsize / 1e9 * 1.0001


async def all_at_once(engine: PagedEngine, asked: list[GenerationRequest]) -> list[tuple[int, ...]]:
    return await asyncio.gather(*(answer(engine, one) for one in asked))


@pytest.mark.parametrize("seed", range(2))
def test_greedy_answers_are_those_of_transformers(family: Any, tokenizer: Any, seed: int, record_property: Any) -> None:
    reference = Reference(family)
    asked = traffic(random.Random(seed))
    requests = [request(prompt, length, f"r{index}") for index, (prompt, length) in enumerate(asked)]
    found: list[tuple[int, ...]] = []
    seen: list[EngineStats] = []

    async def play(engine: PagedEngine) -> None:
        found.extend([await answer(engine, one) for one in requests])
        found.extend(await all_at_once(engine, requests))
        seen.append(engine.stats())

    run(family, tokenizer, play, cache_gb=cache_gb(family, NUM_BLOCKS), max_sequence_length=110, **_ROOM)
    for (prompt, length), tokens in zip(asked + asked, found, strict=True):
        reference.check(prompt, length, tokens)
    record_property("ties", reference.num_ties)
    assert reference.num_ties <= 1
    assert seen[0].num_blocks == seen[0].num_free_blocks == NUM_BLOCKS
    assert seen[0].num_preemptions > 0
    assert seen[0].num_prefix_hits > 0
    assert seen[0].num_chunks > 0


def test_seeded_answers_do_not_depend_on_company(family: Any, tokenizer: Any) -> None:
    rng = random.Random(7)
    asked = [
        request(prompt, length, f"r{index}", None, rng.choice([0.7, 1.0]), top_p=rng.choice([0.9, 1.0]), seed=index)
        for index, (prompt, length) in enumerate(traffic(rng))
    ]

    async def play(engine: PagedEngine) -> None:
        alone = [await answer(engine, one) for one in asked]
        assert await all_at_once(engine, asked) == alone
        assert engine.stats().num_preemptions > 0

    run(family, tokenizer, play, cache_gb=cache_gb(family, NUM_BLOCKS), max_sequence_length=110, **_ROOM)


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_batch_invariant_answers_have_the_same_bits_in_any_company(family: Any, tokenizer: Any, weights: Any) -> None:
    asked = [
        request(prompt, length, f"r{index}", None, 0.8 * (index % 2), seed=index, logprobs=0)
        for index, (prompt, length) in enumerate(traffic(random.Random(5)))
    ]

    async def logprobs(engine: PagedEngine, one: GenerationRequest) -> list[float]:
        return [output.logprobs[0].logprob async for output in engine.submit(one)]

    async def play(engine: PagedEngine) -> None:
        alone = [await logprobs(engine, one) for one in asked]
        assert await asyncio.gather(*(logprobs(engine, one) for one in asked)) == alone
        assert engine.stats().num_preemptions > 0
        assert engine.stats().num_chunks > 0

    model = family.to(weights_dtype(weights, "cpu"))
    limits = {"cache_gb": cache_gb(model, NUM_BLOCKS), "max_sequence_length": 110, "weights": weights, "batch_invariant": True}
    run(model, tokenizer, play, **limits, **_ROOM)


def test_torch_and_c_attend_alike(family: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On machines without a compiler the answers are the same."""
    monkeypatch.setattr("tidepool.inference.native.library", lambda: None)
    reference = Reference(family)
    asked = traffic(random.Random(3))

    async def play(engine: PagedEngine) -> None:
        found = await all_at_once(engine, [request(prompt, length, f"r{index}") for index, (prompt, length) in enumerate(asked)])
        for (prompt, length), tokens in zip(asked, found, strict=True):
            reference.check(prompt, length, tokens)

    run(family, tokenizer, play, **_ROOM)
    assert reference.num_ties <= 1


def test_a_cancelled_request_gives_its_blocks_back_at_once(tokenizer: Any) -> None:
    model = build_model(FAMILIES["llama"], len(tokenizer), 1, tokenizer)

    async def play(engine: PagedEngine) -> None:
        stream = engine.submit(request([5] * 40, 60))
        first = await anext(stream)
        assert engine.stats().num_free_blocks < engine.stats().num_blocks
        engine.cancel("r")
        assert engine.stats().num_free_blocks == engine.stats().num_blocks
        assert len(tokens_of([first, *[output async for output in stream]])) < 60

    run(model, tokenizer, play)


@torch.no_grad()
def test_what_was_computed_for_one_adapter_is_not_found_by_another(llama: Any, tokenizer: Any, adapters: Any) -> None:
    one, two, _ = adapters
    prompt = list(range(60, 60 + 3 * BLOCK_SIZE))

    async def play(engine: PagedEngine) -> None:
        for digest in (one, two):
            await engine.load_adapter(digest, adapters[digest])
        alone = {digest: await answer(engine, request(prompt, 9, "r", digest)) for digest in (None, one, two)}
        assert engine.stats().num_prefix_hits == 0
        assert len(set(alone.values())) == 3
        for digest, expected in alone.items():
            assert await answer(engine, request(prompt, 9, "r", digest)) == expected
        assert engine.stats().num_prefix_hits == 3

    run(llama, tokenizer, play)
