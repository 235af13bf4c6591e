"""The official client against the real engine over HTTP: numbers are transformers' own, and what is asked for is what comes."""

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.serving.local import LocalModel, gateway_of, served

CHAT: Any = [{"role": "user", "content": "the tide"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "description": "High water at a port",
        "parameters": {
            "type": "object",
            "properties": {"port": {"enum": ["Brest", "Dover"]}, "when": {"$ref": "#/$defs/When"}},
            "required": ["port", "when"],
            "additionalProperties": False,
            "$defs": {"When": {"enum": ["today", "tomorrow"]}},
        },
    },
}
MOON: Any = {"type": "function", "function": {"name": "get_moon"}}


@pytest.fixture(scope="module")
def model() -> LocalModel:
    return LocalModel()


@pytest.fixture(scope="module")
def url(model: LocalModel) -> Iterator[str]:
    with served(gateway_of(model), log_level="error") as url:
        yield url


@pytest.fixture
def client(model: LocalModel, url: str) -> Iterator[OpenAI]:
    model.script = (0, [])
    with OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def tokenize(url: str, **body: Any) -> Any:
    response = httpx.post(f"{url}/tokenize", json={"model": "tides", **body})
    assert response.status_code == 200, response.text
    return response.json()


# --- Completions -----------------------------------------------------------------------------------------------------


def test_echo_and_log_probabilities_are_those_of_transformers(model: LocalModel, client: OpenAI) -> None:
    text = "the pool keeps 🌊 what"
    tokens = model.tokenizer(text)["input_ids"]
    for prompt in (text, tokens):
        choice = client.completions.create(model="tides", prompt=prompt, max_tokens=4, temperature=0, echo=True, logprobs=2).choices[0]
        assert choice.text.startswith(text)
        table: Any = choice.logprobs
        assert table.token_logprobs[0] is None
        assert table.top_logprobs[0] is None
        assert len(table.tokens) == len(tokens) + 4
        own = model.logits(tokens).log_softmax(-1)
        for index, token in enumerate(tokens[1:]):
            assert math.isclose(table.token_logprobs[index + 1], own[index, token], abs_tol=1e-3)
            best = table.top_logprobs[index + 1]
            assert math.isclose(max(best.values()), own[index].max(), abs_tol=1e-3)
            assert 2 <= len(best) <= 3
        assert table.tokens[0] == model.tokenizer.decode(tokens[0])
        assert [name for name in table.tokens if name.startswith("bytes:")], "a wave is several tokens of part of a character"
        assert table.text_offset == sorted(table.text_offset)
        placed = zip(table.tokens, table.text_offset, strict=True)
        assert all(choice.text[offset:].startswith(name) for name, offset in placed if not name.startswith(("bytes:", "<|")))


def test_a_prompt_alone_has_no_answer_and_costs_none(model: LocalModel, client: OpenAI) -> None:
    tokens = model.tokenizer("the tide comes in")["input_ids"]
    found = client.completions.create(model="tides", prompt=tokens, max_tokens=0, echo=True, logprobs=1)
    assert found.choices[0].text == "the tide comes in"
    assert found.choices[0].finish_reason == "length"
    assert len(found.choices[0].logprobs.tokens) == len(tokens)  # type: ignore[union-attr,arg-type]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(tokens), 0)  # type: ignore[union-attr]


