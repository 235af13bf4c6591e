"""The gateway's HTTP: OpenAI's shapes, statuses and events, and clients that leave."""

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from tests.serving.fakes import BASE_DIGEST, FakeBackend, adapter, full, words
from tidepool.errors import ClusterError, EngineBusyError, ModelError, RegistryError, RequestError, StoreUnreachableError
from tidepool.inference.engine import Output, TokenLogprobs
from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.registry import Meaning
from tidepool.serving import gateway as gateway_module
from tidepool.serving.api.ask import Ask
from tidepool.serving.backend import Call, Chat, ContextLengthError, Message, Spelling, Started
from tidepool.serving.gateway import build_gateway
from tidepool.serving.problem import Problem, Refusal
from tidepool.serving.resolver import Resolver
from tidepool.specs import GatewaySpec

CHAT = {"model": "bot", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "tides", "prompt": "hi", "max_tokens": 4}


def lookup(ref: str) -> Meaning:
    if ref == "bot@7":
        raise StoreUnreachableError("file:///secret/place does not answer")
    raise RegistryError(f"No version like {ref}.")


def gateway(backend: FakeBackend) -> Starlette:
    return build_gateway(Resolver(lookup, {"tides": full(), "bot": adapter()}, {BASE_DIGEST}, ttl_s=60), backend)


def ask(backend: FakeBackend, method: str, path: str, **request: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(gateway(backend))
        async with httpx.AsyncClient(transport=transport, base_url="http://tidepool") as client:
            return await client.request(method, path, **request)

    return asyncio.run(run())


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    lines = response.text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_whole_chat() -> None:
    backend = FakeBackend()
    body = ask(backend, "POST", "/v1/chat/completions", json=CHAT | {"temperature": 0.5, "seed": 3, "stop": "x"}).json()
    assert body.pop("id") == backend.calls[0].request_id
    assert body.pop("created") > 0
    message = {"role": "assistant", "content": "Hello!", "refusal": None}
    assert body == {
        "object": "chat.completion",
        "model": "bot",
        "system_fingerprint": f"bot@1-{adapter().digest[:12]}",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    }
    call = backend.calls[0]
    assert (call.base_digest, call.adapter, call.prompt) == (BASE_DIGEST, adapter(), Chat((Message("user", "hi"),)))
    assert call.sampling == SamplingParameters(temperature=0.5, seed=3, stop=("x",))
    assert backend.closed == [call.request_id]


def test_a_whole_completion_of_the_base() -> None:
    backend = FakeBackend(*words("a", "", "b", finish_reason="length"))
    body = ask(backend, "POST", "/v1/completions", json=COMPLETION).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": "length"}]
    assert body["usage"]["completion_tokens"] == 3
    assert (backend.calls[0].adapter, backend.calls[0].sampling.max_tokens, backend.calls[0].prompt) == (None, 4, "hi")


def test_a_streamed_chat_with_usage() -> None:
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, done = events(ask(FakeBackend(), "POST", "/v1/chat/completions", json=CHAT | stream))
    assert done == "data: [DONE]"
    assert {(chunk["object"], chunk["model"], chunk["id"]) for chunk in chunks} == {("chat.completion.chunk", "bot", last["id"])}
    assert [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"], chunk["usage"]) for chunk in chunks] == [
        ({"role": "assistant", "content": ""}, None, None),
        ({"content": "Hel"}, None, None),
        ({"content": "lo"}, None, None),
        ({"content": "!"}, None, None),
        ({}, "stop", None),
    ]
    assert (last["choices"], last["usage"]) == ([], {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8})


def test_a_streamed_completion_without_usage() -> None:
    *chunks, done = events(ask(FakeBackend(), "POST", "/v1/completions", json=COMPLETION | {"stream": True}))
    assert done == "data: [DONE]"
    assert [(chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"]) for chunk in chunks] == [
        ("Hel", None),
        ("lo", None),
        ("!", None),
        ("", "stop"),
    ]
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "retry_after"),
    [
        (RequestError("bad token"), 400, "invalid_request_error", None, None),
        (ContextLengthError("too long"), 400, "invalid_request_error", "context_length_exceeded", None),
        (EngineBusyError("full"), 429, "rate_limit_error", "engine_busy", "1"),
        (ClusterError("replica gone"), 503, "server_error", "unavailable", "5"),
        (ModelError("secret path"), 503, "server_error", "unavailable", "5"),
        (StoreUnreachableError("secret place"), 503, "server_error", "unavailable", "5"),
        (KeyError("secret"), 500, "server_error", "internal_error", None),
        (TimeoutError("secret"), 500, "server_error", "internal_error", None),  # somebody else's, not the deadline
    ],
)
def test_what_fails_before_the_engine_takes_a_request_has_its_status(
    error: Exception, status: int, kind: str, code: str | None, retry_after: str | None, stream: bool
) -> None:
    backend = FakeBackend(error)
    response = ask(backend, "POST", "/v1/completions", json=COMPLETION | {"stream": stream})
    assert response.status_code == status
    found = response.json()["error"]
    assert (found["type"], found["code"]) == (kind, code)
    assert response.headers.get("retry-after") == retry_after
    assert "secret" not in response.text
    assert len(backend.closed) == 1


