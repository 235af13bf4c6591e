"""A request that one engine began and another one finishes: what was told and what is told then are the undisturbed answer."""

import dataclasses
import json
from typing import Any

import pytest

from tests.inference.conftest import answer, collect, endless, request, run, text_of, tokens_of
from tidepool.errors import RequestError
from tidepool.inference import GenerationRequest, Output
from tidepool.inference.limits import BLOCK_SIZE
from tidepool.inference.paged import PagedEngine

PROMPT = list(range(60, 60 + BLOCK_SIZE + 4))
SCHEMA = json.dumps(
    {"type": "object", "properties": {"tide": {"enum": ["in", "out"]}}, "required": ["tide"], "additionalProperties": False}
)
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 11},
    "penalties": {"temperature": 0.7, "seed": 3, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "repetition": {"frequency_penalty": 2.0},
    "logprobs": {"temperature": 1.0, "seed": 5, "logprobs": 2, "prompt_logprobs": 1},
    "grammar": {"temperature": 1.0, "seed": 1, "json_schema": SCHEMA},
    "several": {"temperature": 1.0, "seed": 2, "n": 3},
}


def cut(outputs: list[Output], num: int, n: int) -> tuple[list[Output], tuple[tuple[int, ...], ...]]:
    """The first outputs, and the tokens of each answer in them."""
    told = outputs[:num]
    return told, tuple(tokens_of(one for one in told if one.answer == number) for number in range(n))


def resume(asked: GenerationRequest, tokens: tuple[tuple[int, ...], ...]) -> GenerationRequest:
    return dataclasses.replace(asked, request_id=f"again-{sum(map(len, tokens))}", resumed=tokens)


@pytest.mark.parametrize("kind", ASKED)
def test_an_answer_goes_on_wherever_it_was_cut(llama: Any, tokenizer: Any, kind: str) -> None:
    asked = request(PROMPT, 24, "whole", None, **{"temperature": 0, **ASKED[kind]})

    async def play(engine: PagedEngine) -> None:
        whole = await collect(engine.submit(asked))
        for num in range(0, len(whole), 5):
            told, tokens = cut(whole, num, asked.sampling.n)
            rest = await collect(engine.submit(resume(asked, tokens)))
            for number in range(asked.sampling.n):
                expected, before, after = (_of(outputs, number) for outputs in (whole, told, rest))
                if before and before[-1].finish_reason:  # its end is told again, and nothing else
                    assert after == [Output((), "", before[-1].finish_reason, number)]
                else:
                    assert [one.token_ids for one in before + after] == [one.token_ids for one in expected]
                    assert [one.text for one in before + after] == [one.text for one in expected]
                    assert [one.finish_reason for one in before + after] == [one.finish_reason for one in expected]
                    _assert_same_logprobs(before + after, expected)
        if kind == "grammar":
            assert json.loads(text_of(whole))["tide"] in ("in", "out")

    run(llama if kind == "grammar" else endless(llama, tokenizer), tokenizer, play)


def _of(outputs: list[Output], number: int) -> list[Output]:
    return [one for one in outputs if one.answer == number]


def _assert_same_logprobs(found: list[Output], expected: list[Output]) -> None:
    for mine, other in zip(found, expected, strict=True):
        assert [one.token_id for one in mine.logprobs] == [one.token_id for one in other.logprobs]
        assert [one.logprob for one in mine.logprobs] == pytest.approx([one.logprob for one in other.logprobs], abs=1e-4)
        assert len(mine.prompt_logprobs) == len(other.prompt_logprobs)


def test_a_stop_string_across_the_cut_ends_the_text_before_it(llama: Any, tokenizer: Any) -> None:
    letters = tuple((token, 50.0) for letter in "abcdefgh" for token in tokenizer(letter)["input_ids"])

    def spelled(name: str, **rest: Any) -> GenerationRequest:
        return request(PROMPT, 12, name, None, 1.0, seed=4, logit_bias=letters, **rest)

    async def play(engine: PagedEngine) -> None:
        free = await collect(engine.submit(spelled("free")))
        texts = [one.text for one in free]
        stop = "".join(texts[4:8])
        assert all(texts[4:8])
        asked = spelled("whole", stop=(stop,))
        whole = await collect(engine.submit(asked))
        assert (text_of(whole), whole[-1].finish_reason) == ("".join(texts).split(stop)[0], "stop")
        for num in range(5, 8):  # within the stop string
            told, tokens = cut(whole, num, 1)
            assert text_of(told + await collect(engine.submit(resume(asked, tokens)))) == text_of(whole)

    run(endless(llama, tokenizer), tokenizer, play)


def test_a_resumed_request_is_taken_by_an_engine_that_is_full(llama: Any, tokenizer: Any) -> None:
    async def play(engine: PagedEngine) -> None:
        running = engine.submit(request(PROMPT, 100, "running"))
        await anext(running)
        again = engine.submit(resume(request(PROMPT, 8), ((),)))
        await running.aclose()
        assert len(tokens_of(await collect(again))) == 8

    run(endless(llama, tokenizer), tokenizer, play, max_batch_size=1, max_queued_requests=1, max_step_tokens=64)


@pytest.mark.parametrize(("tokens", "message"), [(((1,), (2,)), "1 answers is resumed with 2"), (((99999,),), "no token 99999")])
def test_tokens_that_no_answer_can_have_are_refused(llama: Any, tokenizer: Any, tokens: tuple[tuple[int, ...], ...], message: str) -> None:
    async def play(engine: PagedEngine) -> None:
        with pytest.raises(RequestError, match=message):
            engine.submit(resume(request(PROMPT), tokens))

    run(llama, tokenizer, play)


def test_a_tokenizer_that_fails_on_what_was_told_ends_that_request_alone(
    llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> str:
        raise ValueError("broken")

    async def play(engine: PagedEngine) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("tidepool.inference.answer.Detokenizer.push", broken)
            stream = engine.submit(resume(request(PROMPT), ((1, 2),)))
            with pytest.raises(ValueError, match="broken"):
                await anext(stream)
        assert len(await answer(engine, request(PROMPT, 3, "after"))) == 3

    run(endless(llama, tokenizer), tokenizer, play)
