"""Requests are served as they are written, or refused with the field that stands in the way."""

import json
from typing import Any

import pytest

from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.serving.api.ask import Ask
from tidepool.serving.api.chat import ChatForm, parse_chat
from tidepool.serving.api.completions import COMPLETION_MAX_TOKENS, CompletionForm, parse_completion
from tidepool.serving.backend import Chat, Message
from tidepool.serving.problem import Problem, Refusal

CHAT = {"model": "bot", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "bot", "prompt": "hi"}


def chat(**fields: Any) -> Ask:
    return parse_chat(json.dumps(CHAT | fields).encode())


def completion(**fields: Any) -> Ask:
    return parse_completion(json.dumps(COMPLETION | fields).encode())


def problem(parse: Any, body: bytes | dict[str, Any]) -> Problem:
    with pytest.raises(Refusal) as caught:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode())
    result: Problem = caught.value.problem
    assert result.status == 400
    return result


def test_the_defaults_are_those_of_openai() -> None:
    assert completion() == Ask("bot", ("hi",), CompletionForm(), SamplingParameters(COMPLETION_MAX_TOKENS))
    assert chat() == Ask("bot", (Chat((Message("user", "hi"),)),), ChatForm(), SamplingParameters())


def test_every_field_that_is_served_arrives() -> None:
    fields = {"temperature": 0, "top_p": 0.5, "seed": -3, "stop": ["a", "b"], "n": 2, "presence_penalty": 0.5, "frequency_penalty": -1}
    fields |= {"logit_bias": {"5": 1.5, "6": -100}, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [9]}
    fields |= {"stream": True, "user": "u"}
    sampling = SamplingParameters(7, 0.0, 0.5, -3, ("a", "b"), 7, 0.1, 1.1, 0.5, -1.0, ((5, 1.5), (6, -100.0)), frozenset([9]), 2)
    options = {"stream_options": {"include_usage": True}}
    expected = Ask("bot", ("hi",), CompletionForm(n=2, include_usage=True), sampling, stream=True)
    assert completion(max_tokens=7, **options, **fields) == expected
    for limit in ("max_tokens", "max_completion_tokens"):
        ask = chat(**fields, **{limit: 7})
        assert (ask.sampling, ask.stream, ask.form) == (sampling, True, ChatForm(n=2))


def test_log_probabilities_and_forms_of_answers_arrive() -> None:
    assert completion(logprobs=0).sampling.logprobs == 0
    with_echo = completion(logprobs=3, echo=True)
    assert (with_echo.sampling.logprobs, with_echo.sampling.prompt_logprobs, with_echo.echo) == (3, 3, True)
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).sampling.logprobs == 4
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert chat(response_format={"type": "json_object"}).sampling.json_schema == '{"type": "object"}'
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert chat(response_format=named).sampling.json_schema == json.dumps(schema)
    assert completion(structured_outputs={"json": schema}).sampling.json_schema == json.dumps(schema)
    assert completion(structured_outputs={"regex": "a+"}).sampling.regex == "a+"


def test_a_prompt_alone() -> None:
    ask = completion(max_tokens=0, echo=True)
    assert (ask.is_prompt_alone, ask.sampling.max_tokens) == (True, 1)
    assert problem(parse_completion, COMPLETION | {"max_tokens": 0}).param == "max_tokens"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ("a",)), (["a"], ("a",)), ([1, 2], ((1, 2),)), ("", ("",)), (["a", "b"], ("a", "b")), ([[1], [2, 3]], ((1,), (2, 3)))],
)
def test_prompts(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).prompts == expected