def test_an_inner_error_leaves_in_the_log_where_it_was_raised_and_not_what_it_says(caplog: pytest.LogCaptureFixture) -> None:
    error = ValueError("about the prompt")
    error.__cause__ = KeyError("secret")
    with caplog.at_level(logging.ERROR, "tidepool"):
        ask(FakeBackend(error), "POST", "/v1/completions", json=COMPLETION)
    assert "ValueError" in caplog.text
    assert "fakes.py" in caplog.text
    assert "caused by KeyError" in caplog.text
    assert "secret" not in caplog.text
    assert "prompt" not in caplog.text


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([Started(1), Output((1,), "a"), ClusterError("gone")], "unavailable"),
        ([Started(1), Output((1,), "a"), KeyError("secret")], "internal_error"),
        ([Started(1), Output((1,), "a"), Output((), "", "cancelled")], "unavailable"),
        ([Started(1), Output((1,), "a")], "unavailable"),
    ],
)
def test_what_fails_in_a_stream_is_its_last_event(frames: list[Any], code: str) -> None:
    response = ask(FakeBackend(*frames), "POST", "/v1/completions", json=COMPLETION | {"stream": True})
    first, last = events(response)
    assert first["choices"][0]["text"] == "a"
    assert last["error"]["code"] == code
    assert "secret" not in response.text
    whole = ask(FakeBackend(*frames), "POST", "/v1/completions", json=COMPLETION)
    assert (whole.status_code, whole.json()["error"]["code"]) == (500 if code == "internal_error" else 503, code)


@pytest.mark.parametrize(
    ("model", "status", "code", "words_in_message"),
    [
        ("bots", 404, "model_not_found", "did you mean bot?"),
        ("bot@9", 404, "model_not_found", "No version"),
        ("bot@7", 503, "unavailable", "try again"),
    ],
)
def test_models_that_cannot_be_resolved(model: str, status: int, code: str, words_in_message: str) -> None:
    for response in (
        ask(FakeBackend(), "POST", "/v1/completions", json=COMPLETION | {"model": model}),
        ask(FakeBackend(), "GET", f"/v1/models/{model}"),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert words_in_message in response.json()["error"]["message"]
        assert "secret" not in response.text


def test_the_models_are_listed_with_their_versions() -> None:
    body = ask(FakeBackend(), "GET", "/v1/models").json()
    common = {"object": "model", "created": 1793613600, "owned_by": "tidepool"}
    of_base = {"version": 1, "digest": BASE_DIGEST, "kind": "full", "base": None, "base_digest": None, "lineage": {}}
    of_bot = {"version": 1, "digest": adapter().digest, "kind": "adapter", "base": "tides@1", "base_digest": BASE_DIGEST, "lineage": {}}
    assert body == {
        "object": "list",
        "data": [
            {"id": "tides", "root": "tides@1", "parent": None, **of_base, **common},
            {"id": "bot", "root": "bot@1", "parent": "tides@1", **of_bot, **common},
        ],
    }
    assert ask(FakeBackend(), "GET", "/v1/models/bot").json() == body["data"][1]


def test_a_wrong_request_never_reaches_the_backend() -> None:
    backend = FakeBackend()
    refused = ask(backend, "POST", "/v1/chat/completions", json=CHAT | {"functions": [1]})
    assert refused.status_code == 400
    assert refused.json()["error"] == {
        "message": "`functions` is not supported with this value: leave it out, or give [].",
        "type": "invalid_request_error",
        "param": "functions",
        "code": "unsupported_value",
    }
    assert ask(backend, "POST", "/v1/chat/completions", content=b"{").json()["error"]["code"] == "invalid_json"
    large = ask(backend, "POST", "/v1/completions", content=b" " * (GatewaySpec().max_body_bytes + 1))
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    assert backend.calls == []


def test_health_and_unknown_routes() -> None:
    assert ask(FakeBackend(), "GET", "/health").status_code == 200
    for method, path, status in (("GET", "/v1/images", 404), ("GET", "/v1/completions", 405)):
        response = ask(FakeBackend(), method, path)
        assert response.status_code == status
        assert "/v1/chat/completions" in response.json()["error"]["message"]


def test_a_large_body_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    is_parsing, others_are_answered = threading.Event(), threading.Event()
    was_in_time = []

    def parse(_: bytes) -> Ask:
        is_parsing.set()
        was_in_time.append(others_are_answered.wait(10))
        raise Refusal(Problem(400, "No.", "invalid_json"))

    monkeypatch.setitem(gateway_module._PARSERS, "/v1/completions", parse)

    async def run() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway(FakeBackend())), base_url="http://tidepool") as client:
            large = asyncio.create_task(client.post("/v1/completions", content=b" " * 100_000))
            while not is_parsing.is_set():
                await asyncio.sleep(0)
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
            others_are_answered.set()
            return (await large).status_code

    assert (asyncio.run(run()), was_in_time) == (400, [True])


