"""Whether a Ray cluster's address can be reached: asked before Ray, which goes on trying a closed port for minutes."""

import socket


def listens(address: str, timeout_s: float) -> bool:
    """False if nothing listens at `host:port`; any other address (`auto`, `ray://...`) is one that Ray itself looks up."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in host:
        return True
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except OSError:
        return False
    return True
