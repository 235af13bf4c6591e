"""The real `openai` client against a real HTTP server on loopback: what our users' programs see."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import pytest
from openai import OpenAI

from tests.serving.fakes import FakeBackend, words
from tests.serving.local import gateway_of, served
from tidepool.errors import EngineBusyError
from tidepool.inference.engine import Output
from tidepool.serving.backend import Started


@contextmanager
def client_of(backend: FakeBackend) -> Iterator[OpenAI]:
    with (
        served(gateway_of(backend), log_level="error") as url,
        OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=20) as client,
    ):
        yield client


def test_both_endpoints_streamed_and_not() -> None:
    with client_of(FakeBackend(*words("Grüß", " ", "🌊"))) as client:
        chat = client.chat.completions.create(model="bot", messages=[{"role": "user", "content": "hi"}])
        assert chat.choices[0].message.content == "Grüß 🌊"
        assert chat.usage is not None
        assert (chat.usage.prompt_tokens, chat.usage.completion_tokens, chat.usage.total_tokens) == (5, 3, 8)
        assert chat.system_fingerprint is not None
        assert chat.system_fingerprint.startswith("bot@1-")

        completion = client.completions.create(model="tides", prompt="hi", max_tokens=3)
        assert (completion.choices[0].text, completion.choices[0].finish_reason) == ("Grüß 🌊", "stop")

        chunks = list(
            client.chat.completions.create(
                model="bot", messages=[{"role": "user", "content": "hi"}], stream=True, stream_options={"include_usage": True}
            )
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Grüß 🌊"
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 8

        pieces = [chunk.choices[0] for chunk in client.completions.create(model="tides", prompt=[1, 2], stream=True)]
        assert "".join(piece.text for piece in pieces) == "Grüß 🌊"
        assert pieces[-1].finish_reason == "stop"


def test_models() -> None:
    with client_of(FakeBackend()) as client:
        assert [model.id for model in client.models.list()] == ["tides", "bot"]
        assert client.models.retrieve("bot").owned_by == "tidepool"


def test_errors_are_the_clients_own() -> None:
    with client_of(FakeBackend()) as client:
        with pytest.raises(openai.NotFoundError, match="did you mean tides") as missing:
            client.completions.create(model="tide", prompt="hi")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="`n`: Input should be less than or equal to 128") as wrong:
            client.completions.create(model="tides", prompt="hi", n=200)
        assert wrong.value.param == "n"
    with client_of(FakeBackend(EngineBusyError("full"))) as client, pytest.raises(openai.RateLimitError) as busy:
        client.completions.create(model="tides", prompt="hi")
    assert busy.value.response.headers["retry-after"] == "1"


def test_a_stream_that_fails_raises_in_the_client() -> None:
    with (
        client_of(FakeBackend(Started(1), Output((1,), "a"), KeyError("secret"))) as client,
        pytest.raises(openai.APIError, match="The server failed on this request"),
    ):
        list(client.completions.create(model="tides", prompt="hi", stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_closing_the_connection_cancels_the_request(stream: bool) -> None:
    closed = threading.Event()

    class Backend(FakeBackend):
        async def generate(self, call):  # type: ignore[no-untyped-def]
            try:
                async for frame in super().generate(call):
                    yield frame
            finally:
                closed.set()

    backend = Backend(Started(1), Output((1,), "a"), asyncio.Event())
    with client_of(backend) as client:
        if stream:
            answer = client.completions.create(model="tides", prompt="hi", stream=True)
            assert next(iter(answer)).choices[0].text == "a"
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.5).completions.create(model="tides", prompt="hi")
        assert closed.wait(10)
