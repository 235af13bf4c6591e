"""The HTTP gateway: OpenAI's completions and chat completions over a resolver and a backend. Knows no Ray.

Invariants:
- A request gets a status other than 200 for whatever fails before the engine has taken it. What fails in a stream after that
  is its last event, `{"error": ...}`, and no `[DONE]` follows.
- A client that leaves cancels its request at the backend, streaming or not.
- A request that is not complete after the spec's `timeout_s` is cancelled at the backend, and the client told.
- No prompt, answer or key is written to a log, nor the message of an error that may quote one.
- An answer names the model that was asked for; its `system_fingerprint` names the version that answered.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, aclosing, suppress
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from tidepool.errors import ClusterError, RegistryError
from tidepool.inference.engine import Output
from tidepool.registry import ModelVersion
from tidepool.serving.access import Access, Admission, check_scope, unknown_model
from tidepool.serving.answer import Answer, fingerprint, usage_of
from tidepool.serving.backend import Backend, Call, Frame, Started
from tidepool.serving.keys import ApiKey, KeyRing
from tidepool.serving.plan import base_digest_of
from tidepool.serving.problem import Problem, Refusal, problem_of
from tidepool.serving.protocol import Ask, parse_chat, parse_completion
from tidepool.serving.resolver import Resolver
from tidepool.specs import GatewaySpec

_CLIENT_LEFT = 499  # nobody reads it but a log
_LAST_EVENT_TIMEOUT_S = 1.0  # for a client that is too slow to be served, and may be too slow to be told

T = TypeVar("T")


def build_gateway(resolver: Resolver, backend: Backend, spec: GatewaySpec | None = None, keys: KeyRing | None = None) -> FastAPI:
    """The ASGI application. `keys` is needed where the spec requires keys."""
    app = FastAPI(title="Tidepool", docs_url=None, redoc_url=None, openapi_url=None)
    spec = spec or GatewaySpec()
    gateway = _Gateway(resolver, backend, spec, Access(spec, keys))
    app.add_api_route("/health", _health, methods=["GET"])
    app.add_api_route("/v1/models", gateway.models, methods=["GET"])
    app.add_api_route("/v1/models/{name}", gateway.model, methods=["GET"])
    app.add_api_route("/v1/completions", gateway.completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", gateway.chat_completions, methods=["POST"], response_model=None)
    app.add_api_route("/admin/keys", gateway.keys, methods=["GET"])
    app.add_exception_handler(HTTPException, _unknown_route)
    return app


async def _health() -> Response:
    return JSONResponse({"status": "ok"})


async def _unknown_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}. See GET /v1/models, POST /v1/completions, POST /v1/chat/completions."
    return _refused(Problem(error.status_code, message, "unknown_url"))


class _Gateway:
    def __init__(self, resolver: Resolver, backend: Backend, spec: GatewaySpec, access: Access) -> None:
        self._resolver, self._backend, self._spec, self._access = resolver, backend, spec, access

    async def models(self, request: Request) -> Response:
        async def work() -> Response:
            key = await self._identify(request)
            models = await (self._resolver.models(key.may_use) if key else self._resolver.models())
            return JSONResponse({"object": "list", "data": [_describe(name, version) for name, version in models.items()]})

        return await _answered(work())

    async def model(self, request: Request, name: str) -> Response:
        async def work() -> Response:
            return JSONResponse(_describe(name, await self._resolve(await self._identify(request), name)))

        return await _answered(work())

    async def keys(self, request: Request) -> Response:
        async def work() -> Response:
            key = await self._identify(request)
            return JSONResponse({"object": "list", "data": self._access.overview(key)})

        return await _answered(work())

    async def completions(self, request: Request) -> Response:
        return await _answered(self._generate(request, parse_completion, is_chat=False))

    async def chat_completions(self, request: Request) -> Response:
        return await _answered(self._generate(request, parse_chat, is_chat=True))

    async def _generate(self, request: Request, parse: Callable[[bytes], Ask], is_chat: bool) -> Response:
        deadline = asyncio.get_running_loop().time() + self._spec.timeout_s
        key = await self._identify(request)
        with ExitStack() as until_streamed:
            admission = until_streamed.enter_context(self._access.enter(key))
            ask = parse(await self._body(request, deadline))
            self._check_max_tokens(ask)
            version = await self._resolve(key, ask.model)
            request_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
            answer = Answer(is_chat, request_id, int(time.time()), ask.model, fingerprint(version))
            exchange = _Exchange(self._backend, _call(request_id, ask, version, key), answer, ask.include_usage, admission, self._spec)
            if not ask.stream:
                return JSONResponse(await self._in_time(request.receive, exchange.whole(), deadline))
            # The engine takes the request before the status is sent, so that a refusal has a status of its own.
            await self._in_time(request.receive, exchange.start(), deadline)
            until_streamed.pop_all()
            return _EventStream(exchange, deadline)

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
            return await _while_connected(receive, work, deadline)
        except _DeadlineError:
            raise Refusal(_too_late(self._spec)) from None

    async def _body(self, request: Request, deadline: float) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout_at(deadline):
                async for part in request.stream():
                    body += part
                    if len(body) > self._spec.max_body_bytes:
                        raise Refusal(Problem(400, f"The body is larger than {self._spec.max_body_bytes} bytes.", "body_too_large"))
        except TimeoutError:
            raise Refusal(Problem(408, f"The body was not complete after {self._spec.timeout_s:g} s.", "request_timeout")) from None
        return bytes(body)

    def _check_max_tokens(self, ask: Ask) -> None:
        limit = self._spec.max_new_tokens
        asked = ask.sampling.max_tokens
        if limit is not None and asked is not None and asked > limit:
            message = f"At most {limit} tokens may be asked for here, not {asked}."
            raise Refusal(Problem(400, message, "max_tokens_too_large", "max_tokens"))


class _Exchange:
    """One request at the backend, and the answer made from its frames."""

    def __init__(self, backend: Backend, call: Call, answer: Answer, include_usage: bool, admission: Admission, spec: GatewaySpec) -> None:
        self._frames = backend.generate(call)
        self._answer, self._include_usage, self._admission, self.spec = answer, include_usage, admission, spec
        self._num_prompt_tokens = self._num_tokens = 0

    async def start(self) -> None:
        """Wait until the engine has taken the request; ends the request if that fails."""
        try:
            first = await anext(self._frames)
            assert isinstance(first, Started), first
            self._num_prompt_tokens = first.num_prompt_tokens
            self._admission.spend(first.num_prompt_tokens)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        try:
            await self._frames.aclose()
        finally:
            self._admission.leave()

    async def whole(self) -> dict[str, Any]:
        await self.start()
        async with aclosing(self._frames):
            texts, finish_reason = [], ""
            async for output in self._outputs():
                texts.append(output.text)
                finish_reason = output.finish_reason or finish_reason
            return self._answer.whole("".join(texts), finish_reason, self._usage)

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The chunks of the answer, after `start`."""
        nothing_yet = {"usage": None} if self._include_usage else {}
        for chunk in self._answer.opening():
            yield chunk | nothing_yet
        async for output in self._outputs():
            if output.text:
                yield self._answer.piece(output.text) | nothing_yet
            if output.finish_reason is not None:
                yield self._answer.ending(output.finish_reason) | nothing_yet
        if self._include_usage:
            yield self._answer.usage(self._usage)

    @property
    def _usage(self) -> dict[str, int]:
        return usage_of(self._num_prompt_tokens, self._num_tokens)

    async def _outputs(self) -> AsyncIterator[Output]:
        async for frame in self._frames:
            self._admission.check()
            output = self._within_limit(_expect_output(frame))
            self._num_tokens += len(output.token_ids)
            self._admission.spend(len(output.token_ids))
            if output.finish_reason == "cancelled":
                break
            yield output
            if output.finish_reason is not None:
                return
        raise ClusterError("The replica stopped before the answer was complete: try again.")

    def _within_limit(self, output: Output) -> Output:
        """End an answer at the spec's `max_new_tokens`, which a request that names no number of tokens can reach."""
        limit = self.spec.max_new_tokens
        if limit is None or output.finish_reason is not None or self._num_tokens + len(output.token_ids) < limit:
            return output
        return replace(output, finish_reason="length")


