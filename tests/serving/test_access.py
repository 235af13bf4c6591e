"""Access by keys, through the gateway's HTTP: statuses, scopes, limits, deadlines, revocation, and what stays out of the logs."""

import asyncio
import json
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray.serve._private.http_util import start_asgi_http_server
from ray.serve.config import HTTPOptions
from ray.serve.schema import ServeDeploySchema
from starlette.applications import Starlette

from tests.certificates import Authority
from tests.serving.fakes import BASE_DIGEST, FakeBackend, adapter, full, words
from tests.serving.local import served
from tidepool.errors import RegistryError, SpecError, StoreUnreachableError
from tidepool.inference.engine import Output
from tidepool.registry import Meaning
from tidepool.serving.access import check_address
from tidepool.serving.backend import Started
from tidepool.serving.gateway import build_gateway
from tidepool.serving.keys import KeyLog, KeyRing
from tidepool.serving.limits import Limits
from tidepool.serving.resolver import Resolver
from tidepool.specs import GatewaySpec
from tidepool.storage import LogEntry, open_store

ROOT = Path(__file__).resolve().parents[2]
COMPLETION = {"model": "tides", "prompt": "hi", "max_tokens": 4}


def lookup(ref: str) -> Meaning:
    raise RegistryError(f"No version like {ref}.")


def gateway(backend: FakeBackend, spec: GatewaySpec | None = None, log: KeyLog | None = None) -> Starlette:
    """A gateway of `tides` and `bot`; with a log of keys it requires them."""
    resolver = Resolver(lookup, {"tides": full(), "bot": adapter()}, {BASE_DIGEST}, ttl_s=60)
    spec = (spec or GatewaySpec()).model_copy(update={"require_keys": log is not None})
    return build_gateway(resolver, backend, spec, KeyRing(log.read_after, spec.keys_max_age_s) if log else None)


