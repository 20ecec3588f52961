"""The endpoint on Ray Serve: replicas that hold protocols, sessions and models in one process, and one hub.

A robot reaches a replica through Serve's proxy or directly. Which checkpoints answer stands in the deployment's
`user_config`, so that a changed Serve config exchanges them under connected robots.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, HTTPOptions

from dualvla.config import from_dict
from dualvla.errors import DualVLAError, PlatformError, PolicyError, UsageError
from dualvla.schema import Observation, PolicyReply, PolicySpec
from dualvla_serve import link, logs, scaling
from dualvla_serve.app import create_app
from dualvla_serve.batching import Asked, LoadPolicy
from dualvla_serve.config import EndpointConfig
from dualvla_serve.keys import KeyFile
from dualvla_serve.link import RayHub
from dualvla_serve.listener import Listener, bind, listen
from dualvla_serve.models import ModelSource
from dualvla_serve.replica import Replica

log = logging.getLogger("dualvla.serve")

DEPLOYMENT = "Policy"
DEFAULT_MODEL = "policy"

# A WebSocket connection is one ongoing request of a replica for as long as it lives.
_MOST_CONNECTIONS = 4096
_QUIET = {"log_level": "WARNING", "enable_access_log": False}
# Where a process takes longer than Serve's 5 s to start, Serve kills its proxy and starts it anew, for ever.
_PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
_SWITCH_S = 0.0005  # Python's 5 ms would let the policy's thread hold up every message for as long

OpenSource = Callable[[str], ModelSource]


class PolicyReplica:
    """One replica. source: makes a model of what `user_config` names, {"models": {name: text}}."""

    def __init__(self, config: EndpointConfig, source: OpenSource):
        logs.use_json()
        sys.setswitchinterval(_SWITCH_S)
        self._config = config
        self._source = source
        hub = RayHub(config.name, config.state_dir, config.lifetimes.idle_s)
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = Replica(config, hub, name, self._exchange)
        self._keys = KeyFile(config.keys_file) if config.keys_file is not None else None
        self._app = create_app(self._replica, self._keys.identify if self._keys else None, _status_page(config))
        self._listener: Listener | None = None
        self._update: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:  # Serve's name for it
        return self._app

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """The first time, before any request: loads and warms up. Later: exchanges models while robots go on."""
        if not user_config["models"]:
            raise UsageError("No model is named to be served.", "name one in user_config: {models: {NAME: CHECKPOINT}}")
        sources = {name: await asyncio.to_thread(self._source, text) for name, text in user_config["models"].items()}
        if self._replica.ready:
            self._update = asyncio.create_task(self._replica.update(sources))
            return
        if self._config.direct_ports is not None and self._listener is None:
            await self._listen(*self._config.direct_ports)
        await self._replica.start(sources)
        gc.collect()
        gc.freeze()  # what lives as long as the replica is not looked through again at every collection

    async def _sources(self, models: Mapping[str, str]) -> dict[str, ModelSource]:
        return {name: await asyncio.to_thread(self._source, text) for name, text in models.items()}

    async def _exchange(self, models: Mapping[str, str]) -> None:
        """A model that does not load leaves its old version at work; a wrong folder leaves all as they are."""
        try:
            await self._replica.update(await self._sources(models))
        except DualVLAError as error:
            log.error("the models stay as they are: %s", error)

    async def _listen(self, first: int, last: int) -> None:
        config = self._config
        self._listener = await listen(self._app, bind(config.host, first, last), config.tls, config.wire)
        host = config.public_host or config.host
        if host in ("0.0.0.0", "::"):
            host = ray.util.get_node_ip_address()
        host = f"[{host}]" if ":" in host else host
        self._replica.listener = f"{'wss' if config.tls else 'ws'}://{host}:{self._listener.port}"

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {scaling.METRIC: float(self._replica.queue_length)}

    async def describe(self, model: str = "") -> PolicySpec:
        """For a Serve handle."""
        return self._replica.models.get(model).runner.spec

    async def infer_batch(
        self,
        observations: Sequence[Observation],
        sessions: Sequence[str],
        states: Sequence[Mapping[str, Any]],
        model: str = "",
    ) -> list[tuple[PolicyReply, dict[str, Any]]]:
        """For a Serve handle: replies, and what the policy remembers of each session from now on. Limits on actions are
        for robots, and not applied. Raises: DualVLAError."""
        self._replica.stop_view.check()
        runner = self._replica.models.get(model).runner
        calls = [runner.infer(Asked(o, s, m)) for o, s, m in zip(observations, sessions, states, strict=True)]
        return [(answered.reply, answered.state) for answered in await asyncio.gather(*calls)]

    async def __del__(self) -> None:
        if self._listener is not None:
            await self._replica.close()
            await self._listener.close()


def _status_page(config: EndpointConfig) -> Callable[[], str] | None:
    if not config.status_page:
        return None
    from dualvla_serve.status_page import page

    return page


def build(source: OpenSource, models: Mapping[str, str], config: EndpointConfig) -> serve.Application:
    """models: name -> what `source` takes, such as a checkpoint folder; the first is the default."""
    sizes = config.scaling
    automatic = (
        AutoscalingConfig(
            min_replicas=max(1, sizes.least),
            initial_replicas=sizes.replicas,
            max_replicas=sizes.most,
            target_ongoing_requests=sizes.target_waiting,
            upscale_delay_s=5.0,
            downscale_delay_s=120.0,
            metrics_interval_s=1.0,
            look_back_period_s=5.0,
            policy=AutoscalingPolicy(policy_function="dualvla_serve.scaling:by_queue"),
        )
        if sizes.automatic
        else None
    )
    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=None if automatic else sizes.replicas,
        autoscaling_config=automatic,
        ray_actor_options={"num_cpus": sizes.cpus, "num_gpus": sizes.gpus},
        max_ongoing_requests=_MOST_CONNECTIONS,
        max_constructor_retry_count=1,  # a policy that does not load once does not load twice
        graceful_shutdown_timeout_s=5.0,  # connected robots would keep it open for ever; they resume elsewhere
        user_config={"models": dict(models)},
    )
    return deployment(serve.ingress()(PolicyReplica)).bind(config, source)


def application(args: Mapping[str, Any]) -> serve.Application:
    """For Serve's YAML: `import_path: dualvla_serve.deploy:application`, `args`: the fields of `EndpointConfig`. The
    models stand in the deployment's `user_config`. Raises: UsageError for an unknown field."""
    config = from_dict(EndpointConfig, args, "args")
    return build(checkpoint_source(config), {}, config)


