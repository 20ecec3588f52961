"""A replica's own HTTP and WebSocket listener: the same app as behind Serve's proxy, without the way through it.

Same keys, limits, batches and TLS files, since it is the same process. Knows uvicorn and one ASGI app.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from dualvla.errors import PlatformError
from dualvla.wire.openpi import WireLimits
from dualvla_serve.config import Tls

_GRACE_S = 2


@dataclass
class Listener:
    port: int
    server: uvicorn.Server
    task: asyncio.Task[None]

    async def close(self) -> None:
        self.server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


def bind(host: str, first: int, last: int) -> socket.socket:
    """The first port of the range that is free; (0, 0) for any. Raises: PlatformError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(first, last + 1):
        try:
            sock = socket.create_server((host, port), family=family, backlog=512)
        except OSError:
            continue
        # Inherited by connections. asyncio does it only for sockets of an explicit protocol, and this one has none:
        # what takes two writes, or more than one segment, would wait 40 ms for the other side's delayed ACK.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    raise PlatformError(f"No port from {first} to {last} of {host} is free.", "pass other --direct-ports")


async def listen(
    app: ASGIApp, sock: socket.socket, tls: Tls | None, limits: WireLimits, ping_s: float = 20.0
) -> Listener:
    """Serves in the running event loop until closed; returns once it accepts connections.

    ping_s: a connection whose other end has gone without a word is found out after two of these.

    Raises: PlatformError if the TLS files cannot be used.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",  # at DEBUG it would log the headers of requests, and so keys
        access_log=False,
        lifespan="off",
        ws="websockets-sansio",
        ws_max_size=2
        * limits.max_message_bytes,  # a message over the limit is answered; one far over it cuts the connection
        ws_ping_interval=ping_s,
        ws_ping_timeout=ping_s,
        ws_per_message_deflate=False,  # images are the bulk, and deflate costs more time than it saves
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )
    try:
        config.load()
    except OSError as error:
        raise PlatformError(
            f"The TLS files cannot be used: {error}.", "pass PEM files to --cert and --key-file"
        ) from error
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started:
        if task.done():
            task.result()
            raise PlatformError("The listener ended before it began.", "see the log above")
        await asyncio.sleep(0.005)
    return Listener(sock.getsockname()[1], server, task)
