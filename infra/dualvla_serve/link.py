"""The hub as a Ray actor, and how a replica in another process reaches it. The one truth of an endpoint is in it."""

from __future__ import annotations

import asyncio
import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from dualvla.errors import DualVLAError, ServerError
from dualvla.io import storage
from dualvla_serve import logs
from dualvla_serve.estop import Latch, StopState
from dualvla_serve.hub import Claim, Hub, News, Report, Saved

_NAMESPACE = "dualvla_serve"
_TIMEOUT_S = 3.0


def latch_url(state_dir: str, endpoint: str) -> str | None:
    return storage.join(state_dir, f"{endpoint}.stop.json") if state_dir else None


class HubActor(Hub):
    """One an endpoint, in a process of its own: whatever replica dies, it stays."""

    def __init__(self, state_dir: str, endpoint: str, idle_s: float):
        logs.use_json()
        with warnings.catch_warnings():  # Ray's own code warns of a name that Ray deprecates
            warnings.simplefilter("ignore")
            restarted = ray.get_runtime_context().was_current_actor_reconstructed
        super().__init__(Latch(latch_url(state_dir, endpoint), restarted), idle_s)


class RayHub:
    """Implements `HubLink`. Finds the endpoint's hub, or makes it; Ray starts it again if it dies."""

    def __init__(self, endpoint: str, state_dir: str, idle_s: float):
        actor = ray.remote(HubActor).options(
            name=_name(endpoint),
            namespace=_NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
        )
        self._actor = actor.remote(state_dir, endpoint, idle_s)

    async def exchange(self, replica: str, report: Report | None, version: int, wait_s: float) -> News:
        return await _asked(self._actor.exchange.remote(replica, report, version, wait_s))

    async def claim(self, session: str, principal: str, replica: str, resume: int | None) -> Claim:
        return await _asked(self._actor.claim.remote(session, principal, replica, resume))

    async def save(self, states: Sequence[Saved]) -> None:
        await _asked(self._actor.save.remote(states))

    async def release(self, session: str, epoch: int, forget: bool) -> None:
        await _asked(self._actor.release.remote(session, epoch, forget))

    async def stop(self, reason: str, by: str) -> StopState:
        return await _asked(self._actor.stop.remote(reason, by))

    async def clear(self, reason: str, by: str) -> StopState:
        return await _asked(self._actor.clear.remote(reason, by))

    async def reports(self) -> dict[str, Report]:
        return await _asked(self._actor.reports.remote())

    async def frame(self, session: str) -> tuple[int, str, Mapping[str, bytes]] | None:
        return await _asked(self._actor.frame.remote(session))

    async def gone(self, replica: str) -> None:
        await _asked(self._actor.gone.remote(replica))


def order(endpoint: str, models: Mapping[str, str], timeout_s: float = 10.0) -> None:
    """Has an endpoint's replicas look at the sources of its models again. Raises: ServerError."""
    with _translated():
        actor = ray.get_actor(_name(endpoint), namespace=_NAMESPACE)
        ray.get(actor.order.remote(dict(models)), timeout=timeout_s)


def retire(endpoint: str, timeout_s: float = 10.0) -> None:
    """Lets the replicas of an endpoint finish, then ends its hub. Does nothing where there is none."""
    with contextlib.suppress(ValueError, RayError):
        actor = ray.get_actor(_name(endpoint), namespace=_NAMESPACE)
        try:
            ray.get(actor.retire.remote(), timeout=timeout_s)
            _wait_until_gone(actor, timeout_s)
        finally:
            ray.kill(actor)


def _wait_until_gone(actor: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and ray.get(actor.reports.remote(), timeout=timeout_s):
        time.sleep(0.05)


def _name(endpoint: str) -> str:
    return f"{endpoint}:hub"


async def _asked(reference: Any) -> Any:
    with _translated():
        async with asyncio.timeout(_TIMEOUT_S):
            return await reference


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Ray's errors as ours: what the hub raised, or that it could not be asked."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, DualVLAError):
            raise error.cause from None
        raise ServerError(f"The hub failed: {type(error.cause).__name__}: {error.cause}.") from error
    except (RayError, TimeoutError) as error:
        raise ServerError(f"The hub does not answer: {type(error).__name__}.") from error
