"""A client that costs little beside what it measures: completions over HTTP, streamed, with the time of each event.

A request is a connection of its own, written and read by hand: on two cores a full client would take a good part of what it measures.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answered:
    """What came of a request: times in seconds of `time.perf_counter`, one for each event that brought text."""

    asked_at: float
    status: int = 0
    texts: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    fingerprint: str = ""
    error: str = ""
    is_done: bool = False

    @property
    def is_failure(self) -> bool:
        return self.status != 200 or bool(self.error) or not self.is_done

    @property
    def ttft_s(self) -> float:
        """From the request to its first text."""
        return self.times[0] - self.asked_at

    @property
    def gaps_s(self) -> list[float]:
        """Between one text and the next."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


async def complete(host: str, port: int, body: dict[str, Any], path: str = "/v1/completions") -> Answered:
    """Ask once, with a stream. Nothing is raised: what went wrong stands in the result."""
    answered = Answered(time.perf_counter())
    try:
        await _complete(answered, host, port, json.dumps(body | {"stream": True}).encode(), path)
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        answered.error = repr(error)
    return answered


async def _complete(answered: Answered, host: str, port: int, body: bytes, path: str) -> None:
    reader, writer = await asyncio.open_connection(host, port, limit=2**20)
    try:
        headers = [f"POST {path} HTTP/1.1", f"Host: {host}", "Connection: close", "Content-Type: application/json"]
        head = "\r\n".join([*headers, f"Content-Length: {len(body)}", "", ""])
        writer.write(head.encode() + body)
        answered.status = int((await reader.readline()).split()[1])
        async for line in reader:  # the lengths of HTTP's chunks begin with no "data: "
            if not line.startswith(b"data: "):
                if answered.status != 200:
                    answered.error += line.decode(errors="replace")
                continue
            now = time.perf_counter()
            if line.startswith(b"data: [DONE]"):
                answered.is_done = True
                break
            event = json.loads(line[6:])
            if "error" in event:
                answered.error = str(event["error"])
                break
            answered.fingerprint = event.get("system_fingerprint") or answered.fingerprint
            for choice in event["choices"]:
                if choice["text"]:
                    answered.texts.append(choice["text"])
                    answered.times.append(now)
    finally:
        writer.close()


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
