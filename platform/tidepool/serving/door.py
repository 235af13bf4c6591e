"""A port of the gateway's own, on which clients reach it without Serve's proxy in between. Knows no Ray.

Serve's proxy hands each event of a stream from process to process, which costs more than all that the gateway does with it
(docs/decisions/0014-a-door-of-the-gateway-s-own.md).

Several gateways of a node may listen on the port, and the kernel gives each connection to one of them.
"""

import asyncio
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from tidepool.errors import ClusterError

_BACKLOG = 2048
_KEEP_ALIVE_S = 60  # a client's pool finds its connection open when it asks again


class Door:
    """An ASGI application on a port, in the event loop that opens it. `tls`: uvicorn's options `ssl_...`, which Serve's are named after."""

    def __init__(self, app: ASGIApp, host: str, port: int, tls: Mapping[str, Any] | None = None) -> None:
        self._host, self._port = host, port
        self._server = _Server(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                **(tls or {}),
            )
        )
        self._serving: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Listen from now on. Raises `ClusterError` if others have the port."""
        listener = _listen(self._host, self._port)
        self._serving = asyncio.get_running_loop().create_task(self._server.serve(sockets=[listener]))

    def check(self) -> None:
        """Raises whatever ended it, or `ClusterError`, if it was open and nobody listens any more."""
        if self._serving is not None and self._serving.done():
            self._serving.result()
            raise ClusterError(f"Nobody listens on port {self._port} any more: Serve replaces this gateway.")

    async def close(self, patience_s: float) -> None:
        """Take no more connections, and wait so long for the answers that are under way."""
        if self._serving is not None:
            self._server.config.timeout_graceful_shutdown = patience_s  # type: ignore[assignment]  # any number of seconds
            self._server.should_exit = True
            await self._serving


class _Server(uvicorn.Server):
    """One that leaves the process's signals to whoever owns the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        message = f"The gateway cannot listen on {host}, port {port} ({error.strerror}): name a free one in `gateway: {{port: ...}}`."
        raise ClusterError(message) from error
    return listener
