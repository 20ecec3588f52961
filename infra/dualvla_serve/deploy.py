"""The endpoint on Ray Serve: an ingress that speaks to clients, and model replicas that answer in batches.

The ingress knows keys, codecs and sessions; a replica knows a policy. A session always goes to the same replica, by
consistent hashing, because its state lives there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from dualvla.errors import DualVLAError, PlatformError, PolicyError, ServerError, UsageError
from dualvla.schema import Observation, PolicyReply, PolicySpec
from dualvla.wire.openpi import WireLimits
from dualvla_serve.app import create_app
from dualvla_serve.backend import LoadPolicy, PolicyRunner
from dualvla_serve.gate import LOCAL_HOSTS
from dualvla_serve.keys import KeyRing

log = logging.getLogger("dualvla.serve")

# A WebSocket connection is one ongoing request of the ingress for as long as it lives.
_MOST_CONNECTIONS = 1024
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_QUIET = {"log_level": "WARNING"}
# Where a process takes longer than Serve's 5 s to start, Serve kills its proxy and starts it anew, for ever.
_PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}


@dataclass(frozen=True)
class EndpointConfig:
    """One endpoint. Without keys, `host` must be this machine's own address.

    max_batch_size: observations per call of the policy. *_per_replica: what Ray reserves, fractions allowed.
    """

    name: str = "dualvla"
    host: str = "127.0.0.1"
    port: int = 8000
    ring: KeyRing | None = None
    replicas: int = 1
    max_batch_size: int = 16
    infer_timeout_s: float = 30.0
    cpus_per_replica: float = 0.5
    gpus_per_replica: float = 0.0
    limits: WireLimits = field(default_factory=WireLimits)

    def __post_init__(self) -> None:
        if self.ring is None and self.host not in LOCAL_HOSTS:
            raise UsageError(
                f"Without keys an endpoint listens on this machine only, not on '{self.host}'.",
                "pass --keys-file, or leave --host out",
            )
        if self.replicas < 1:
            raise UsageError(f"{self.replicas} replicas cannot answer.", "ask for 1 or more")


class ServeBackend:
    """A `Backend` whose policy lives in Ray Serve replicas."""

    def __init__(self, model: DeploymentHandle, timeout_s: float):
        self._model = model
        self._timeout_s = timeout_s

    async def describe(self) -> PolicySpec:
        with _translated():
            return await asyncio.wait_for(self._model.describe.remote(), self._timeout_s)

    async def infer(self, observation: Observation, session: str) -> PolicyReply:
        with _translated():
            call = self._model.options(session_id=session).infer.remote(observation, session)
            return await asyncio.wait_for(call, self._timeout_s)

    async def reset(self, session: str) -> None:
        with _translated():
            await asyncio.wait_for(self._model.options(session_id=session).reset.remote(session), self._timeout_s)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Ray's errors as ours: what the policy raised, or that no replica could be asked."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, DualVLAError):
            raise error.cause from None
        raise PolicyError(f"The policy raised {type(error.cause).__name__}.") from error
    except (RayError, RayServeException, TimeoutError) as error:
        raise ServerError(f"No replica answered: {type(error).__name__}: {error}.") from error


class ModelReplica:
    def __init__(self, load: LoadPolicy, max_batch_size: int):
        self._runner = PolicyRunner(load, max_batch_size)

    async def describe(self) -> PolicySpec:
        return await self._runner.describe()

    async def infer(self, observation: Observation, session: str) -> PolicyReply:
        return await self._runner.infer(observation, session)

    async def reset(self, session: str) -> None:
        await self._runner.reset(session)


class Ingress:
    def __init__(self, model: DeploymentHandle, config: EndpointConfig):
        self._model = model
        self._config = config

    def __serve_build_asgi_app__(self) -> FastAPI:  # Serve's name for it
        backend = ServeBackend(self._model, self._config.infer_timeout_s)
        return create_app(backend, self._config.ring, self._config.limits)


def build(load: LoadPolicy, config: EndpointConfig) -> serve.Application:
    model = serve.deployment(
        name="Model",
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        max_ongoing_requests=_MOST_CONNECTIONS,
        max_constructor_retry_count=1,  # a policy that does not load once does not load twice
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER,
            request_router_kwargs={"num_fallback_replicas": 0},  # another replica does not know the session
        ),
    )(ModelReplica)
    ingress = serve.deployment(
        name="Ingress",
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=_MOST_CONNECTIONS,
        graceful_shutdown_timeout_s=2.0,  # connected robots would keep it open for ever
    )(serve.ingress()(Ingress))
    return ingress.bind(model.bind(load, config.max_batch_size), config)


@contextlib.contextmanager
def running(load: LoadPolicy, config: EndpointConfig) -> Iterator[str]:
    """Serves on the connected Ray cluster while the context lasts; yields the URL once the policy is warm.

    Raises: PlatformError if the port is taken; PolicyError if the policy does not load or warm up.
    """
    port = config.port or free_port(config.host)
    _require_free(config.host, port)
    _start(config.host, port)
    try:
        serve.run(build(load, config), name=config.name, route_prefix="/", logging_config=_QUIET)
    except RuntimeError as error:
        reason = _failure(config.name) or str(error)
        _stop(config.name)
        raise PolicyError(f"The endpoint did not start: {reason}", "try the checkpoint with `dualvla eval`") from error
    try:
        base = f"{config.host if ':' not in config.host else f'[{config.host}]'}:{port}"
        _wait_until_listening(f"http://{base}/healthz")
        yield base
    finally:
        _stop(config.name)


def _start(host: str, port: int) -> None:
    http = HTTPOptions(host=host, port=port, request_timeout_s=None)
    start = functools.partial(
        serve.start,
        http_options=http,
        logging_config=_QUIET,
        controller_options={"runtime_env": {"env_vars": _PATIENCE}},
    )
    try:
        try:
            start()
        except TimeoutError:  # after a fixed 60 s, but Serve goes on starting, and the second call joins it
            log.warning("this machine is busy: Ray Serve takes long to start")
            start()
    except (RayError, TimeoutError) as error:
        raise PlatformError(f"Ray Serve did not start: {error}", "try again when this machine is less busy") from error


def _failure(name: str) -> str:
    """The last line of what Serve says of each deployment that did not come up."""
    application = serve.status().applications.get(name)
    messages = [d.message.strip() for d in application.deployments.values()] if application else []
    return "; ".join(message.splitlines()[-1] for message in messages if message)


def _stop(name: str) -> None:
    """Ends this endpoint, and Serve with it unless the cluster serves something else."""
    serve.delete(name)
    if not serve.status().applications:
        serve.shutdown()


def free_port(host: str) -> int:
    with socket.create_server((host, 0), family=_family(host)) as probe:
        return probe.getsockname()[1]


def _require_free(host: str, port: int) -> None:
    try:
        socket.create_server((host, port), family=_family(host)).close()
    except OSError as error:
        raise PlatformError(f"Cannot listen on {host}:{port}: {error}.", "pass another --port, or 0 for any") from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _wait_until_listening(url: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise PlatformError(
                    f"The endpoint does not answer at {url}: {error}.",
                    "look for another Serve instance of this Ray cluster, with another host or port",
                ) from error
        time.sleep(0.1)
