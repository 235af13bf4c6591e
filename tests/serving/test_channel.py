"""Channels: who may talk, what comes through, and that what is said in one turn of the loop travels in one frame."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.serving.fakes import BASE_DIGEST, adapter
from tidepool.errors import ApiKeyError, EngineBusyError, StoreUnreachableError
from tidepool.inference.engine import Output, TokenLogprobs
from tidepool.inference.sampling_parameters import SamplingParameters
from tidepool.serving.backend import Call, Chat, ContextLengthError, Message, Spelling, Started, ToolCall
from tidepool.serving.channel import Channel, ChannelClosedError, connect, listen
from tidepool.serving.router import ReplicaState
from tidepool.serving.wire import (
    TO_GATEWAY,
    TO_REPLICA,
    Cancel,
    Done,
    Failed,
    Gone,
    ReplicaFaultError,
    Report,
    Submit,
    Told,
    Warm,
    error_of,
    failure,
)

SECRET = "5ec12e7"


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Any, Any]]:
    """A gateway's and a replica's end of a channel."""
    arrived: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    over = asyncio.Event()

    async def serve(channel: Any) -> None:
        arrived.set_result(channel)
        await over.wait()

    server = await listen("127.0.0.1", SECRET, TO_GATEWAY, TO_REPLICA, serve)
    ours = await connect("127.0.0.1", server.sockets[0].getsockname()[1], SECRET, TO_REPLICA, TO_GATEWAY)
    try:
        yield ours, await arrived
    finally:
        over.set()
        ours.close()
        await ours.wait_closed()
        server.close()
        await server.wait_closed()


CALLS = [
    Call("r", BASE_DIGEST, None, "tide \N{WATER WAVE} \0"),
    Call("r", BASE_DIGEST, adapter(), (1, 2, 3), SamplingParameters(seed=2**63, stop=("x",), logit_bias=((3, -1.5),)), resumed=((1,), ())),
    Call("r", BASE_DIGEST, None, ()),
    Call(
        "r",
        BASE_DIGEST,
        None,
        Chat((Message("assistant", "", (ToolCall("1", "look", {"at": [None, {"x": 1.5}]}),)),), ({"type": "function"},)),
        SamplingParameters(stop_token_ids=frozenset({1, 2}), json_schema="{}", n=3),
        echo=True,
    ),
]
TOLD = [
    Told("r", Started(5, (1, 2), "the tide")),
    Told("r", Spelling({3: b"\xf0\x9f"})),
    Told("r", Output((1,), "a", None, 2, (TokenLogprobs(1, float("-inf"), ((2, -0.1),)),), (None, TokenLogprobs(4, -0.5)))),
    Told("r", Output((), "", "stop", embedding=(0.1, -2.5e-8))),
    Done("r"),
    Failed("r", "EngineBusyError", "full"),
    Gone("r", is_handed_back=True),
    Report(ReplicaState(frozenset({"a"}), frozenset(), 1, 2, 3, 4, True), has_prefixes=False),
]


def test_every_message_arrives_as_it_was() -> None:
    async def run() -> None:
        async with pair() as (ours, theirs):
            asked = [*map(Submit, CALLS), Cancel("r"), Warm("w", adapter())]
            for message in asked:
                ours.send(message)
            assert await theirs.receive() == asked
            for message in TOLD:
                theirs.send(message)
            assert await ours.receive() == TOLD

    asyncio.run(run())


def test_what_is_said_in_one_turn_travels_in_one_frame() -> None:
    async def run() -> None:
        async with pair() as (ours, theirs):

            async def say(queue: asyncio.Queue[int]) -> None:
                while True:
                    theirs.send(Told("r", Output((await queue.get(),), "a")))

            queues: list[asyncio.Queue[int]] = [asyncio.Queue() for _ in range(16)]
            tasks = [asyncio.create_task(say(queue)) for queue in queues]
            for step in range(20):
                for queue in queues:
                    queue.put_nowait(step)  # as an engine's step does
                assert len(await ours.receive()) == 16
            assert (theirs.num_frames_sent, theirs.num_messages_sent) == (20, 320)
            for task in tasks:
                task.cancel()

    asyncio.run(run())


def test_the_end_of_either_side_is_noticed_and_sending_then_does_nothing() -> None:
    async def run() -> None:
        async with pair() as (ours, theirs):
            ours.send(Cancel("last"))
            ours.close()
            ours.send(Cancel("r"))
            assert await theirs.receive() == [Cancel("last")], "what was sent before is not lost"
            with pytest.raises(ChannelClosedError):
                await theirs.receive()

    asyncio.run(run())


@pytest.mark.parametrize("said", [b"", b"x" * 32, b"x" * 64 + b"\0\0\0\2[]", b"GET / HTTP/1.1\r\n\r\n" * 10])
def test_who_does_not_know_the_secret_is_not_served(said: bytes) -> None:
    async def run() -> None:
        served = []

        async def serve(channel: Channel[Any, Any]) -> None:
            served.append(channel)

        server = await listen("127.0.0.1", SECRET, TO_GATEWAY, TO_REPLICA, serve)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ChannelClosedError):
            await connect("127.0.0.1", port, "another", TO_REPLICA, TO_GATEWAY)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(said)
        writer.write_eof()
        assert len(await reader.read()) == 32, "random bytes, and no proof"
        writer.close()
        server.close()
        assert served == []

    asyncio.run(run())


def test_a_listener_that_does_not_know_the_secret_is_not_spoken_to() -> None:
    async def run() -> None:
        heard: list[bytes] = []

        async def pretend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonce = await reader.readexactly(32)
            writer.write(nonce)
            proof = await reader.readexactly(32)
            writer.write(proof)  # what the caller said itself is no proof
            heard.append(await reader.read())
            writer.close()

        server = await asyncio.start_server(pretend, "127.0.0.1", 0)
        with pytest.raises(ChannelClosedError, match="does not know the secret"):
            await connect("127.0.0.1", server.sockets[0].getsockname()[1], SECRET, TO_REPLICA, TO_GATEWAY)
        server.close()
        assert b"".join(heard) == b""

    asyncio.run(run())


def test_what_is_not_understood_closes_the_channel() -> None:
    async def run() -> None:
        for body in (b'[{"kind":"shutdown"}]', b"[", b'[{"kind":"cancel"}]'):
            async with pair() as (ours, theirs):
                ours._writer.write(len(body).to_bytes(4) + body)
                with pytest.raises(ChannelClosedError, match="not understood"):
                    await theirs.receive()
                with pytest.raises(ChannelClosedError):
                    await ours.receive()

    asyncio.run(run())


def test_errors_of_ours_arrive_as_they_were_and_others_without_their_message() -> None:
    for error in (EngineBusyError("full"), ContextLengthError("long"), StoreUnreachableError("away"), ApiKeyError("")):
        found = error_of(failure("r", error))
        assert (type(found), str(found)) == (type(error), str(error))
    other = error_of(failure("r", ValueError("the prompt")))
    assert type(other) is ReplicaFaultError
    assert "the prompt" not in str(other)
