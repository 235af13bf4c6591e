"""Hand-written stand-ins for what lies behind the gateway: versions, a registry's lookup and a backend."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from tidepool.inference.engine import Output
from tidepool.registry import ModelVersion
from tidepool.serving.backend import Call, Frame, Started

BASE_DIGEST = "ba5e" * 16


def full(name: str = "tides", number: int = 1, digest: str = BASE_DIGEST) -> ModelVersion:
    return ModelVersion(name, number, "full", digest, (), None, None, {}, {}, "2026-11-02T10:00:00+00:00")


def adapter(name: str = "bot", number: int = 1, base_digest: str = BASE_DIGEST) -> ModelVersion:
    digest = f"{number:02d}ad" * 16
    return ModelVersion(name, number, "adapter", digest, (), "tides@1", base_digest, {}, {}, "2026-11-02T10:00:00+00:00")


class FakeBackend:
    """Answers each call with the frames it was given; an exception among them is raised there, an event is waited for."""

    def __init__(self, *frames: Frame | Exception | asyncio.Event) -> None:
        self.frames: Sequence[Frame | Exception | asyncio.Event] = frames or words("Hel", "lo", "!")
        self.calls: list[Call] = []
        self.closed: list[str] = []
        self.waiting = asyncio.Event()

    async def generate(self, call: Call) -> AsyncGenerator[Frame, None]:
        self.calls.append(call)
        try:
            for frame in self.frames:
                if isinstance(frame, Exception):
                    raise frame
                if isinstance(frame, asyncio.Event):
                    self.waiting.set()
                    await frame.wait()
                else:
                    yield frame
        finally:
            self.closed.append(call.request_id)


def words(*texts: str, finish_reason: str = "stop", num_prompt_tokens: int = 5) -> list[Frame]:
    """A whole answer of one token a text; the last one ends it."""
    outputs: list[Frame] = [Output((index,), text) for index, text in enumerate(texts[:-1])]
    return [Started(num_prompt_tokens), *outputs, Output((len(texts),), texts[-1], finish_reason)]  # type: ignore[arg-type]
