"""A client's connection: its body, its answer as server-sent events, and its leaving.

Invariants: work for a client that leaves, or whose time is over, is cancelled; a body is read up to a size and a time.
"""

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidepool.serving.api.ask import Event
from tidepool.serving.exchange import Exchange
from tidepool.serving.problem import Problem, Refusal, problem_of
from tidepool.specs import GatewaySpec

_LAST_EVENT_TIMEOUT_S = 1.0  # for a client that is too slow to be served, and may be too slow to be told

T = TypeVar("T")


class ClientLeftError(Exception):
    """The client closed its connection."""


class DeadlineError(Exception):
    """The request took longer than it may."""


async def read_body(request: Request, spec: GatewaySpec, deadline: float) -> bytes:
    """Raises `Refusal` (413, 408), and `ClientLeftError` if the client leaves before its body is complete."""
    body = bytearray()
    try:
        async with asyncio.timeout_at(deadline):
            async for part in request.stream():
                body += part
                if len(body) > spec.max_body_bytes:
                    raise Refusal(Problem(413, f"The body is larger than {spec.max_body_bytes} bytes.", "body_too_large"))
    except TimeoutError:
        raise Refusal(Problem(408, f"The body was not complete after {spec.timeout_s:g} s.", "request_timeout")) from None
    except ClientDisconnect:
        raise ClientLeftError from None
    return bytes(body)


class EventStream(Response):  # type: ignore[misc]  # starlette is skipped by mypy
    """Server-sent events of a started exchange. Named ones carry their `type` as their name, and no `[DONE]` follows them."""

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, has_named_events: bool, deadline: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._exchange, self._has_named_events, self._deadline = exchange, has_named_events, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        try:
            await while_connected(receive, self._send(send), self._deadline)
        except ClientLeftError:
            return
        except DeadlineError:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_EVENT_TIMEOUT_S):
                    failure = self._exchange.answer.failure(too_late(self._exchange.spec))
                    await send({"type": "http.response.body", "body": self._event(failure), "more_body": False})
        finally:
            await self._exchange.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._exchange.events():
                await send({"type": "http.response.body", "body": self._event(event), "more_body": True})
            last = b"" if self._has_named_events else b"data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001  the status is sent: the client must still learn what happened
            last = self._event(self._exchange.answer.failure(problem_of(error)))
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _event(self, event: Event) -> bytes:
        name = f"event: {event['type']}\n".encode() if self._has_named_events else b""
        return name + b"data: " + to_json(event) + b"\n\n"


def too_late(spec: GatewaySpec) -> Problem:
    message = f"The answer was not complete after {spec.timeout_s:g} s, which is the most here: ask for fewer tokens."
    return Problem(504, message, "timeout")


async def while_connected(receive: Receive, work: Awaitable[T], deadline: float) -> T:
    """Do the work, unless the client leaves first or the loop's time comes to `deadline`: then it is cancelled, and
    `ClientLeftError` or `DeadlineError` raised.
    """
    limit, is_over = asyncio.timeout_at(deadline), False

    def end(_: object) -> None:
        if not is_over and not limit.expired():  # the loop may call this after the work has ended in the same round
            limit.reschedule(0.0)

    gone = asyncio.create_task(_disconnected(receive))
    gone.add_done_callback(end)
    try:
        async with limit:
            return await work
    except TimeoutError:
        if not limit.expired():
            raise  # the work's own
        raise (ClientLeftError if gone.done() else DeadlineError) from None
    finally:
        is_over = True
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