@asynccontextmanager
async def client_of(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tidepool") as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work, 30)

    asyncio.run(bounded())


def problem(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return response.status_code, error["type"], error["code"]


@pytest.fixture
def log(store_url: str) -> KeyLog:
    return KeyLog(open_store(store_url))


# --- Who comes in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer any", "Basic dGlkZTpwb29s", "tp-000000000000-x", "Bearer \xe9"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/bot"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/admin/keys"),
    ],
)
def test_without_a_valid_key_nobody_comes_in(header: str | None, method: str, path: str, log: KeyLog) -> None:
    async def work() -> None:
        log.create("one")
        backend = FakeBackend()
        async with client_of(gateway(backend, log=log)) as client:
            headers = {} if header is None else {"Authorization": header.encode("latin-1")}
            response = await client.request(method, path, headers=headers, content=b"not even read")
            assert problem(response) == (401, "invalid_request_error", "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
            assert (await client.get("/health")).status_code == 200, "a probe has no key"
        assert backend.calls == []

    run(work())


def test_a_key_comes_in_and_a_revoked_one_does_not(log: KeyLog) -> None:
    async def work() -> None:
        key, secret = log.create("one")
        async with client_of(gateway(FakeBackend(), log=log)) as client:
            assert (await client.post("/v1/completions", json=COMPLETION, headers=bearer(secret))).status_code == 200
            assert (await client.get("/v1/models", headers={"authorization": f"bearer  {secret} "})).status_code == 200
            log.revoke(key.id)
        async with client_of(gateway(FakeBackend(), log=log)) as client:
            response = await client.post("/v1/completions", json=COMPLETION, headers=bearer(secret))
            assert problem(response) == (401, "invalid_request_error", "invalid_api_key")
            assert "has been revoked" in response.text

    run(work())


def test_a_revocation_counts_within_two_seconds_at_every_gateway(shared_store_url: str) -> None:
    async def work() -> None:
        writer = KeyLog(open_store(shared_store_url))
        key, secret = writer.create("one")
        stuck = FakeBackend(Started(1), *[Output((1,), "a")] * 3, asyncio.Event(), Output((1,), "b"), *words("never"))
        apps = [gateway(stuck, log=KeyLog(open_store(shared_store_url))), gateway(FakeBackend(), log=KeyLog(open_store(shared_store_url)))]
        async with client_of(apps[0]) as first, client_of(apps[1]) as second:
            streamed = asyncio.create_task(first.post("/v1/completions", json=COMPLETION | {"stream": True}, headers=bearer(secret)))
            await stuck.waiting.wait()
            assert (await second.get("/v1/models", headers=bearer(secret))).status_code == 200
            writer.revoke(key.id)
            revoked_at = time.monotonic()
            for client in (first, second):
                while (await client.get("/v1/models", headers=bearer(secret))).status_code == 200:
                    await asyncio.sleep(0.02)
            assert time.monotonic() - revoked_at < 2
            stuck.frames[4].set()  # type: ignore[union-attr]
            assert json.loads((await streamed).text.strip().rpartition("data: ")[2])["error"]["code"] == "invalid_api_key"
        assert stuck.closed == [stuck.calls[0].request_id], "what ran was ended at its next token"

    run(work())


def test_while_keys_cannot_be_known_nobody_comes_in() -> None:
    class Away(KeyLog):
        def read_after(self, number: int) -> list[LogEntry]:
            raise StoreUnreachableError("s3://secret-place does not answer")

    async def work() -> None:
        async with client_of(gateway(FakeBackend(), log=Away(open_store("memory://nothing")))) as client:
            response = await client.get("/v1/models", headers=bearer("any"))
            assert problem(response) == (503, "server_error", "unavailable")
            assert response.headers["retry-after"] == "5"
            assert "secret-place" not in response.text

    run(work())


# --- Scopes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tides", "tides@1", "nothing", "bots", "bot@9", "x" * 199])
def test_a_key_learns_nothing_of_models_outside_its_scope(model: str, log: KeyLog) -> None:
    async def work() -> None:
        _, secret = log.create("one", models=["bot"])
        backend = FakeBackend()
        async with client_of(gateway(backend, log=log)) as client:
            asked = await client.post("/v1/completions", json=COMPLETION | {"model": model}, headers=bearer(secret))
            for response in (asked, await client.get(f"/v1/models/{model}", headers=bearer(secret))):
                assert problem(response) == (404, "invalid_request_error", "model_not_found")
                assert response.json()["error"]["message"] == f"There is no model {model!r} for this key; its models: bot."
        assert backend.calls == []

    run(work())


def test_the_models_of_a_scope(log: KeyLog) -> None:
    async def work() -> None:
        _, secret = log.create("one", models=["bot"])
        async with client_of(gateway(FakeBackend(), log=log)) as client:
            listed = (await client.get("/v1/models", headers=bearer(secret))).json()["data"]
            assert [model["id"] for model in listed] == ["bot"]
            assert (await client.get("/v1/models/bot", headers=bearer(secret))).status_code == 200
            asked = await client.post("/v1/completions", json=COMPLETION | {"model": "bot"}, headers=bearer(secret))
            assert asked.status_code == 200

    run(work())


def test_an_admin_sees_the_keys_and_their_use_and_others_do_not(log: KeyLog) -> None:
    async def work() -> None:
        admin, admin_secret = log.create("boss", is_admin=True)
        key, secret = log.create("one", "research", ["bot"], limits=Limits(concurrent_requests=2))
        backend = FakeBackend(Started(1), asyncio.Event(), *words("late")[1:])
        async with client_of(gateway(backend, log=log)) as client:
            assert problem(await client.get("/admin/keys", headers=bearer(secret))) == (403, "invalid_request_error", "admin_key_needed")
            asked = asyncio.create_task(client.post("/v1/completions", json=COMPLETION | {"model": "bot"}, headers=bearer(secret)))
            await backend.waiting.wait()
            response = await client.get("/admin/keys", headers=bearer(admin_secret))
            assert [(one["id"], one["name"], one["project"], one["running"]) for one in response.json()["data"]] == [
                (admin.id, "boss", None, 0),
                (key.id, "one", "research", 1),
            ]
            assert key.sha256 not in response.text
            backend.frames[1].set()  # type: ignore[union-attr]
            assert (await asked).status_code == 200
            assert (await client.get("/admin/keys", headers=bearer(admin_secret))).json()["data"][1]["running"] == 0
        async with client_of(gateway(FakeBackend())) as client:
            assert problem(await client.get("/admin/keys")) == (403, "invalid_request_error", "admin_key_needed")

    run(work())


# --- Limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "code", "most_s"),
    [
        (Limits(requests_per_minute=2), "requests_per_minute", 30),
        (Limits(tokens_per_minute=16), "tokens_per_minute", 4),  # each request uses 8, and one must be there
    ],
)
def test_limits_per_minute(limits: Limits, code: str, most_s: int, log: KeyLog) -> None:
    async def work() -> None:
        _, secret = log.create("one", limits=limits)
        _, other = log.create("two")
        backend = FakeBackend()
        async with client_of(gateway(backend, log=log)) as client:
            for stream in (False, True):
                asked = await client.post("/v1/completions", json=COMPLETION | {"stream": stream}, headers=bearer(secret))
                assert asked.status_code == 200
            response = await client.post("/v1/completions", json=COMPLETION, headers=bearer(secret))
            assert problem(response) == (429, "rate_limit_error", code)
            assert most_s - 2 <= int(response.headers["retry-after"]) <= most_s
            assert (await client.post("/v1/completions", json=COMPLETION, headers=bearer(other))).status_code == 200, "others go on"
        assert len(backend.calls) == 3
        assert backend.calls[0].client == backend.calls[1].client != backend.calls[2].client, "the engine is fair between keys"

    run(work())


