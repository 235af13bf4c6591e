"""The gateway's own port: who comes in, and how it is left."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.certificates import Authority
from tests.training.nodes import free_port
from tidepool.errors import ClusterError
from tidepool.serving.door import Door

_TIMEOUT_S = 30.0


def slow(name: str, goes_on: asyncio.Event) -> ASGIApp:
    """An application that says a name, waits, and says it again."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def parts() -> AsyncIterator[str]:
            yield name
            await goes_on.wait()
            yield name

        await StreamingResponse(parts())(scope, receive, send)

    return app


@asynccontextmanager
async def asked(port: int) -> AsyncIterator[Callable[[], Awaitable[str]]]:
    """An answer that has begun; call for its next part, empty at its end."""
    async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client, client.stream("GET", f"http://127.0.0.1:{port}/") as answer:
        parts = answer.aiter_text()

        async def next_part() -> str:
            return await anext(parts, "")

        yield next_part


def test_a_door_that_closes_finishes_its_answers_and_takes_no_more() -> None:
    async def play() -> None:
        goes_on, port = asyncio.Event(), free_port()
        door = Door(slow("a", goes_on), "127.0.0.1", port)
        door.open()
        async with asked(port) as part:
            assert await part() == "a"
            closing = asyncio.create_task(door.close(_TIMEOUT_S))
            while not closing.done():  # until nobody listens
                try:
                    async with httpx.AsyncClient(timeout=_TIMEOUT_S) as late:
                        await asyncio.wait_for(late.get(f"http://127.0.0.1:{port}/"), 0.2)
                except httpx.ConnectError:
                    break
                except TimeoutError:
                    continue
            assert not closing.done(), "it did not wait for the answer"
            door.check()
            goes_on.set()
            assert [await part(), await part()] == ["a", ""]
        await closing
        with pytest.raises(ClusterError, match="Nobody listens"):
            door.check()

    asyncio.run(play())


def test_it_waits_only_so_long() -> None:
    async def play() -> None:
        port = free_port()
        door = Door(slow("a", asyncio.Event()), "127.0.0.1", port)
        door.open()
        async with asked(port) as part:
            assert await part() == "a"
            await door.close(0.1)
            with pytest.raises(httpx.RemoteProtocolError):
                await part()

    asyncio.run(play())


def test_two_gateways_of_a_node_listen_both_and_one_may_go() -> None:
    async def play() -> None:
        goes_on, port = asyncio.Event(), free_port()
        goes_on.set()
        before, after = (Door(slow(name, goes_on), "127.0.0.1", port) for name in "ab")
        before.open()
        after.open()
        await before.close(_TIMEOUT_S)
        async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
            assert (await client.get(f"http://127.0.0.1:{port}/")).text == "bb"
        await after.close(_TIMEOUT_S)

    asyncio.run(play())


def test_it_speaks_tls(tmp_path: Path) -> None:
    certificate = Authority(tmp_path).issue("gateway")

    async def play() -> None:
        goes_on, port = asyncio.Event(), free_port()
        goes_on.set()
        tls = {"ssl_certfile": str(certificate.path), "ssl_keyfile": str(certificate.key_path), "ssl_ca_certs": None}
        door = Door(slow("a", goes_on), "127.0.0.1", port, tls)
        door.open()
        trusting = ssl.create_default_context(cafile=str(certificate.authority_path))
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, verify=trusting) as client:
            assert (await client.get(f"https://127.0.0.1:{port}/")).text == "aa"
        async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
            with pytest.raises(httpx.HTTPError):
                await client.get(f"http://127.0.0.1:{port}/")
        await door.close(_TIMEOUT_S)

    asyncio.run(play())


def test_a_port_that_others_have_is_said() -> None:
    async def play() -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            door = Door(slow("a", asyncio.Event()), "127.0.0.1", port)
            with pytest.raises(ClusterError, match=f"port {port} .*in use.*: name a free one in `gateway: {{port: ...}}`"):
                door.open()
            door.check()
            await door.close(_TIMEOUT_S)

    asyncio.run(play())