def test_several_prompts_and_several_answers_of_each(model: LocalModel, client: OpenAI) -> None:
    prompts = ["the tide", "the pool fills", "and"]
    sampling: Any = {"max_tokens": 5, "temperature": 1, "seed": 3, "n": 2, "logprobs": 0, "echo": True}
    found = client.completions.create(model="tides", prompt=prompts, **sampling)
    assert [choice.index for choice in found.choices] == list(range(6))
    assert [choice.text.startswith(prompts[choice.index // 2]) for choice in found.choices] == [True] * 6
    counts = [len(model.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert found.usage.prompt_tokens == sum(counts)  # type: ignore[union-attr]
    num_told = [len(choice.logprobs.tokens) - counts[choice.index // 2] for choice in found.choices]  # type: ignore[union-attr,arg-type]
    assert found.usage.completion_tokens == sum(num_told)  # type: ignore[union-attr]
    alone = [client.completions.create(model="tides", prompt=prompt, **sampling) for prompt in prompts]
    assert [choice.text for one in alone for choice in one.choices] == [choice.text for choice in found.choices]

    chunks = list(client.completions.create(model="tides", prompt=prompts, stream=True, stream_options={"include_usage": True}, **sampling))
    texts, names = [""] * 6, [[] for _ in range(6)]
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        names[choice.index] += (choice.logprobs.tokens or []) if choice.logprobs else []
    assert texts == [choice.text for choice in found.choices]
    assert names == [choice.logprobs.tokens for choice in found.choices]  # type: ignore[union-attr]
    assert chunks[-1].usage == found.usage


def test_penalties_bias_and_forms_reach_the_engine(model: LocalModel, client: OpenAI) -> None:
    def answer(**fields: Any) -> str:
        return client.completions.create(model="tides", prompt="the tide", max_tokens=6, temperature=0, **fields).choices[0].text

    token = model.tokenizer("x")["input_ids"][0]
    assert answer(logit_bias={str(token): 100}) == "xxxxxx"
    assert answer(logit_bias={str(token): 100}, frequency_penalty=2, extra_body={"stop_token_ids": [token]}) == ""
    assert answer(extra_body={"structured_outputs": {"regex": "(ab){3}"}}) == "ababab"
    assert answer(logit_bias={str(token): 100}, stop="xxx") == ""


# --- Chats -----------------------------------------------------------------------------------------------------------


def test_log_probabilities_of_a_chat(client: OpenAI) -> None:
    given: Any = {"model": "tides", "messages": CHAT, "max_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 2, "n": 2}
    found = client.chat.completions.create(**given)
    told: Any = found.choices[1].logprobs.content  # type: ignore[union-attr]
    assert 1 <= len(told) <= 4
    for one in told:
        assert one.token.startswith("bytes:") or bytes(one.bytes).decode() == one.token
        assert one.top_logprobs[0].token == one.token, "greedy takes the likeliest"
        assert len(one.top_logprobs) == 2
        assert one.logprob < 0
    streamed: list[Any] = [[], []]
    for chunk in client.chat.completions.create(stream=True, **given):
        if (choice := chunk.choices[0]).logprobs:
            streamed[choice.index] += choice.logprobs.content
    assert [[one.token for one in part] for part in streamed] == [
        [one.token for one in choice.logprobs.content]
        for choice in found.choices  # type: ignore[union-attr]
    ]
    assert found.usage.completion_tokens == sum(map(len, streamed))  # type: ignore[union-attr]


class High(BaseModel):
    port: Literal["Brest", "Dover"]
    is_spring: bool


def test_answers_held_to_a_schema(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(model="tides", messages=CHAT, response_format=High, max_tokens=200, seed=1)
    assert isinstance(parsed.choices[0].message.parsed, High)
    free = client.chat.completions.create(
        model="tides", messages=CHAT, response_format={"type": "json_object"}, max_tokens=400, temperature=0, logit_bias={}, seed=1
    )
    if free.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(free.choices[0].message.content or ""), dict)
    with client.chat.completions.stream(model="tides", messages=CHAT, response_format=High, max_tokens=200, seed=1) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_followed_has_its_status_streamed_or_not(client: OpenAI, stream: bool) -> None:
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "minProperties": {"a": 1}}}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tides", messages=CHAT, response_format=wrong, stream=stream)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_tide"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_be_made_is_made_with_valid_arguments(client: OpenAI, choice: Any, stream: bool) -> None:
    given: Any = {"model": "tides", "messages": CHAT, "tools": [WEATHER, MOON], "tool_choice": choice, "max_tokens": 200, "temperature": 1}
    for seed in range(2):
        if stream:
            with client.chat.completions.stream(seed=seed, **given) as events:
                found: Any = events.get_final_completion().choices[0]
        else:
            found = client.chat.completions.create(seed=seed, **given).choices[0]
        (call,) = found.message.tool_calls
        assert found.finish_reason == "tool_calls"
        assert not found.message.content
        arguments = json.loads(call.function.arguments)
        if call.function.name == "get_tide":
            assert arguments["port"] in ("Brest", "Dover")
            assert arguments["when"] in ("today", "tomorrow")
        else:
            assert choice == "required"
            assert (call.function.name, arguments) == ("get_moon", {})


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_the_model_chooses_to_make_and_its_result(model: LocalModel, url: str, client: OpenAI, stream: bool) -> None:
    given: Any = {"model": "tides", "tools": [WEATHER, MOON], "temperature": 0}
    call = '<tool_call>\n{"name": "get_tide", "arguments": {"port": "Brest", "when": "today"}}\n</tool_call>'
    model.say(tokenize(url, messages=CHAT, tools=[WEATHER, MOON])["count"], f"<think>hm</think>Let me look.\n{call}\n")
    if stream:
        with client.chat.completions.stream(messages=CHAT, **given) as events:
            choice: Any = events.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(messages=CHAT, **given).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "<think>hm</think>Let me look."
    (made,) = choice.message.tool_calls
    assert (made.function.name, json.loads(made.function.arguments)) == ("get_tide", {"port": "Brest", "when": "today"})

    answered: Any = [*CHAT, choice.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": made.id, "content": "5.4 m"}]
    for message in answered:
        message.pop("parsed", None)
    for one in answered[1].get("tool_calls", ()):
        one["function"].pop("parsed_arguments", None)
        one.pop("index", None)
    strings = "".join(tokenize(url, messages=answered, tools=[WEATHER], return_token_strs=True)["token_strs"])
    assert '<tool_call>{"name": "get_tide", "arguments": {"port": "Brest", "when": "today"}}</tool_call>' in strings
    model.say(tokenize(url, messages=answered, tools=[WEATHER, MOON])["count"], "It is high.")
    assert client.chat.completions.create(messages=answered, **given).choices[0].message.content == "It is high."


class GetTide(BaseModel):
    port: Literal["Brest", "Dover"]


def test_a_strict_tools_calls_are_held_to_its_schema_in_the_middle_of_free_text(model: LocalModel, url: str, client: OpenAI) -> None:
    strict = openai.pydantic_function_tool(GetTide)  # as the client makes it: strict
    call = '<tool_call>\n{"name": "GetTide", "arguments": {"port":"Paris"}}\n</tool_call> and so'
    model.say(tokenize(url, messages=CHAT, tools=[strict])["count"], f"Well. {call}")
    choice: Any = client.chat.completions.parse(model="tides", messages=CHAT, tools=[strict], temperature=0, max_tokens=90).choices[0]
    (made,) = choice.message.tool_calls
    assert isinstance(made.function.parsed_arguments, GetTide), "what it was about to say breaks the schema"
    assert choice.message.content.startswith("Well.")
    free = {"type": "function", "function": {"name": "GetTide"}}
    model.say(tokenize(url, messages=CHAT, tools=[free])["count"], f"Well. {call}")
    unheld: Any = client.chat.completions.create(model="tides", messages=CHAT, tools=[free], temperature=0, max_tokens=90)  # type: ignore[list-item]
    assert unheld.choices[0].message.tool_calls[0].function.arguments == '{"port": "Paris"}'


@pytest.mark.parametrize("stream", [False, True])
def test_a_strict_tool_whose_schema_cannot_be_followed_is_refused_with_a_status(client: OpenAI, stream: bool) -> None:
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}
    with pytest.raises(openai.BadRequestError, match="/nowhere"):
        client.chat.completions.create(model="tides", messages=CHAT, tools=[tool], stream=stream)


def test_only_the_first_call_where_one_alone_is_wanted(model: LocalModel, url: str, client: OpenAI) -> None:
    model.say(tokenize(url, messages=CHAT, tools=[MOON])["count"], '<tool_call>{"name": "get_moon"}</tool_call>' * 2)
    given: Any = {"model": "tides", "messages": CHAT, "tools": [MOON], "temperature": 0}
    assert len(client.chat.completions.create(**given).choices[0].message.tool_calls or ()) == 2
    assert len(client.chat.completions.create(parallel_tool_calls=False, **given).choices[0].message.tool_calls or ()) == 1


def test_a_mark_that_is_a_special_token_is_seen_and_ids_fit_mistrals_template() -> None:
    model = LocalModel("[TOOL_CALLS]")
    with served(gateway_of(model), log_level="error") as url, OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        model.say(tokenize(url, messages=CHAT, tools=[MOON])["count"], '[TOOL_CALLS] [{"name": "get_moon", "arguments": {"a": 1}}]')
        found = client.chat.completions.create(model="tides", messages=CHAT, tools=[MOON], temperature=0).choices[0]
        (call,) = found.message.tool_calls or ()
        assert (call.function.name, call.function.arguments) == ("get_moon", '{"a": 1}')  # type: ignore[union-attr]
        assert len(call.id) == 9
        assert call.id.isalnum()
        model.say(tokenize(url, messages=CHAT)["count"], "[TOOL_CALLS]hidden")
        assert client.chat.completions.create(model="tides", messages=CHAT, temperature=0).choices[0].message.content == "hidden"


def test_tools_that_a_template_has_no_place_for_are_refused(model: LocalModel, client: OpenAI) -> None:
    before = model.tokenizer.chat_template
    try:
        model.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        with pytest.raises(openai.BadRequestError, match="no place for tools"):
            client.chat.completions.create(model="tides", messages=CHAT, tools=[MOON])
        model.tokenizer.chat_template = before.replace("tool_call>", "call>")
        with pytest.raises(openai.BadRequestError, match="`strict` can be kept by models that write calls as <tool_call> alone"):
            client.chat.completions.create(model="tides", messages=CHAT, tools=[openai.pydantic_function_tool(GetTide)])
        assert client.chat.completions.create(model="tides", messages=CHAT, tools=[MOON], tool_choice="none", max_tokens=1).choices
    finally:
        model.tokenizer.chat_template = before


def test_content_in_parts_and_the_developers_role(model: LocalModel, url: str) -> None:
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "tide"}]
    found = tokenize(url, messages=[{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}])
    text = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nthe\ntide<|im_end|>\n<|im_start|>assistant\n"
    assert found["tokens"] == model.tokenizer(text)["input_ids"]


# --- Embeddings ------------------------------------------------------------------------------------------------------


def test_embeddings_are_the_mean_of_transformers_hidden_states(model: LocalModel, client: OpenAI) -> None:
    texts = ["the tide comes in", "and", "the pool"]
    tokens = [model.tokenizer(text)["input_ids"] for text in texts]
    with torch.no_grad():
        expected = [model.reference.base_model(torch.tensor([one])).last_hidden_state[0].mean(0) for one in tokens]
    for inputs in (texts, tokens):
        for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):  # the client asks for base64 by itself
            found: Any = client.embeddings.create(model="tides", input=inputs, **options)  # type: ignore[arg-type]
            if options.get("encoding_format") == "base64":
                assert all(isinstance(one.embedding, str) for one in found.data)
                continue
            for one, other in zip(found.data, expected, strict=True):
                torch.testing.assert_close(torch.tensor(one.embedding), other, atol=1e-4, rtol=1e-4)
            assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, tokens))
    alone: Any = client.embeddings.create(model="tides", input=tokens[0])
    torch.testing.assert_close(torch.tensor(alone.data[0].embedding), expected[0], atol=1e-4, rtol=1e-4)
    many = client.embeddings.create(model="tides", input=["and"] * 300)
    assert [one.index for one in many.data] == list(range(300))
    with pytest.raises(openai.BadRequestError, match="`dimensions`"):
        client.embeddings.create(model="tides", input="x", dimensions=8)


# --- Responses -------------------------------------------------------------------------------------------------------


def test_responses_whole_and_streamed(model: LocalModel, url: str, client: OpenAI) -> None:
    messages = [{"role": "system", "content": "Be short."}, *CHAT]
    num_prompt = tokenize(url, messages=messages)["count"]
    num_tokens = model.say(num_prompt, "It is high.")
    given: Any = {"model": "tides", "instructions": "Be short.", "temperature": 0}
    found = client.responses.create(input="the tide", **given)
    assert (found.output_text, found.status) == ("It is high.", "completed")
    assert (found.usage.input_tokens, found.usage.output_tokens) == (num_prompt, num_tokens)  # type: ignore[union-attr]
    items: Any = [{"role": "user", "content": [{"type": "input_text", "text": "the tide"}]}]
    with client.responses.stream(input=items, **given) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "It is high."
    assert (final.output_text, final.usage) == (found.output_text, found.usage)
    cut = client.responses.create(input="the tide", max_output_tokens=2, **given)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore[union-attr]


def test_a_response_held_to_a_schema_and_what_needs_a_memory(client: OpenAI) -> None:
    parsed = client.responses.parse(model="tides", input="the tide", text_format=High, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, High)
    refused: list[tuple[str, Any]] = [("store", True), ("previous_response_id", "resp_1"), ("tools", [{"type": "web_search"}])]
    for field, value in refused:
        with pytest.raises(openai.BadRequestError, match=f"`{field}`"):
            client.responses.create(model="tides", input="x", **{field: value})


# --- The asynchronous client, readiness ------------------------------------------------------------------------------


def test_the_asynchronous_client(model: LocalModel, url: str) -> None:
    model.script = (0, [])

    async def run() -> None:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client:
            given: Any = {"model": "tides", "messages": CHAT, "max_tokens": 8, "temperature": 0}
            whole, *others = await asyncio.gather(*(client.chat.completions.create(**given) for _ in range(4)))
            assert all(one.choices[0].message == whole.choices[0].message for one in others)
            text = ""
            async for chunk in await client.chat.completions.create(stream=True, **given):
                text += chunk.choices[0].delta.content or ""
            assert text == whole.choices[0].message.content
            parsed = await client.chat.completions.parse(response_format=High, **(given | {"max_tokens": 200}))
            assert isinstance(parsed.choices[0].message.parsed, High)
            async with client.chat.completions.stream(tools=[WEATHER], tool_choice="required", **(given | {"max_tokens": 200})) as stream:
                final = await stream.get_final_completion()
            assert final.choices[0].finish_reason == "tool_calls"
            model.say(tokenize(url, messages=CHAT)["count"], "High.")
            async with client.responses.stream(model="tides", input="the tide") as events:
                assert (await events.get_final_response()).output_text == "High."
            assert len((await client.embeddings.create(model="tides", input="x")).data[0].embedding) == 32
            assert [one.id async for one in client.models.list()] == ["tides", "bot"]

    asyncio.run(run())


def test_a_gateway_is_ready_when_the_engine_answers_and_not_when_it_has_failed(url: str) -> None:
    assert httpx.get(f"{url}/ready").status_code == 200
    broken = LocalModel()
    broken.engine._has_failed = True
    with served(gateway_of(broken), log_level="error") as other:
        response = httpx.get(f"{other}/ready")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
        assert httpx.get(f"{other}/health").status_code == 200
