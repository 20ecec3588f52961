"""An endpoint that does what a test tells it, byte by byte: drops, late answers, silence. No server code of ours."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from serve_fakes import SPEC
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from dualvla.wire import messages
from dualvla.wire.openpi import pack, unpack


@dataclass
class Connection:
    """One connection as the server saw it. received: the messages, unpacked."""

    socket: ServerConnection
    path: str
    session: str | None
    received: list[Any] = field(default_factory=list)

    def greet(self, resumed: bool = False, **extra: Any) -> None:
        session = {"id": self.session, "seq": 0, "resumed": resumed}
        self.socket.send(pack({**messages.metadata(SPEC), "session": session, **extra}))

    def receive(self) -> dict[str, Any]:
        message = unpack(self.socket.recv(timeout=20))
        self.received.append(message)
        return message

    def answer(self, message: dict[str, Any], seq: int = 1, **changes: Any) -> None:
        """The reply to `message`: its step in every action."""
        actions = np.full((SPEC.horizon, 7), message["step"], np.float32)
        reply = {"actions": actions, "reasoning": "so", "keyframe": True, "reasoning_tokens": 1, "seq": seq}
        self.socket.send(pack({**reply, "id": message["id"], **changes}))

    def drop(self) -> None:
        """As a cable that is pulled: no closing handshake."""
        self.socket.socket.shutdown(2)

    def wait_closed(self) -> int | None:
        """The close code that the client sent."""
        with contextlib.suppress(ConnectionClosed):
            self.socket.recv(timeout=20)
        return self.socket.protocol.close_code


Script = Callable[[Connection], None]


@contextlib.contextmanager
def scripted(*scripts: Script) -> Iterator[tuple[str, list[Connection]]]:
    """Connection number i follows scripts[i] (the last one for all that follow). Yields the URL and the connections.

    A script that fails makes the `with` fail.
    """
    connections: list[Connection] = []
    failures: list[AssertionError | TimeoutError] = []
    lock = threading.Lock()

    def handle(socket: ServerConnection) -> None:
        request = socket.request
        connection = Connection(socket, request.path, request.headers.get(messages.SESSION_HEADER))
        with lock:
            connections.append(connection)
            script = scripts[min(len(connections), len(scripts)) - 1]
        try:
            script(connection)
        except (AssertionError, TimeoutError) as error:
            failures.append(error)
        except ConnectionClosed:
            pass  # the client may leave when it likes

    with serve(handle, "127.0.0.1", 0, compression=None, max_size=None, close_timeout=1) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}", connections
        finally:
            server.shutdown()
            thread.join()
    assert not failures, failures


def obedient(connection: Connection) -> None:
    """Answers everything."""
    connection.greet()
    for seq in range(1, 10_000):
        message = connection.receive()
        if messages.is_reset(message):
            connection.socket.send(pack(dict(messages.RESET)))
        else:
            connection.answer(message, seq)
