"""Greedy and seeded answers are the same alone and in any company: cut, preempted, found in the cache, for each family that we train."""

import asyncio
import copy
import random
from typing import Any

import pytest
import torch

from tests.inference.conftest import INT8, answer, request, run, tokens_of
from tests.inference.families import FAMILIES, Reference
from tidepool.inference import native
from tidepool.inference.engine import EngineStats, GenerationRequest
from tidepool.inference.graphs import Rerun
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


def terse(model: Any) -> Any:
    """The model, made to say the same seven tokens again and again, so that there is something to guess."""

    def of_few_words(_module: Any, _inputs: Any, output: Any) -> Any:
        output.logits[..., :60] = output.logits[..., 67:] = -1e4
        return output

    model.register_forward_hook(of_few_words)
    return model


def test_guessed_answers_are_those_of_transformers(family: Any, tokenizer: Any) -> None:
    reference = Reference(terse(family))
    asked = traffic(random.Random(2))
    requests = [request(prompt, length, f"r{index}") for index, (prompt, length) in enumerate(asked)]

    async def play(engine: PagedEngine) -> None:
        found = [await answer(engine, one) for one in requests] + await all_at_once(engine, requests)
        for (prompt, length), tokens in zip(asked + asked, found, strict=True):
            reference.check(prompt, length, tokens)
        stats = engine.stats()
        assert 0 < stats.num_accepted_tokens <= stats.num_drafted_tokens  # one family says the same token for ever
        assert min(stats.num_preemptions, stats.num_prefix_hits, stats.num_chunks) > 0
        assert stats.num_free_blocks == stats.num_blocks

    limits = {"cache_gb": cache_gb(family, NUM_BLOCKS), "max_sequence_length": 110, "speculative_tokens": 4}
    run(family, tokenizer, play, **limits, **_ROOM)
    assert reference.num_ties <= 1


WAYS: dict[str, dict[str, Any]] = {"guessed": {"speculative_tokens": 4}, "ahead": {"is_ahead": True}}


@pytest.mark.parametrize("way", WAYS)
def test_no_parameter_changes_its_meaning_where_tokens_are_guessed_or_steps_are_launched_ahead(
    llama: Any, tokenizer: Any, way: str
) -> None:
    rng = random.Random(3)
    terse(llama)
    stop = tokenizer.decode([63, 64])
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.8, "seed": 1, "n": 2, "logprobs": 2},
        {"temperature": 0.6, "seed": 2, "top_p": 0.9},
        {"stop": (stop,), "logprobs": 0},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"prompt_logprobs": 1},
        {"regex": "[A-z ]{5,20}"},
        {"logit_bias": ((61, 5.0),), "temperature": 0.4, "seed": 3},
        {"stop_token_ids": frozenset({66})},
    ]
    asked = [request(prompt, length, f"r{i}", **kinds[i % len(kinds)]) for i, (prompt, length) in enumerate(traffic(rng) + traffic(rng))]

    async def outputs(engine: PagedEngine, one: GenerationRequest) -> list[Any]:
        found = [output async for output in engine.submit(one)]
        return [
            [(output.token_ids, output.text, output.finish_reason) for output in found if output.answer == number]
            + [(each.token_id, [token for token, _ in each.top]) for output in found if output.answer == number for each in output.logprobs]
            for number in range(one.sampling.n)
        ]

    async def play(engine: PagedEngine) -> None:
        everything.append(await asyncio.gather(*(outputs(engine, one) for one in asked)))
        seen.append(engine.stats())

    everything: list[Any] = []
    seen: list[EngineStats] = []
    limits = {"cache_gb": cache_gb(llama, NUM_BLOCKS), "max_sequence_length": 110, "max_queued_requests": 100}
    for more in ({}, WAYS[way]):
        run(copy.deepcopy(llama), tokenizer, play, **limits, **_ROOM, **more)
    assert everything[0] == everything[1]
    assert seen[1].num_preemptions > 0
    if way == "guessed":
        assert 0 < seen[1].num_accepted_tokens < seen[1].num_drafted_tokens


@pytest.mark.parametrize("more", [{"is_ahead": True}, {"speculative_tokens": 2}])
def test_recorded_steps_give_the_same_tokens(model: Any, tokenizer: Any, more: dict[str, Any]) -> None:
    """All of the ways of a GPU but the recording: fixed memory, rows filled up, tokens that are filled in on the device."""
    asked = [
        request(prompt, length, f"r{index}", temperature=0.8 * (index % 2), seed=index)
        for index, (prompt, length) in enumerate(traffic(random.Random(6)))
    ]
    found = []
    sizes: list[int] = []

    async def plain(engine: PagedEngine) -> None:
        found.append(await all_at_once(engine, asked))

    async def recorded(engine: PagedEngine) -> None:
        engine._runner.record(6, 7, Rerun)  # some steps are larger, or longer
        graphs = engine._runner._graphs
        assert graphs is not None
        original = graphs.run
        graphs.run = lambda ragged, fill_in: sizes.append(ragged.num_decoding) or original(ragged, fill_in)  # type: ignore
        await plain(engine)
        assert engine.stats().num_preemptions > 0

    limits = {"cache_gb": cache_gb(model, NUM_BLOCKS), "max_sequence_length": 110}
    run(copy.deepcopy(model), tokenizer, plain, **limits, **_ROOM)
    run(copy.deepcopy(model), tokenizer, recorded, **limits, **_ROOM, **more)
    assert found[0] == found[1]
    assert {2, 3} <= set(sizes), "three rows are filled up to four"


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("weights", ["bf16", INT8])
def test_batch_invariant_answers_have_the_same_bits_in_any_company(family: Any, tokenizer: Any, weights: Any) -> None:
    asked = [
        request(prompt, length, f"r{index}", None, 0.8 * (index % 2), seed=index, logprobs=0)
        for index, (prompt, length) in enumerate(traffic(random.Random(5)))
    ]

    async def bits(engine: PagedEngine, one: GenerationRequest) -> list[Any]:
        return [(output.token_ids, output.logprobs[0].logprob) async for output in engine.submit(one)]

    alone: list[Any] = []

    async def play(engine: PagedEngine) -> None:
        alone.extend([await bits(engine, one) for one in asked])
        assert await asyncio.gather(*(bits(engine, one) for one in asked)) == alone
        assert engine.stats().num_preemptions > 0
        assert engine.stats().num_chunks > 0
        assert engine.stats().num_prefix_hits > 0

    async def guess(engine: PagedEngine) -> None:
        assert await asyncio.gather(*(bits(engine, one) for one in asked)) == alone
        assert engine.stats().num_accepted_tokens > 0

    model = terse(family).to(weights_dtype(weights, "cpu"))
    limits = {"cache_gb": cache_gb(model, NUM_BLOCKS), "max_sequence_length": 110, "weights": weights, "batch_invariant": True}
    run(copy.deepcopy(model), tokenizer, play, **limits, **_ROOM)
    if weights == "bf16":
        run(model, tokenizer, guess, speculative_tokens=3, **limits, **_ROOM)


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