def checkpoint_source(config: EndpointConfig) -> OpenSource:
    from dualvla_serve import checkpoint

    return functools.partial(checkpoint.source, device="cuda" if config.scaling.gpus else "cpu")


@contextlib.contextmanager
def running(load: LoadPolicy, config: EndpointConfig) -> Iterator[str]:
    """Serves one policy, as `serving` does."""
    source = functools.partial(ModelSource, load)
    with serving(source, {DEFAULT_MODEL: "1"}, config) as address:
        yield address


@contextlib.contextmanager
def serving(source: OpenSource, models: Mapping[str, str], config: EndpointConfig) -> Iterator[str]:
    """Serves on the connected Ray cluster while the context lasts; yields HOST:PORT once all models are warm.

    Raises: PlatformError if the port is taken; PolicyError if a model does not load or warm up.
    """
    port = config.port or free_port(config.host)
    _require_free(config.host, port)
    _start(config, port)
    try:
        serve.run(build(source, models, config), name=config.name, route_prefix="/", logging_config=_QUIET)
    except RuntimeError as error:
        reason = _failure(config.name) or str(error)
        _stop(config.name)
        raise PolicyError(f"The endpoint did not start: {reason}", "try the checkpoint with `dualvla eval`") from error
    try:
        base = f"{config.host if ':' not in config.host else f'[{config.host}]'}:{port}"
        _wait_until_listening(f"{'https' if config.tls else 'http'}://{base}/healthz")
        yield base
    finally:
        _stop(config.name)


def _start(config: EndpointConfig, port: int) -> None:
    tls = {"ssl_certfile": config.tls.certificate, "ssl_keyfile": config.tls.key} if config.tls else {}
    start = functools.partial(
        serve.start,
        http_options=HTTPOptions(host=config.host, port=port, request_timeout_s=None, **tls),
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
    link.retire(name)
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
    trusting = ssl.create_default_context()  # our own certificate, on our own machine, and nothing secret is sent
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5, context=trusting) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise PlatformError(
                    f"The endpoint does not answer at {url}: {error}.",
                    "look for another Serve instance of this Ray cluster, with another host or port",
                ) from error
        time.sleep(0.1)
