"""A bounded pool of Ray actors that works through items, each exactly once, surviving the death of actors.

Knows nothing of what the items are. An item that has killed its actor twice is *poison*: it comes back as a failure
with a reason, and the rest goes on.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from dualvla.errors import DualVLAError, PlatformError

log = logging.getLogger(__name__)

Item = TypeVar("Item")
_MAX_CRASHES = 2


@dataclass(frozen=True)
class Outcome(Generic[Item]):
    """One finished item: `value` is what the actor returned; or `failure` says why there is none."""

    item: Item
    value: Any = None
    failure: str | None = None


def run(
    make_actor: Callable[[], Any],
    method: str,
    items: Sequence[Item],
    *,
    num_actors: int,
    max_crashes: int = _MAX_CRASHES,
) -> Iterator[Outcome[Item]]:
    """Yields outcomes as they finish, in no particular order.

    make_actor: returns a fresh actor handle. method: name of its method that takes one item. An exception raised by the
    method itself is not a crash: it propagates at once, as it would without Ray.
    Raises: PlatformError if an actor cannot be constructed.
    """
    waiting = deque(items)
    crashes: dict[int, int] = {}
    actors = [make_actor() for _ in range(max(1, min(num_actors, len(items))))]
    running: dict[Any, tuple[Any, Item]] = {}

    def submit(actor: Any) -> None:
        if waiting:
            item = waiting.popleft()
            running[getattr(actor, method).remote(item)] = (actor, item)

    try:
        for actor in actors:
            submit(actor)
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            actor, item = running.pop(ready)
            try:
                value = ray.get(ready)
            except RayTaskError as error:
                # Ray's dual exception hides `message` and `fix`; our own errors come back as they were raised.
                ours = isinstance(error.cause, DualVLAError)
                raise (error.cause if ours else error.as_instanceof_cause()) from error
            except RayActorError as error:
                if error.actor_init_failed:  # Ray keeps only the text of what its constructor raised
                    raise PlatformError(f"A worker could not start: {str(error).splitlines()[-1]}") from error
                actors.remove(actor)
                crashes[id(item)] = crashes.get(id(item), 0) + 1
                if crashes[id(item)] < max_crashes:
                    log.warning("an actor died on %s, which will be run again: %s", item, error)
                    waiting.appendleft(item)
                else:
                    yield Outcome(item, failure=f"crashed its worker {max_crashes} times: {error}")
                if waiting:
                    actors.append(make_actor())
                    submit(actors[-1])
                continue
            submit(actor)
            yield Outcome(item, value=value)
    finally:
        for actor in actors:
            ray.kill(actor)
