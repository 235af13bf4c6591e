"""A permanent connection between a gateway and a replica: messages both ways, all those of one turn of the event loop in one frame.

An engine tells the tokens of a step to all of its streams at once, so that one frame holds them, however many there are. It is a plain
TCP connection, since a request of Serve's would count as traffic and hold up draining for as long as it is open
(docs/decisions/0010-how-answers-travel.md).

Invariants:
- Nobody is listened to before it has proved that it knows the secret, nor before the listener has: an HMAC of the other's random
  bytes (RFC 2104). The secret itself is never sent; what follows is neither encrypted nor signed, like Ray's own traffic without TLS.
- A frame is its length (4 bytes, big-endian) and a JSON array of messages.
- A channel that is closed, by whomever, ends `receive` with `ChannelClosedError`, and `send` does nothing.
"""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

_NONCE_BYTES, _PROOF_BYTES = 32, 32
_HANDSHAKE_TIMEOUT_S = 10.0
_MAX_FRAME_BYTES = 256 * 2**20

In = TypeVar("In")
Out = TypeVar("Out")


class ChannelClosedError(Exception):
    """The other side is gone, or said what this side does not understand."""


class Channel(Generic[Out, In]):
    """One end of a connection, in one event loop."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, outgoing: TypeAdapter[list[Out]], incoming: TypeAdapter[list[In]]
    ) -> None:
        self._reader, self._writer, self._outgoing, self._incoming = reader, writer, outgoing, incoming
        self._waiting: list[bytes] = []
        self.num_frames_sent = self.num_messages_sent = 0
        self.is_closed = False

    def send(self, message: Out) -> None:
        """Send a message with all others of this turn of the loop."""
        if self.is_closed:
            return
        encoded = self._outgoing.dump_json([message])[1:-1]
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append(encoded)

    async def receive(self) -> list[In]:
        """The messages of the next frame. Raises `ChannelClosedError`."""
        try:
            size = int.from_bytes(await self._reader.readexactly(4))
            if size > _MAX_FRAME_BYTES:
                raise ChannelClosedError(f"a frame of {size} bytes")
            return self._incoming.validate_json(await self._reader.readexactly(size))
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            raise ChannelClosedError("the other side is gone") from error
        except ValidationError as error:
            self.close()
            raise ChannelClosedError(f"what came was not understood: {error.error_count()} errors, {error.title}") from error

    def close(self) -> None:
        """Close it after what has been sent; nothing if it is closed."""
        if not self.is_closed:
            self._flush()
            self.is_closed = True
            self._writer.close()

    async def wait_closed(self) -> None:
        """Wait until what has been sent is on its way."""
        with suppress(OSError):
            await self._writer.wait_closed()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting and not self.is_closed:
            body = b"[" + b",".join(waiting) + b"]"
            self._writer.write(len(body).to_bytes(4) + body)
            self.num_frames_sent += 1
            self.num_messages_sent += len(waiting)


async def listen(
    host: str,
    secret: str,
    outgoing: TypeAdapter[list[Out]],
    incoming: TypeAdapter[list[In]],
    serve: Callable[[Channel[Out, In]], Awaitable[None]],
) -> asyncio.Server:
    """Listen on a free port of a host; `serve` is run for each who knows the secret, and its channel closed at its end."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = Channel(reader, writer, outgoing, incoming)
        try:
            async with asyncio.timeout(_HANDSHAKE_TIMEOUT_S):
                await _shake_hands(reader, writer, secret.encode(), b"listener", b"caller")
            await serve(channel)
        except (OSError, asyncio.IncompleteReadError, ChannelClosedError, TimeoutError):
            pass  # whoever called is gone, or is not one of us
        finally:
            channel.close()
            await channel.wait_closed()

    return await asyncio.start_server(greet, host, 0)


async def connect(host: str, port: int, secret: str, outgoing: TypeAdapter[list[Out]], incoming: TypeAdapter[list[In]]) -> Channel[Out, In]:
    """Connect to who listens there. Raises `ChannelClosedError`."""
    writer = None
    try:
        async with asyncio.timeout(_HANDSHAKE_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            await _shake_hands(reader, writer, secret.encode(), b"caller", b"listener")
    except BaseException as error:
        if writer is not None:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        if isinstance(error, OSError | asyncio.IncompleteReadError | TimeoutError):
            raise ChannelClosedError(f"{host}:{port} does not answer: {error!r}") from error
        raise
    return Channel(reader, writer, outgoing, incoming)


async def _shake_hands(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, own: bytes, other: bytes) -> None:
    """Prove to the other side that this one knows the secret, and let it prove the same. The caller proves it first.

    Raises `ChannelClosedError` if it does not.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    writer.write(nonce)
    others_nonce = await reader.readexactly(_NONCE_BYTES)
    if own == b"caller":
        writer.write(_proof(secret, own, others_nonce, nonce))
    if not hmac.compare_digest(await reader.readexactly(_PROOF_BYTES), _proof(secret, other, nonce, others_nonce)):
        raise ChannelClosedError("the other side does not know the secret")
    if own != b"caller":
        writer.write(_proof(secret, own, others_nonce, nonce))


def _proof(secret: bytes, who: bytes, challenge: bytes, nonce: bytes) -> bytes:
    return hmac.digest(secret, who + challenge + nonce, hashlib.sha256)