# --- Clients that leave ----------------------------------------------------------------------------------------------


async def _call_and_leave(app: Starlette, body: dict[str, Any], until: Callable[[], Awaitable[Any]]) -> list[dict[str, Any]]:
    """Send a request by ASGI and close the connection once `until` returns; returns what was sent to the client."""
    sent: list[dict[str, Any]] = []
    content: list[dict[str, Any]] = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if content:
            return content.pop()
        await until()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [],
    }
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_frames", [0, 1, 2])
def test_a_client_that_leaves_cancels_its_request(stream: bool, num_frames: int) -> None:
    async def run() -> None:
        backend = FakeBackend(*[Started(1), Output((1,), "a")][:num_frames], asyncio.Event(), *words("never"))
        sent = await asyncio.wait_for(_call_and_leave(gateway(backend), COMPLETION | {"stream": stream}, backend.waiting.wait), 10)
        assert backend.closed == [backend.calls[0].request_id]
        assert b"[DONE]" not in b"".join(message.get("body", b"") for message in sent)

    asyncio.run(run())


def test_a_client_that_reads_no_more_and_leaves_cancels_its_request() -> None:
    async def run() -> None:
        backend, stuck = FakeBackend(), asyncio.Event()

        async def send(message: Any) -> None:
            if message.get("body"):
                stuck.set()
                await asyncio.Event().wait()

        content = [{"type": "http.request", "body": json.dumps(COMPLETION | {"stream": True}).encode(), "more_body": False}]

        async def receive() -> dict[str, Any]:
            if content:
                return content.pop()
            await stuck.wait()
            return {"type": "http.disconnect"}

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        await asyncio.wait_for(gateway(backend)(scope, receive, send), 10)
        assert backend.closed == [backend.calls[0].request_id]

    asyncio.run(run())


# --- Several answers and several prompts -----------------------------------------------------------------------------


def logprobs_of(token: int, logprob: float = -0.5) -> TokenLogprobs:
    return TokenLogprobs(token, logprob, ((token, logprob), (9, -3.0)))