@pytest.mark.parametrize(("stream", "ending"), [(False, "whole"), (True, "whole"), (False, "fails"), (True, "fails"), (False, "refused")])
def test_requests_at_one_time_are_counted_until_they_end_however_they_do(stream: bool, ending: str, log: KeyLog) -> None:
    async def work() -> None:
        _, secret = log.create("one", limits=Limits(concurrent_requests=1))
        last = KeyError("secret") if ending == "fails" else Output((2,), "b", "stop")
        backend = FakeBackend(Started(1), Output((1,), "a"), asyncio.Event(), last)
        body = COMPLETION | {"stream": stream} | ({"n": 200} if ending == "refused" else {})
        async with client_of(gateway(backend, log=log)) as client:
            for _ in range(3):
                backend.waiting.clear()
                asked = asyncio.create_task(client.post("/v1/completions", json=body, headers=bearer(secret)))
                if ending != "refused":
                    await backend.waiting.wait()
                    second = await client.post("/v1/completions", json=COMPLETION, headers=bearer(secret))
                    assert problem(second) == (429, "rate_limit_error", "concurrent_requests")
                    assert second.headers["retry-after"] == "1"
                    backend.frames[2].set()  # type: ignore[union-attr]
                assert (await asked).status_code in (200, 400, 500)
                backend.frames = [*backend.frames[:2], asyncio.Event(), last]

    run(work())


def test_a_full_gateway_says_so() -> None:
    async def work() -> None:
        backend = FakeBackend(Started(1), asyncio.Event(), *words("late")[1:])
        async with client_of(gateway(backend, GatewaySpec(max_requests=1))) as client:
            asked = asyncio.create_task(client.post("/v1/completions", json=COMPLETION))
            await backend.waiting.wait()
            response = await client.post("/v1/completions", json=COMPLETION)
            assert problem(response) == (429, "rate_limit_error", "gateway_busy")
            assert response.headers["retry-after"] == "1"
            backend.frames[1].set()  # type: ignore[union-attr]
            assert (await asked).status_code == 200
            assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200

    run(work())


