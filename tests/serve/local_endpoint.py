"""A whole endpoint in a thread of the test's process: all protocols over real sockets, Ray left out."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from serve_fakes import load_counting

from dualvla_serve.app import create_app
from dualvla_serve.batching import LoadPolicy
from dualvla_serve.config import EndpointConfig
from dualvla_serve.estop import Latch
from dualvla_serve.hub import Hub, HubLink
from dualvla_serve.keys import KeyFile
from dualvla_serve.link import latch_url
from dualvla_serve.listener import bind, listen
from dualvla_serve.models import ModelSource
from dualvla_serve.replica import Replica


class LocalEndpoint:
    """One replica and its hub, or another replica at the hub of the one that it stands `beside`.

    `ask` runs a coroutine in the event loop, which is one for all replicas of a hub.
    """

    def __init__(
        self,
        config: EndpointConfig,
        models: dict[str, ModelSource],
        beside: LocalEndpoint | None,
        name: str,
        ping_s: float,
    ):
        self.ping_s = ping_s
        self.config, self.name = config, name
        self.models = models
        self.address = ""
        self.replica: Replica
        self.link: HubLink | None = None if beside is None else beside.link
        self._beside = beside
        self._loop = asyncio.new_event_loop() if beside is None else beside._loop
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def ask(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def __enter__(self) -> LocalEndpoint:
        if self._beside is None:
            self._thread.start()
        self.ask(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self.ask(self._close())
        if self._beside is None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    async def _start(self) -> None:
        config = self.config
        if self.link is None:
            self.link = Hub(Latch(latch_url(config.state_dir, config.name)), config.lifetimes.idle_s)
        self.replica = Replica(config, self.link, self.name)
        page = None
        if config.status_page:
            from dualvla_serve.status_page import page
        keys = KeyFile(config.keys_file) if config.keys_file else None
        app = create_app(self.replica, keys.identify if keys else None, page)
        self.listener = await listen(
            app, bind(config.host, config.port, config.port), config.tls, config.wire, self.ping_s
        )
        self.address = f"{config.host}:{self.listener.port}"
        self.replica.listener = f"ws://{self.address}"
        await self.replica.start(self.models)

    async def _close(self) -> None:
        await self.replica.close()
        await self.listener.close()

    async def kill(self) -> None:
        """As a process that dies: connections break, nothing is written down."""
        for server in self.listener.server.servers:
            server.close()
        for connection in list(self.listener.server.server_state.connections):
            connection.transport.abort()


def endpoint(
    loader: LoadPolicy = load_counting,
    *,
    models: dict[str, ModelSource] | None = None,
    beside: LocalEndpoint | None = None,
    name: str = "local",
    ping_s: float = 20.0,
    **changes: Any,
) -> LocalEndpoint:
    """changes: fields of EndpointConfig; the port is any free one, and actions are not limited, unless they say so."""
    config = EndpointConfig(**{"port": 0, "embodiment": "unlimited", **changes})
    return LocalEndpoint(config, models or {"policy": ModelSource(loader, "1")}, beside, name, ping_s)


@contextlib.contextmanager
def listening(loader: LoadPolicy = load_counting, **changes: Any) -> Iterator[str]:
    """HOST:PORT of `endpoint(...)`."""
    with endpoint(loader, **changes) as running:
        yield running.address