@pytest.mark.parametrize("prompt", [[], [[]], [["a"]], [1, "a"], ["a", True], None, ["a"] * 129, [True], [-1], [1.5], {"a": 1}, 3, [2**63]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    assert problem(parse_completion, COMPLETION | {"prompt": prompt}).param == "prompt"


NEUTRAL = [("n", 1), ("presence_penalty", 0.0), ("frequency_penalty", 0), ("logit_bias", {}), ("logit_bias", None), ("user", "u")]


@pytest.mark.parametrize(("field", "value"), [*NEUTRAL, ("tools", []), ("response_format", {"type": "text"}), ("logprobs", False)])
def test_a_value_that_changes_nothing_is_accepted_in_a_chat(field: str, value: Any) -> None:
    assert chat(**{field: value}) == chat()


@pytest.mark.parametrize(("field", "value"), [*NEUTRAL, ("echo", False), ("best_of", 1), ("logprobs", None), ("suffix", None)])
def test_a_value_that_changes_nothing_is_accepted_in_a_completion(field: str, value: Any) -> None:
    assert completion(**{field: value}) == completion()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("store", True),
        ("store", 0),
        ("modalities", ["text", "audio"]),
        ("audio", {}),
        ("reasoning_effort", "low"),
        ("prediction", {"type": "content"}),
    ],
)
def test_what_is_not_served_is_refused_by_name(field: str, value: Any) -> None:
    found = problem(parse_chat, CHAT | {field: value})
    assert (found.param, found.code) == (field, "unsupported_value")
    assert f"`{field}`" in found.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("temperature", "1"),
        ("temperature", -0.1),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": True}),
        ("logprobs", 3),
        ("top_logprobs", 3),
        ("top_logprobs", 21),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 1e300),
        ("top_k", -1),
        ("min_p", 1.1),
        ("stop_token_ids", [-1]),
        ("tools", [1] * 129),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "absent"}}),
        ("response_format", "json"),
        ("top_p", 0),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", 2**63),
        ("seed", 2**63),
        ("stop", ["a"] * 17),
        ("stop", ""),
        ("stop", [1]),
        ("stream", 1),
        ("model", ""),
        ("model", None),
        ("user", 5),
        ("messages", []),
        ("messages", "hi"),
        ("stream_options", {"include_usage": True}),
    ],
)
def test_values_out_of_range_or_of_another_type_are_refused_by_name(field: str, value: Any) -> None:
    param = problem(parse_chat, CHAT | {field: value}).param
    assert param is not None
    assert param.partition("[")[0] == field


def test_an_unknown_field_names_the_nearest_one() -> None:
    found = problem(parse_chat, CHAT | {"temprature": 1})
    assert (found.param, found.code) == ("temprature", "unknown_field")
    assert found.message == "`temprature` is no field here; did you mean `temperature`?"
    assert "`stream`" in problem(parse_completion, COMPLETION | {"zzz": 1}).message
    assert problem(parse_completion, COMPLETION | {"messages": []}).param == "messages"
    nested = problem(parse_completion, COMPLETION | {"stream": True, "stream_options": {"include_usag": True}})
    assert nested.param == "stream_options.include_usag"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "poet", "content": "x"}, "messages[1].role"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "cache": 1}]}, "messages[1].content"),
        ({"role": "user", "content": []}, "messages[1].content"),
        ({"role": "user"}, "messages[1]"),
        ({"role": "tool", "content": "x"}, "messages[1]"),
        ({"role": "user", "content": "x", "tool_call_id": "c"}, "messages[1]"),
        ({"role": "user", "content": "x", "name": "ada"}, "messages[1]"),
        ({"role": "user", "content": "x", "audio": {"id": 1}}, "messages[1].audio"),
        (
            {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{"}}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}, "messages[1].tool_calls[0].function.arguments"),
        ({"role": "user", "content": "x", "contents": "y"}, "messages[1].contents"),
        ("hi", "messages[1]"),
    ],
)
def test_a_wrong_message_is_named_by_its_place(message: Any, param: str) -> None:
    assert problem(parse_chat, CHAT | {"messages": [*CHAT["messages"], message]}).param == param


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    turn = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": []}
    assert chat(messages=[turn]).prompts == (Chat((Message("assistant", "x"),)),)


def test_two_limits_must_agree() -> None:
    assert chat(max_tokens=5, max_completion_tokens=5).sampling.max_tokens == 5
    assert problem(parse_chat, CHAT | {"max_tokens": 5, "max_completion_tokens": 6}).param == "max_tokens"


HALF_A_PAIR = json.dumps(COMPLETION | {"\ud800": 1}).encode()


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"a": "\xed\xa0\x80"}', HALF_A_PAIR, b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    assert problem(parse_chat, body).code == "invalid_json"


def test_numbers_that_json_does_not_have_are_refused() -> None:
    assert problem(parse_chat, b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}').param == "temperature"