def test_more_tokens_than_are_allowed_are_refused_and_an_open_end_is_cut() -> None:
    async def work() -> None:
        backend = FakeBackend(*words("a", "b", "c", "d"))
        chat = {"model": "bot", "messages": [{"role": "user", "content": "hi"}]}
        async with client_of(gateway(backend, GatewaySpec(max_new_tokens=3))) as client:
            refused = await client.post("/v1/chat/completions", json=chat | {"max_tokens": 4})
            assert problem(refused) == (400, "invalid_request_error", "max_tokens_too_large")
            assert "At most 3 tokens" in refused.text
            assert backend.calls == []
            body = (await client.post("/v1/chat/completions", json=chat)).json()
            assert (body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"]) == ("abc", "length")
            assert body["usage"]["completion_tokens"] == 3
            assert backend.closed == [backend.calls[0].request_id], "the engine stops"
            streamed = await client.post("/v1/chat/completions", json=chat | {"stream": True})
            assert '"finish_reason":"length"' in streamed.text
            assert streamed.text.endswith("data: [DONE]\n\n")

    run(work())


def test_a_large_body_is_refused_as_the_configuration_says() -> None:
    async def work() -> None:
        async with client_of(gateway(FakeBackend(), GatewaySpec(max_body_bytes=50))) as client:
            response = await client.post("/v1/completions", content=b" " * 51)
            assert problem(response) == (413, "invalid_request_error", "body_too_large")

    run(work())


# --- Deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [0, 1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_cancelled_and_the_client_told(stream: bool, num_frames: int) -> None:
    async def work() -> None:
        backend = FakeBackend(*[Started(1), Output((1,), "a")][:num_frames], asyncio.Event(), *words("never"))
        async with client_of(gateway(backend, GatewaySpec(timeout_s=0.2))) as client:
            response = await client.post("/v1/completions", json=COMPLETION | {"stream": stream})
        if stream and num_frames:
            assert response.status_code == 200
            error = json.loads(response.text.strip().rpartition("data: ")[2])["error"]
            assert (error["type"], error["code"]) == ("server_error", "timeout")
            assert "[DONE]" not in response.text
        else:
            assert problem(response) == (504, "server_error", "timeout")
        assert "not complete after 0.2 s" in response.text
        assert backend.closed == [backend.calls[0].request_id]

    run(work())


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def work() -> None:
        async def slowly() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        backend = FakeBackend()
        async with client_of(gateway(backend, GatewaySpec(timeout_s=0.2, max_requests=1))) as client:
            for _ in range(2):
                response = await client.post("/v1/completions", content=slowly())
                assert problem(response) == (408, "invalid_request_error", "request_timeout")
        assert backend.calls == []

    run(work())


def test_a_client_that_reads_no_more_is_cut_off_at_the_deadline() -> None:
    async def work() -> None:
        async def receive() -> dict[str, Any]:
            if content:
                return content.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            if message.get("body"):
                await asyncio.Event().wait()

        content = [{"type": "http.request", "body": json.dumps(COMPLETION | {"stream": True}).encode(), "more_body": False}]
        backend = FakeBackend()
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        await gateway(backend, GatewaySpec(timeout_s=0.2))(scope, receive, send)
        assert backend.closed == [backend.calls[0].request_id]

    run(work())


# --- Where it listens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", None])
def test_loopback_needs_no_keys(host: str | None) -> None:
    check_address(host, GatewaySpec())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "192.168.1.1", "gpu-7", "", "127.0.0.1.example.org"])
def test_any_other_address_needs_keys(host: str) -> None:
    check_address(host, GatewaySpec(require_keys=True))
    with pytest.raises(SpecError, match=r"ask nobody for a key.*require_keys: true.*tidepool keys create.*host: 127.0.0.1"):
        check_address(host, GatewaySpec())


# --- What stays out of the logs --------------------------------------------------------------------------------------


