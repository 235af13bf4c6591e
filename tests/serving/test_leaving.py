"""A client that leaves: its blocks are free before the step that is going on has ended, and no other step is computed for it."""

import asyncio
import json
import threading
from typing import Any

import pytest

from tests.serving.local import LocalModel, gateway_of
from tidepool.serving.connection import while_connected

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tides", "prompt": ["the tide", "the pool"], "n": 2, "logprobs": 1, "max_tokens": 100, "temperature": 0},
    "/v1/chat/completions": {"model": "tides", "messages": [{"role": "user", "content": "the tide"}], "max_tokens": 100, "temperature": 0},
    "/v1/responses": {"model": "tides", "input": "the tide", "max_output_tokens": 100, "temperature": 0},
    "/v1/embeddings": {"model": "tides", "input": ["the tide " * 50] * 3},
}


class Gate:
    """Lets a model take some steps, and then stops it in the middle of one."""

    def __init__(self, model: LocalModel, num_steps: int) -> None:
        self.stuck, self.open = threading.Event(), threading.Event()
        self._left = num_steps
        model.engine._runner._base.model.layers[0].register_forward_pre_hook(self._pass)

    def _pass(self, *_: Any) -> None:
        self._left -= 1
        if self._left < 0:
            self.stuck.set()
            assert self.open.wait(30)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_the_blocks_of_a_client_that_leaves_are_free_within_the_step(path: str, stream: bool) -> None:
    is_streamed = stream and path != "/v1/embeddings"
    model = LocalModel(max_step_tokens=32, max_batch_size=8)
    gate = Gate(model, num_steps=3)
    engine, sent = model.engine, []
    body = json.dumps(BODIES[path] | ({"stream": True} if is_streamed else {})).encode()

    async def run() -> None:
        content = [{"type": "http.request", "body": body, "more_body": False}]
        at_leave: list[Any] = []

        async def receive() -> dict[str, Any]:
            if content:
                return content.pop()
            await asyncio.to_thread(gate.stuck.wait, 30)
            at_leave.append(engine.stats())
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
        try:
            await asyncio.wait_for(gateway_of(model)(scope, receive, send), 60)
            before, after = at_leave[0], engine.stats()
            assert before.num_running > 0
            assert before.num_free_blocks < before.num_blocks
            assert (after.num_running, after.num_queued) == (0, 0), "while its step is still being computed"
            assert after.num_free_blocks == after.num_blocks
        finally:
            gate.open.set()
        assert engine._driver is not None
        await engine._driver
        assert engine.stats().num_steps == before.num_steps, "no step was begun after the client had left"

    asyncio.run(run())
    assert is_streamed == any(b"data: " in message.get("body", b"") for message in sent)


def test_a_client_that_leaves_in_the_moment_of_its_answer_has_had_it() -> None:
    async def run() -> list[dict[str, Any]]:
        loop, left, done = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        errors: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: errors.append(context))

        async def receive() -> dict[str, Any]:
            await left.wait()
            return {"type": "http.disconnect"}

        async def work() -> str:
            await done.wait()
            return "answer"

        waiting = asyncio.create_task(while_connected(receive, work(), loop.time() + 60))
        for _ in range(3):
            await asyncio.sleep(0)  # both wait
        left.set()
        done.set()
        assert await waiting == "answer"
        for _ in range(3):
            await asyncio.sleep(0)
        return errors

    assert asyncio.run(run()) == []
