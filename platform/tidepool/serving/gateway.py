"""The HTTP gateway: OpenAI's API over a resolver and a backend. Knows no Ray. What an endpoint takes and gives stands in `api`.

Invariants:
- A request gets a status other than 200 for whatever fails before the engine has taken it. What fails in a stream after that
  is its last event, `{"error": ...}`, and no `[DONE]` follows.
- A client that leaves cancels its request at the backend, streaming or not.
- A request that is not complete after the spec's `timeout_s` is cancelled at the backend, and the client told.
- No prompt, answer or key is written to a log, nor the message of an error that may quote one.
- An answer names the model that was asked for; its `system_fingerprint` names the version that answered.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, ExitStack
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive

from tidepool.errors import RegistryError
from tidepool.registry import ModelVersion
from tidepool.serving.access import Access, check_scope, unknown_model
from tidepool.serving.api.ask import Ask, Head, fingerprint
from tidepool.serving.api.chat import parse_chat
from tidepool.serving.api.completions import parse_completion
from tidepool.serving.api.embeddings import parse_embedding
from tidepool.serving.api.models import describe
from tidepool.serving.api.openapi import document
from tidepool.serving.api.responses import parse_response
from tidepool.serving.api.tokenization import parse_tokenize
from tidepool.serving.backend import Backend, Call
from tidepool.serving.connection import ClientLeftError, DeadlineError, EventStream, read_body, too_late, while_connected
from tidepool.serving.exchange import Exchange
from tidepool.serving.keys import ApiKey, KeyRing
from tidepool.serving.plan import base_digest_of
from tidepool.serving.problem import Problem, Refusal, problem_of
from tidepool.serving.readiness import Readiness
from tidepool.serving.resolver import Resolver
from tidepool.specs import GatewaySpec

_CLIENT_LEFT = 499  # nobody reads it but a log
_READY_RETRY_S = 5
_LARGE_BODY_BYTES = 65_536
_PARSERS: dict[str, Callable[[bytes], Ask]] = {
    "/v1/completions": parse_completion,
    "/v1/chat/completions": parse_chat,
    "/v1/responses": parse_response,
    "/v1/embeddings": parse_embedding,
    "/tokenize": parse_tokenize,
}

T = TypeVar("T")


def build_gateway(
    resolver: Resolver,
    backend: Backend,
    spec: GatewaySpec | None = None,
    keys: KeyRing | None = None,
    lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]] | None = None,
) -> Starlette:
    """The ASGI application. `keys` is needed where the spec requires keys; `lifespan`: what is done around it."""
    spec = spec or GatewaySpec()
    gateway = _Gateway(resolver, backend, spec, Access(spec, keys))
    routes = [
        Route("/health", _health),
        Route("/ready", gateway.ready),
        Route("/openapi.json", _openapi),
        Route("/v1/models", gateway.models),
        Route("/v1/models/{name}", gateway.model),
        *(Route(path, gateway.answering(parse), methods=["POST"]) for path, parse in _PARSERS.items()),
        Route("/admin/keys", gateway.keys),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _unknown_route}, lifespan=lifespan)


async def _health(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _openapi(_: Request) -> Response:
    return JSONResponse(document())


async def _unknown_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}. GET /openapi.json has the rest of {', '.join(_PARSERS)}."
    return _refused(Problem(error.status_code, message, "unknown_url"), error.headers)


class _Gateway:
    def __init__(self, resolver: Resolver, backend: Backend, spec: GatewaySpec, access: Access) -> None:
        self._resolver, self._backend, self._spec, self._access = resolver, backend, spec, access
        self._readiness = Readiness(resolver, backend)

    async def ready(self, _: Request) -> Response:
        if await self._readiness.is_ready():
            return JSONResponse({"status": "ready"})
        problem = Problem(503, "Not every model has a replica that answers yet: ask again.", "not_ready", retry_after_s=_READY_RETRY_S)
        return _refused(problem)

    async def models(self, request: Request) -> Response:
        async def work() -> Response:
            key = await self._identify(request)
            models = await (self._resolver.models(key.may_use) if key else self._resolver.models())
            return JSONResponse({"object": "list", "data": [describe(name, version) for name, version in models.items()]})

        return await _answered(work())

    async def model(self, request: Request) -> Response:
        async def work() -> Response:
            name = request.path_params["name"]
            return JSONResponse(describe(name, await self._resolve(await self._identify(request), name)))

        return await _answered(work())

    async def keys(self, request: Request) -> Response:
        async def work() -> Response:
            key = await self._identify(request)
            return JSONResponse({"object": "list", "data": self._access.overview(key)})

        return await _answered(work())

    def answering(self, parse: Callable[[bytes], Ask]) -> Callable[[Request], Awaitable[Response]]:
        """What serves requests that are parsed so."""

        async def serve(request: Request) -> Response:
            return await _answered(self._answer(request, parse))

        return serve

    async def _answer(self, request: Request, parse: Callable[[bytes], Ask]) -> Response:
        deadline = asyncio.get_running_loop().time() + self._spec.timeout_s
        key = await self._identify(request)
        with ExitStack() as until_streamed:
            admission = until_streamed.enter_context(self._access.enter(key))
            ask = await _parsed(parse, await read_body(request, self._spec, deadline))
            self._check_max_tokens(ask)
            version = await self._resolve(key, ask.model)
            head = Head(f"{ask.form.prefix}-{uuid.uuid4().hex}", int(time.time()), ask.model, fingerprint(version))
            calls = _calls(head.request_id, ask, version, key)
            exchange = Exchange(self._backend, calls, ask.form.begin(head), ask.is_prompt_alone, admission, self._spec)
            if not ask.stream:
                return JSONResponse(await self._in_time(request.receive, exchange.whole(), deadline))
            # The engine takes the request before the status is sent, so that a refusal has a status of its own.
            await self._in_time(request.receive, exchange.start(), deadline)
            until_streamed.pop_all()
            return EventStream(exchange, ask.form.has_named_events, deadline)

    async def _identify(self, request: Request) -> ApiKey | None:
        return await self._access.identify(request.headers.get("authorization"))

    async def _resolve(self, key: ApiKey | None, ref: str) -> ModelVersion:
        check_scope(key, ref)
        try:
            return await self._resolver.resolve(ref)
        except RegistryError as error:
            if key is None or key.models is None:
                raise
            raise unknown_model(key, ref) from error  # the resolver's words name models that are not this key's

    async def _in_time(self, receive: Receive, work: Awaitable[T], deadline: float) -> T:
        try:
            return await while_connected(receive, work, deadline)
        except DeadlineError:
            raise Refusal(too_late(self._spec)) from None

    def _check_max_tokens(self, ask: Ask) -> None:
        limit = self._spec.max_new_tokens
        asked = ask.sampling.max_tokens
        if limit is not None and asked is not None and asked > limit:
            message = f"At most {limit} tokens may be asked for here, not {asked}."
            raise Refusal(Problem(400, message, "max_tokens_too_large", "max_tokens"))


async def _parsed(parse: Callable[[bytes], Ask], body: bytes) -> Ask:
    """A large body in a thread: it can take a second, in which all other streams would stand still."""
    return parse(body) if len(body) <= _LARGE_BODY_BYTES else await asyncio.to_thread(parse, body)


async def _answered(work: Awaitable[Response]) -> Response:
    try:
        return await work
    except ClientLeftError:
        return Response(status_code=_CLIENT_LEFT)
    except Exception as error:  # noqa: BLE001  whatever fails, the client gets OpenAI's error object and the log the rest
        return _refused(problem_of(error))


def _refused(problem: Problem, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(problem.body, problem.status, {**(headers or {}), **problem.headers})


def _calls(request_id: str, ask: Ask, version: ModelVersion, key: ApiKey | None) -> list[Call]:
    """One for each prompt; the request's own id is that of a single one."""
    base_digest = base_digest_of(version)
    assert base_digest is not None, version.ref
    adapter = version if version.kind == "adapter" else None
    ids = [request_id] if len(ask.prompts) == 1 else [f"{request_id}-{number}" for number in range(len(ask.prompts))]
    client = key.id if key else ""
    return [
        Call(call_id, base_digest, adapter, prompt, ask.sampling, ask.task, ask.echo, client)
        for call_id, prompt in zip(ids, ask.prompts, strict=True)
    ]
