"""Requests that are malformed, huge, slow or out of range: each gets its 4xx, in OpenAI's shape, over a real connection."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving.fakes import FakeBackend
from tests.serving.local import gateway_of, served
from tidepool.specs import GatewaySpec

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/tokenize")
MINIMAL: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tides", "prompt": "x"},
    "/v1/chat/completions": {"model": "tides", "messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {"model": "tides", "input": "x"},
    "/v1/embeddings": {"model": "tides", "input": "x"},
    "/tokenize": {"model": "tides", "prompt": "x"},
}


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"content-type": "application/json"}) as client:
        yield client


@pytest.fixture(scope="module")
def url(backend: FakeBackend) -> Iterator[str]:
    with served(gateway_of(backend, GatewaySpec(max_body_bytes=10_000, timeout_s=1.0)), log_level="error") as url:
        yield url


def post(client: httpx.Client, path: str, content: bytes) -> Any:
    response = client.post(path, content=content)
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"], error["param"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"model": "tides",}',
        b"\xff\xfe",
        b'{"model": "\xc3\x28"}',
        b'{"model": "\\ud800"}',
        b"[" * 5000,
    ],
)
def test_what_is_no_json_object_in_utf8(client: httpx.Client, backend: FakeBackend, path: str, content: bytes) -> None:
    assert post(client, path, content) == (400, "invalid_json", None)
    assert backend.calls == []


@pytest.mark.parametrize("path", PATHS)
def test_huge_bodies(client: httpx.Client, backend: FakeBackend, path: str) -> None:
    assert post(client, path, json.dumps(MINIMAL[path] | {"user": "x" * 10_000}).encode())[:2] == (413, "body_too_large")
    assert backend.calls == []


@pytest.mark.parametrize("path", PATHS)
def test_a_sender_that_is_too_slow(url: str, path: str) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
        connection.sendall(head.encode() + b'{"model": ')
        answered = connection.recv(65536)
    assert answered.startswith(b"HTTP/1.1 408 ")


NUMBERS: list[tuple[str, str, str]] = [
    (path, field, number)
    for path, fields in {
        "/v1/completions": ("max_tokens", "temperature", "top_p", "seed", "n", "presence_penalty", "logprobs", "top_k", "min_p"),
        "/v1/chat/completions": ("max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "frequency_penalty", "top_logprobs"),
        "/v1/responses": ("max_output_tokens", "temperature", "top_p"),
    }.items()
    for field in fields
    for number in ("NaN", "Infinity", "-Infinity", "-9223372036854775809", "1e999", "9" * 400, "true", '"1"', "[1]", "{}")
]


@pytest.mark.parametrize("path", sorted({path for path, _, _ in NUMBERS}))
def test_numbers_that_are_none_or_out_of_range_are_refused_by_name(client: httpx.Client, backend: FakeBackend, path: str) -> None:
    for one, field, number in NUMBERS:
        if one == path:
            content = json.dumps(MINIMAL[path])[:-1] + f', "{field}": {number}}}'
            status, code, param = post(client, path, content.encode())
            assert (status, code, param) == (400, "invalid_value", field), (field, number)
    assert backend.calls == []


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/completions", "suffix", "end"),
        ("/v1/completions", "best_of", 3),
        ("/v1/completions", "messages", []),
        ("/v1/responses", "store", True),
        ("/v1/responses", "previous_response_id", "resp_1"),
        ("/v1/responses", "conversation", "c"),
        ("/v1/responses", "background", True),
        ("/v1/responses", "tools", [{"type": "function"}]),
        ("/v1/responses", "reasoning", {"effort": "low"}),
        ("/v1/responses", "include", ["message.output_text.logprobs"]),
        ("/v1/responses", "n", 2),
        ("/v1/embeddings", "dimensions", 8),
        ("/v1/embeddings", "encoding_format", "int8"),
        ("/v1/embeddings", "input", []),
        ("/tokenize", "add_special_tokens", False),
    ],
)
def test_what_is_not_served_is_refused_by_name(client: httpx.Client, path: str, field: str, value: Any) -> None:
    status, code, param = post(client, path, json.dumps(MINIMAL[path] | {field: value}).encode())
    assert (status, param) == (400, field)
    assert code in ("unsupported_value", "unknown_field", "invalid_value")


def test_an_unknown_route_and_a_wrong_method_have_openais_shape(url: str) -> None:
    for method, path, status in (("GET", "/v1/images", 404), ("DELETE", "/v1/completions", 405), ("POST", "/v1/models", 405)):
        response = httpx.request(method, url + path)
        assert (response.status_code, response.json()["error"]["code"]) == (status, "unknown_url")
    assert httpx.get(f"{url}/v1/completions").headers["allow"] == "POST"
