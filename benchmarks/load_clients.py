"""The clients of `load.py`, all in a process of their own: raw HTTP/1.1 on loopback, as cheap as they can be.

It reads and answers a JSON object a line:

    {"do": "ask", "port", "body", "expected", "num_connections", "num_requests"}
        opens the connections, then sends the requests, the next one on a connection when the one before is answered;
    {"do": "begin", ..., "num_events"}
        sends one request on each connection, and answers when each has got so many events;
    {"do": "leave", "num_connections"}
        closes the first ones of them;
    {"do": "finish"}
        waits for the rest.

`ask` and `finish` answer with the seconds from the first request to the last answer, those of each answer from its request to its first
event and to its end, and how many answers failed: another status, another text than `expected`, no end in time, a lost connection.
Answers are read after the clock has stopped.
"""

import asyncio
import json
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Any

import uvloop

_TIMEOUT_S = 120.0
_EVENT, _CHUNKS_END = b"data: ", b"\r\n0\r\n\r\n"


class Answer:
    """What came for one request."""

    __slots__ = ("data", "ended_at", "first_at", "sent_at", "size")

    def __init__(self, sent_at: float) -> None:
        self.data, self.sent_at, self.size = bytearray(), sent_at, None
        self.first_at: float | None = None
        self.ended_at: float | None = None

    def take(self, data: bytes, now: float) -> bool:
        """Whether it is complete with this."""
        self.data += data
        if self.first_at is None and _EVENT in self.data:
            self.first_at = now
        if self.first_at is not None:
            is_complete = self.data.endswith(_CHUNKS_END)
        else:
            head, end, body = self.data.partition(b"\r\n\r\n")
            _, has_size, size = head.lower().partition(b"content-length: ")
            is_complete = bool(end and has_size) and len(body) >= int(size.split(b"\r\n")[0])
        if is_complete:
            self.ended_at = now
        return is_complete

    @property
    def num_events(self) -> int:
        return self.data.count(_EVENT)

    def text(self) -> str:
        """Of a complete answer with status 200. Raises `ValueError` or `LookupError` for any other."""
        head, _, body = bytes(self.data).partition(b"\r\n\r\n")
        if self.ended_at is None or not head.startswith(b"HTTP/1.1 200 "):
            raise ValueError(head)
        if b"transfer-encoding: chunked" not in head.lower():
            return str(json.loads(body)["choices"][0]["message"]["content"])
        *events, done, rest = _dechunked(body).split(b"\n\n")
        if (done, rest) != (b"data: [DONE]", b"") or not all(event.startswith(_EVENT) for event in events):
            raise ValueError(done)
        return "".join(json.loads(event.removeprefix(_EVENT))["choices"][0]["delta"].get("content", "") for event in events)


def _dechunked(body: bytes) -> bytes:
    pieces = []
    while True:
        size, _, body = body.partition(b"\r\n")
        if int(size, 16) == 0:
            return b"".join(pieces)
        pieces.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]


class Connection(asyncio.Protocol):
    """One request after another, as long as `next_request` has any."""

    def __init__(self, take_next: Callable[[], bytes | None], when_done: Callable[[], None]) -> None:
        self._take_next, self._when_done = take_next, when_done
        self.answers: list[Answer] = []
        self.transport: Any  # uvloop's is no subclass of asyncio's

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def send(self) -> None:
        """Send the next request, or be done."""
        request = self._take_next()
        if request is None:
            self._when_done()
        else:
            self.answers.append(Answer(perf_counter()))
            self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self.answers[-1].take(data, perf_counter()):
            self.send()

    def connection_lost(self, error: Exception | None) -> None:
        if self.answers and self.answers[-1].ended_at is None:
            self._when_done()


class Clients:
    """The connections of one turn."""

    def __init__(self, question: dict[str, Any]) -> None:
        body = json.dumps(question["body"]).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: tidepool\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._request = head.encode() + body
        self._port, self._expected = question["port"], question["expected"]
        self._left = question["num_requests"]
        self._num_open = question["num_connections"]
        self._all_done = asyncio.Event()
        self._connections: list[Connection] = []
        self._begun_at = 0.0

    async def begin(self) -> None:
        """Connect all of them, then send each one's first request."""
        loop = asyncio.get_running_loop()
        for _ in range(self._num_open):
            _, connection = await loop.create_connection(lambda: Connection(self._take_next, self._done), "127.0.0.1", self._port)
            self._connections.append(connection)
        self._begun_at = perf_counter()
        for connection in self._connections:
            connection.send()

    async def wait_for_events(self, num_events: int) -> None:
        """Until each connection's answer has so many. Raises `TimeoutError`."""
        async with asyncio.timeout(_TIMEOUT_S):
            while any(connection.answers[-1].num_events < num_events for connection in self._connections):
                await asyncio.sleep(0.01)

    def leave(self, num_connections: int) -> None:
        """Close the first ones, and forget them."""
        for connection in self._connections[:num_connections]:
            connection.transport.abort()
        del self._connections[:num_connections]

    async def finish(self) -> dict[str, Any]:
        """Wait for what is still to come, and tell what came."""
        with suppress(TimeoutError):  # what has not ended counts as failed
            await asyncio.wait_for(self._all_done.wait(), _TIMEOUT_S)
        for connection in self._connections:
            connection.transport.abort()
        answers = [answer for connection in self._connections for answer in connection.answers]
        ended = [answer for answer in answers if answer.ended_at is not None]
        return {
            "elapsed_s": max((answer.ended_at or 0.0 for answer in ended), default=0.0) - self._begun_at,
            "first_event_s": [answer.first_at - answer.sent_at for answer in ended if answer.first_at is not None],
            "end_s": [(answer.ended_at or 0.0) - answer.sent_at for answer in ended],
            "num_answers": len(answers),
            "num_failures": self._left + sum(self._is_failure(answer) for answer in answers),
        }

    def _is_failure(self, answer: Answer) -> bool:
        try:
            return answer.text() != self._expected
        except (ValueError, LookupError):
            return True

    def _take_next(self) -> bytes | None:
        if self._left == 0:
            return None
        self._left -= 1
        return self._request

    def _done(self) -> None:
        self._num_open -= 1
        if self._num_open == 0:
            self._all_done.set()


async def main() -> None:
    """Answer until there is nothing more to read."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    clients: Clients | None = None
    while line := await lines.readline():
        question, answer = json.loads(line), {}
        match question["do"]:
            case "ask":
                clients = Clients(question)
                await clients.begin()
                answer = await clients.finish()
            case "begin":
                clients = Clients(question)
                await clients.begin()
                await clients.wait_for_events(question["num_events"])
            case "leave":
                clients.leave(question["num_connections"])
            case "finish":
                answer = await clients.finish()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps(answer | {"cpu_s": usage.ru_utime + usage.ru_stime}), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