def test_no_prompt_answer_or_key_is_logged(log: KeyLog, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    key, secret = log.create("one", limits=Limits(requests_per_minute=100))
    other, revoked = log.create("two")
    log.revoke(other.id)
    secrets = [text.removeprefix(f"tp-{of.id}-")[:20] for of, text in ((key, secret), (other, revoked))]
    planted = ("SHIBBOLETH", "OPEN-SESAME", *secrets, key.sha256)

    class Quoting(FakeBackend):
        """Raises what quotes the prompt, as a library may."""

        async def generate(self, call: Any) -> Any:
            async for frame in super().generate(call):
                if isinstance(frame, Output) and frame.finish_reason and call.sampling.temperature == 0:
                    raise ValueError(f"cannot handle {call.prompt!r} and {frame.text!r}") from KeyError(call.prompt)
                yield frame

    prompt = {"model": "tides", "prompt": "SHIBBOLETH", "max_tokens": 4}
    bodies: list[Any] = [prompt | {"stream": stream, "temperature": warm} for stream in (False, True) for warm in (0, 1)]
    bodies += [prompt | {"n": "SHIBBOLETH"}, prompt | {"model": "SHIBBOLETH"}, prompt | {"prompt": {"SHIBBOLETH": 1}}]
    statuses = []
    with (
        caplog.at_level(logging.DEBUG),
        served(gateway(Quoting(*words("OPEN", "OPEN-SESAME")), log=log), log_level="debug", access_log=True) as url,
    ):
        for body in bodies:
            statuses.append(httpx.post(f"{url}/v1/completions", json=body, headers=bearer(secret)).status_code)
        statuses.append(httpx.post(f"{url}/v1/completions", content=b'{"SHIBBOLETH', headers=bearer(secret)).status_code)
        statuses.append(httpx.get(f"{url}/v1/models", headers=bearer(revoked)).status_code)
        statuses.append(httpx.get(f"{url}/v1/models", headers=bearer(secret + "x")).status_code)
    assert statuses == [500, 200, 200, 200, 400, 404, 400, 400, 401, 401]
    formatter = logging.Formatter()
    written = "\n".join([*(formatter.format(record) for record in caplog.records), *capfd.readouterr()])
    assert "A request failed: ValueError" in written
    assert "/v1/completions" in written, "the server did log"
    assert [word for word in planted if word in written] == []


# --- TLS -------------------------------------------------------------------------------------------------------------


def test_the_gateway_speaks_tls_as_serves_http_options_say(tmp_path: Path, log: KeyLog) -> None:
    """By the function with which Serve's proxy starts its server, on what stands in `http_options` of a config file."""
    _, secret = log.create("one")
    certificate = Authority(tmp_path).issue("gateway")
    value = yaml.safe_load((ROOT / "serve/serve.yaml").read_text())
    value["http_options"] = {
        "host": "127.0.0.1",
        "port": 0,
        "ssl_certfile": str(certificate.path),
        "ssl_keyfile": str(certificate.key_path),
    }
    options = HTTPOptions(**ServeDeploySchema.model_validate(value).http_options.model_dump(exclude_unset=True))

    async def work() -> None:
        started, server = await start_asgi_http_server(gateway(FakeBackend(), log=log), options, event_loop=asyncio.get_running_loop())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        trusting = ssl.create_default_context(cafile=str(certificate.authority_path))
        try:
            async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=trusting) as client:
                response = await client.post("/v1/completions", json=COMPLETION, headers=bearer(secret))
                assert response.json()["choices"][0]["text"] == "Hello!"
            async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=ssl.create_default_context()) as client:
                with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await client.get("/health")
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                with pytest.raises(httpx.HTTPError):
                    await client.get("/health")
        finally:
            server.should_exit = True
            await started

    run(work())


def test_half_of_the_tls_options_are_refused_by_serve() -> None:
    with pytest.raises(ValueError, match="ssl_keyfile and ssl_certfile"):
        HTTPOptions(ssl_certfile="/tls/cert.pem")
