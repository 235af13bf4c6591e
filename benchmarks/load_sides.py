"""One server of `load.py`, a process of its own: `build_gateway`, or a bare application that sends the same bytes, behind uvicorn.

    python benchmarks/load_sides.py ours|uvicorn|starlette

It prints `{"port": ...}`, then answers a JSON object a line, until there is nothing more to read: `{"do": "copy", "stream": [texts],
"whole": text}` gives a bare application what to send; `{"do": "hold", "at": n}` makes every answer that begins from now on wait before its
token n, `{"do": "release"}` lets them go on, and `{"do": "forget"}` ends that and tells how far the last one was when the first one was
done; `{"do": "look"}` tells what the process holds, `{"do": "account"}` the processor time that it has used.

The model behind all sides is the same and costs nothing: a token is one turn of the event loop.
"""

import asyncio
import gc
import json
import os
import resource
import socket
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tidepool.inference.engine import Output
from tidepool.registry import Meaning, ModelVersion
from tidepool.serving.backend import Call, Frame, Started
from tidepool.serving.gateway import build_gateway
from tidepool.serving.resolver import Resolver
from tidepool.specs import GatewaySpec

WORD = " tide"
_MAX_REQUESTS = 100_000
_BACKLOG = 4096
_EVENT_STREAM = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


class Hold:
    """Answers that wait before their token `at` until `go`; `progress` of each, and the least of them when the first one ended."""

    def __init__(self, at: int) -> None:
        self.at, self.go = at, asyncio.Event()
        self.progress: list[float] = []
        self.least_progress: float | None = None


class Model:
    """Makes tokens of no cost; all answers that begin while there is a hold wait at it."""

    def __init__(self) -> None:
        self.hold: Hold | None = None

    async def tokens(self, num_tokens: int) -> AsyncGenerator[int, None]:
        """The numbers of an answer's tokens."""
        if self.hold is not None:
            async for index in self._held(num_tokens, self.hold):
                yield index
            return
        for index in range(num_tokens):
            await asyncio.sleep(0)
            yield index

    async def _held(self, num_tokens: int, hold: Hold) -> AsyncGenerator[int, None]:
        number = len(hold.progress)
        hold.progress.append(0.0)
        try:
            for index in range(num_tokens):
                await asyncio.sleep(0)
                if index == hold.at:
                    await hold.go.wait()
                hold.progress[number] = (index + 1) / num_tokens
                if index + 1 == num_tokens and hold.least_progress is None:
                    hold.least_progress = min(hold.progress)
                yield index
        finally:
            hold.progress[number] = 1.0  # nobody waits for one that has left


class Backend:
    """The model as the gateway sees its replicas."""

    def __init__(self, model: Model) -> None:
        self._model = model

    async def generate(self, call: Call) -> AsyncGenerator[Frame, None]:
        """As many words as are asked for."""
        assert call.sampling.max_tokens is not None
        yield Started(8)
        async for index in self._model.tokens(call.sampling.max_tokens):
            yield Output((index,), WORD, "length" if index + 1 == call.sampling.max_tokens else None)


class Copy:
    """Sends what the gateway sent, piece by piece, each of a stream's words when the model has made it."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.stream: list[bytes] = []
        self.whole = b""

    @property
    def num_tokens(self) -> int:
        return sum(WORD.encode() in piece for piece in self.stream)

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        tokens = self._model.tokens(self.num_tokens)
        for piece in self.stream:
            if WORD.encode() in piece:
                await anext(tokens)
            yield piece

    async def once(self) -> bytes:
        async for _ in self._model.tokens(self.num_tokens):
            pass
        return self.whole


def bare_uvicorn(copy: Copy) -> ASGIApp:
    """Nothing between uvicorn and the bytes."""
    stream = [(name.lower().encode(), value.encode()) for name, value in _EVENT_STREAM.items()]

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        if json.loads(body)["stream"]:
            await send({"type": "http.response.start", "status": 200, "headers": stream})
            async for piece in copy.pieces():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            whole = await copy.once()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(whole)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": whole, "more_body": False})

    return app


def bare_starlette(copy: Copy) -> ASGIApp:
    """A route, and Starlette's own responses."""

    async def answer(request: Request) -> Response:
        if (await request.json())["stream"]:
            return StreamingResponse(copy.pieces(), headers=_EVENT_STREAM)
        return Response(await copy.once(), media_type="application/json")

    return Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])


def ours(model: Model) -> ASGIApp:
    """The gateway with one model, which is resolved anew every second."""
    version = ModelVersion("tides", 1, "full", "ba5e" * 16, (), None, None, {}, {}, "2026-11-02T10:00:00+00:00")
    resolver = Resolver(lambda _: Meaning(version), {"tides": version}, {version.digest}, ttl_s=1.0)
    return build_gateway(resolver, Backend(model), GatewaySpec(max_requests=_MAX_REQUESTS))


def look(server: uvicorn.Server) -> dict[str, Any]:
    """What the process holds now."""
    gc.collect()
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss_bytes": num_pages * os.sysconf("SC_PAGE_SIZE"),
        "num_objects": len(gc.get_objects()),
        "num_tasks": len(asyncio.all_tasks()),
        "num_connections": len(server.server_state.connections),
    }


def obey(question: dict[str, Any], server: uvicorn.Server, model: Model, copy: Copy) -> dict[str, Any]:
    """Do what a line asks for."""
    match question:
        case {"do": "copy", "stream": stream, "whole": whole}:
            copy.stream, copy.whole = [piece.encode() for piece in stream], whole.encode()
        case {"do": "hold", "at": at}:
            model.hold = Hold(at)
        case {"do": "release"}:
            assert model.hold is not None
            model.hold.go.set()
        case {"do": "forget"}:
            hold, model.hold = model.hold, None
            return {"least_progress": hold and hold.least_progress}
        case {"do": "account"}:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            return {"cpu_s": usage.ru_utime + usage.ru_stime}
        case {"do": "look"}:
            return look(server)
        case _:
            raise ValueError(question)
    return {}


async def main(side: str) -> None:
    """Serve until there is nothing more to read."""
    model = Model()
    copy = Copy(model)
    app = {"ours": lambda: ours(model), "uvicorn": lambda: bare_uvicorn(copy), "starlette": lambda: bare_starlette(copy)}[side]()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", backlog=_BACKLOG))
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    with socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        while line := await lines.readline():
            print(json.dumps(obey(json.loads(line), server, model, copy)), flush=True)
        server.should_exit = True
        await serving


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # what uvicorn would take by itself
        runner.run(main(sys.argv[1]))
