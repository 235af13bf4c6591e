"""What a request may ask, through the whole engine: several answers, log-probabilities, grammars, end tokens; and fairness."""

import asyncio
import json
import math
from typing import Any

import pytest
import torch

from tests.inference.conftest import answer, collect, endless, request, run, text_of, tokens_of
from tests.inference.families import Reference
from tidepool.errors import EngineBusyError, RequestError
from tidepool.inference import GenerationRequest, Output
from tidepool.inference.limits import BLOCK_SIZE
from tidepool.inference.paged import PagedEngine

PROMPT = list(range(60, 60 + BLOCK_SIZE + 4))


def of_answer(outputs: list[Output], number: int) -> list[Output]:
    return [output for output in outputs if output.answer == number]


def test_several_answers_share_a_prompt_and_the_first_is_the_one_alone(llama: Any, tokenizer: Any) -> None:
    async def play(engine: PagedEngine) -> None:
        alone = await answer(engine, request(PROMPT, 10, "one", None, 1.0, seed=3))
        outputs = await collect(engine.submit(request(PROMPT, 10, "three", None, 1.0, seed=3, n=3)))
        found = [tokens_of(of_answer(outputs, number)) for number in range(3)]
        assert found[0] == alone
        assert len(set(found)) == 3
        assert all([one.finish_reason for one in of_answer(outputs, number)][-1] for number in range(3))
        assert engine.stats().num_prefix_tokens == 3 * BLOCK_SIZE

    run(llama, tokenizer, play)


def test_several_answers_are_cancelled_and_counted_as_several(llama: Any, tokenizer: Any) -> None:
    endless(llama, tokenizer)

    async def play(engine: PagedEngine) -> None:
        stream = engine.submit(request(PROMPT, 100, "r", n=3))
        await anext(stream)
        with pytest.raises(EngineBusyError, match="2 answers are running and 1 waiting, and this engine takes 4"):
            engine.submit(request(PROMPT, 100, "more", n=2))
        engine.cancel("r")
        ends = [output.answer for output in await collect(stream) if output.finish_reason == "cancelled"]
        assert sorted(ends) == [0, 1, 2]

    run(llama, tokenizer, play, max_batch_size=2, max_queued_requests=2)


@pytest.mark.parametrize("max_step_tokens", [7, 512])
def test_log_probabilities_are_those_of_the_model(llama: Any, tokenizer: Any, max_step_tokens: int) -> None:
    reference = Reference(llama)

    async def play(engine: PagedEngine) -> None:
        await answer(engine, request(PROMPT, 3, "before"))  # its blocks must not be used
        outputs = await collect(engine.submit(request(PROMPT, 6, "r", logprobs=2, prompt_logprobs=1)))
        tokens = [*PROMPT, *tokens_of(outputs)]
        with torch.no_grad():
            own = reference._model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        prompt = outputs[0].prompt_logprobs
        assert prompt[0] is None
        assert len(prompt) == len(PROMPT)
        assert not any(output.prompt_logprobs for output in outputs[1:])
        told = [*prompt[1:], *(one for output in outputs for one in output.logprobs)]
        for index, one in enumerate(told):
            assert one is not None
            assert one.token_id == tokens[index + 1]
            assert math.isclose(one.logprob, own[index, tokens[index + 1]], abs_tol=1e-3)
            assert one.top[0][0] == own[index].argmax()
            assert len(one.top) == (1 if index < len(PROMPT) - 1 else 2)

    run(llama, tokenizer, play, max_batch_size=2, max_step_tokens=max_step_tokens)


def test_a_prompt_that_is_computed_again_tells_its_log_probabilities_once(llama: Any, tokenizer: Any) -> None:
    endless(llama, tokenizer)

    async def play(engine: PagedEngine) -> None:
        old = asyncio.create_task(answer(engine, request([5] * 20, 60, "old")))
        outputs = await collect(engine.submit(request(PROMPT, 60, "new", prompt_logprobs=0)))
        assert engine.stats().num_preemptions > 0
        assert [len(output.prompt_logprobs) for output in outputs] == [len(PROMPT)] + [0] * 59
        await old

    run(llama, tokenizer, play, max_sequence_length=100, cache_gb=9 * BLOCK_SIZE * 2 * 2 * 2 * 8 * 4 / 1e9 * 1.001)


def test_answers_obey_a_grammar_while_others_go_on(llama: Any, tokenizer: Any) -> None:
    schema = json.dumps(
        {"type": "object", "properties": {"tide": {"enum": ["in", "out"]}}, "required": ["tide"], "additionalProperties": False}
    )

    async def play(engine: PagedEngine) -> None:
        asked = [
            request(PROMPT, 60, "json", None, 1.0, seed=1, json_schema=schema),
            request(PROMPT, 60, "regex", None, 1.0, seed=2, regex="[0-9]{3}-[a-f]"),
            request(PROMPT, 5, "free"),
        ]
        found = await asyncio.gather(*(collect(engine.submit(one)) for one in asked))
        assert json.loads(text_of(found[0]))["tide"] in ("in", "out")
        digits, _, letter = text_of(found[1]).partition("-")
        assert (len(digits), digits.isdigit(), letter in set("abcdef")) == (3, True, True)
        assert found[0][-1].finish_reason == found[1][-1].finish_reason == "stop"
        with pytest.raises(RequestError):
            await collect(engine.submit(request(PROMPT, 9, "broken", regex="(")))
        assert engine.stats().num_queued == 0
        stream = engine.submit(request(PROMPT, 9, "left", json_schema=schema))
        engine.cancel("left")
        assert [output.finish_reason for output in await collect(stream)] == ["cancelled"]

    run(llama, tokenizer, play)


def test_a_stop_token_ends_an_answer(llama: Any, tokenizer: Any) -> None:
    async def play(engine: PagedEngine) -> None:
        tokens = await answer(engine, request(PROMPT, 10, "r"))
        stop = tokens[4]
        outputs = await collect(engine.submit(request(PROMPT, 10, "r", stop_token_ids=frozenset({stop}))))
        assert tokens_of(outputs) == tokens[: tokens.index(stop) + 1]
        assert outputs[-1].finish_reason == "stop"

    run(endless(llama, tokenizer), tokenizer, play)


def test_a_client_with_few_requests_does_not_wait_for_one_with_many(llama: Any, tokenizer: Any) -> None:
    endless(llama, tokenizer)
    ended: list[str] = []

    async def ask(engine: PagedEngine, name: str, key: str) -> None:
        asked = request([5, 6, 7], 10, name)
        await collect(engine.submit(GenerationRequest(name, asked.prompt_tokens, asked.sampling, None, key)))
        ended.append(key)

    async def play(engine: PagedEngine) -> None:
        async with asyncio.TaskGroup() as group:
            for index in range(20):
                group.create_task(ask(engine, f"m{index}", "many"))
            for index in range(2):
                group.create_task(ask(engine, f"f{index}", "few"))

    run(llama, tokenizer, play, max_batch_size=2)
    assert max(index for index, key in enumerate(ended) if key == "few") < 6