def test_the_prompts_log_probabilities_come_first_in_each_answer_whichever_answer_comes_first() -> None:
    spelled = Spelling({1: b"Hi", 2: b" \xe2\x82", 3: b"\xac", 4: b"<end>", 9: b"?"}, special=frozenset([4]))
    frames = [
        Started(2, (4, 1), "Hi"),
        spelled,
        Output((2,), "", None, 1, (logprobs_of(2),)),
        Output((3,), " €", "stop", 1, (logprobs_of(3),)),
        Output((9,), "?", "length", 0, (logprobs_of(9),), (None, logprobs_of(1, -0.25))),
    ]
    body = {"model": "tides", "prompt": "Hi", "n": 2, "echo": True, "logprobs": 2}
    answer = ask(FakeBackend(*frames), "POST", "/v1/completions", json=body).json()
    first, second = answer["choices"]
    assert (first["text"], first["finish_reason"], second["text"], second["finish_reason"]) == ("Hi?", "length", "Hi €", "stop")
    assert second["logprobs"] == {
        "tokens": ["<end>", "Hi", "bytes:\\x20\\xe2\\x82", "bytes:\\xac"],
        "token_logprobs": [None, -0.25, -0.5, -0.5],
        "top_logprobs": [None, {"Hi": -0.25, "?": -3.0}, {"bytes:\\x20\\xe2\\x82": -0.5, "?": -3.0}, {"bytes:\\xac": -0.5, "?": -3.0}],
        "text_offset": [0, 0, 2, 3],
    }
    assert first["logprobs"]["tokens"] == ["<end>", "Hi", "?"]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}

    *chunks, done = events(ask(FakeBackend(*frames), "POST", "/v1/completions", json=body | {"stream": True}))
    assert done == "data: [DONE]"
    parts = [chunk["choices"][0] for chunk in chunks]
    for choice in (first, second):
        own = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [name for part in own if part["logprobs"] for name in part["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]
        assert [part["finish_reason"] for part in own][-1] == choice["finish_reason"]


class ByPrompt(FakeBackend):
    """Answers each prompt with frames of its own."""

    def __init__(self, **frames: list[Any]) -> None:
        super().__init__()
        self._of_prompt = frames

    async def generate(self, call: Call) -> Any:
        stand_in = FakeBackend(*self._of_prompt[str(call.prompt)])
        self.calls.append(call)
        try:
            async for frame in stand_in.generate(call):
                yield frame
        finally:
            self.closed.append(call.request_id)


@pytest.mark.parametrize("stream", [False, True])
def test_one_prompt_that_fails_ends_the_others(stream: bool) -> None:
    backend = ByPrompt(good=[Started(1), Output((1,), "a"), asyncio.Event()], bad=[RequestError("bad token")], never=[asyncio.Event()])
    body = {"model": "tides", "prompt": ["good", "bad", "never"], "stream": stream}
    response = ask(backend, "POST", "/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["message"]) == (400, "bad token")
    assert sorted(backend.closed) == sorted(call.request_id for call in backend.calls)
    assert len(backend.calls) == 3


def test_each_answer_ends_at_the_most_that_the_spec_allows_and_its_tokens_are_counted_once() -> None:
    one, other = ([Output((index,), f"{name}{index}", None, number) for index in range(5)] for number, name in enumerate("ab"))
    ends = [Output((9,), "!", "stop", number) for number in range(2)]
    frames = [Started(1), *(frame for pair in zip(one, other, strict=True) for frame in pair), *ends]
    app = build_gateway(Resolver(lookup, {"tides": full()}, {BASE_DIGEST}, ttl_s=60), FakeBackend(*frames), GatewaySpec(max_new_tokens=3))

    async def run() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tidepool") as client:
            body = {"model": "tides", "messages": [{"role": "user", "content": "hi"}], "n": 2}
            return (await client.post("/v1/chat/completions", json=body)).json()

    answer = asyncio.run(run())
    told = [(choice["message"]["content"], choice["finish_reason"]) for choice in answer["choices"]]
    assert told == [("a0a1a2", "length"), ("b0b1b2", "length")]
    assert answer["usage"]["completion_tokens"] == 6


# --- Readiness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "status"),
    [([Started(0)], 200), ([EngineBusyError("full")], 200), ([ClusterError("gone")], 503), ([ModelError("broken")], 503)],
)
def test_a_gateway_is_ready_when_its_replicas_answer(frames: list[Any], status: int) -> None:
    backend = FakeBackend(*frames)
    assert ask(backend, "GET", "/ready").status_code == status
    assert [(call.base_digest, call.task, call.prompt) for call in backend.calls] == [(BASE_DIGEST, "tokenize", "")]
    assert backend.closed == [backend.calls[0].request_id]
    assert ask(FakeBackend(ClusterError("gone")), "GET", "/health").status_code == 200


def test_those_who_ask_at_one_time_whether_it_is_ready_ask_the_replicas_once() -> None:
    async def run() -> None:
        backend = FakeBackend(asyncio.Event(), Started(0))
        app = gateway(backend)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tidepool") as client:
            asked = [asyncio.ensure_future(client.get("/ready")) for _ in range(5)]
            await backend.waiting.wait()
            (gate,) = [frame for frame in backend.frames if isinstance(frame, asyncio.Event)]
            gate.set()
            assert {response.status_code for response in await asyncio.gather(*asked)} == {200}
            assert len(backend.calls) == 1

    asyncio.run(run())