class _EventStream(Response):  # type: ignore[misc]  # starlette is skipped by mypy
    """Server-sent events of a started exchange."""

    media_type = "text/event-stream"

    def __init__(self, exchange: _Exchange, deadline: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._exchange, self._deadline = exchange, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        try:
            await _while_connected(receive, self._send(send), self._deadline)
        except _ClientLeftError:
            return
        except _DeadlineError:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_EVENT_TIMEOUT_S):
                    await _send_event(send, json.dumps(_too_late(self._exchange.spec).body))
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._exchange.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self._exchange.events():
                await _send_event(send, json.dumps(chunk, ensure_ascii=False))
            await _send_event(send, "[DONE]")
        except Exception as error:  # noqa: BLE001  the status is sent: the client must still learn what happened
            await _send_event(send, json.dumps(problem_of(error).body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})


class _ClientLeftError(Exception):
    """The client closed its connection."""


class _DeadlineError(Exception):
    """The request took longer than it may."""


def _too_late(spec: GatewaySpec) -> Problem:
    message = f"The answer was not complete after {spec.timeout_s:g} s, which is the most here: ask for fewer tokens."
    return Problem(504, message, "timeout")


async def _while_connected(receive: Receive, work: Awaitable[T], deadline: float) -> T:
    """Do the work, unless the client leaves first or the loop's time comes to `deadline`: then it is cancelled, and
    `_ClientLeftError` or `_DeadlineError` raised.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        left_s = max(0.0, deadline - asyncio.get_running_loop().time())
        await asyncio.wait({task, gone}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _ClientLeftError if gone.done() else _DeadlineError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answered(work: Awaitable[Response]) -> Response:
    try:
        return await work
    except _ClientLeftError:
        return Response(status_code=_CLIENT_LEFT)
    except Exception as error:  # noqa: BLE001  whatever fails, the client gets OpenAI's error object and the log the rest
        return _refused(problem_of(error))


def _refused(problem: Problem) -> Response:
    return JSONResponse(problem.body, problem.status, problem.headers)


def _call(request_id: str, ask: Ask, version: ModelVersion, key: ApiKey | None) -> Call:
    base_digest = base_digest_of(version)
    assert base_digest is not None, version.ref
    adapter = version if version.kind == "adapter" else None
    return Call(request_id, base_digest, adapter, ask.prompt, ask.sampling, client=key.id if key else "")


def _expect_output(frame: Frame) -> Output:
    assert isinstance(frame, Output), frame
    return frame


def _describe(name: str, version: ModelVersion) -> dict[str, Any]:
    """OpenAI's model object; `root` is the version that answers now, `parent` the base of an adapter."""
    created = int(datetime.fromisoformat(version.published_at).timestamp())
    parent = version.base if version.kind == "adapter" else None
    return {"id": name, "object": "model", "created": created, "owned_by": "tidepool", "root": version.ref, "parent": parent}
