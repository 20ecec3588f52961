"""A pool of Ray actors that works through items, each exactly once, surviving the death of actors and of nodes.

It asks for as many actors as there are items to work on, up to a bound; those that the cluster has no room for wait,
which is what an autoscaler adds nodes for, and get no work until they run. Actors that find nothing more to do go.
Knows nothing of what the items are. An item that has killed its actor twice is *poison*: it comes back as a failure
with a reason, and the rest goes on.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from dualvla import console
from dualvla.errors import DualVLAError, PlatformError

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Reason = Literal["crashed", "stalled"]
_MAX_CRASHES = 2
_MAX_FAILED_STARTS = 3  # in a row: then something is wrong that another actor will not mend
_LOOKS_PER_STALL = 8


@dataclass(frozen=True)
class Outcome(Generic[Item]):
    """One finished item: `value` is what the actor returned; or `failure` says why there is none, `reason` of what
    kind."""

    item: Item
    value: Any = None
    failure: str | None = None
    reason: Reason | None = None


@dataclass(frozen=True)
class Rules:
    """How a pool treats its actors and what goes wrong.

    slots: items that one actor, of asynchronous methods, works on at the same time. max_crashes: an item that has
    killed that many actors is poison. recycle_after: an actor that has done so many items is replaced, which bounds
    what it can leak. stall_s: an actor of asynchronous methods that has not answered for so long is killed, as if it
    had crashed (None: never). retried: errors of ours that count as a crash of their item and do not propagate; with
    `errors_crash`, everything else that is not one of ours does, too.
    """

    slots: int = 1
    max_crashes: int = _MAX_CRASHES
    recycle_after: int | None = None
    stall_s: float | None = None
    retried: tuple[type[DualVLAError], ...] = ()
    errors_crash: bool = False


def run(
    make_actor: Callable[[], Any],
    method: str,
    items: Sequence[Item],
    *,
    num_actors: int,
    rules: Rules = Rules(),
) -> Iterator[Outcome[Item]]:
    """Yields outcomes as they finish, in no particular order.

    make_actor: returns a fresh actor handle. method: name of its method that takes one item. An exception raised by the
    method itself is not a crash, unless `rules` say so: it propagates at once, as it would without Ray.
    Raises: PlatformError if an actor cannot be constructed.
    """
    pool: _Pool[Item] = _Pool(make_actor, method, items, num_actors, rules)
    try:
        yield from pool.outcomes()
    finally:
        pool.close()


@dataclass(eq=False)
class _Actor(Generic[Item]):
    """start: resolves to the node it runs on, once it does. running: what it works on, by the reference to come."""

    handle: Any
    start: Any
    node: str | None = None
    running: dict[Any, Item] = field(default_factory=dict)
    done: int = 0
    ping: Any = None
    pinged_at: float = 0.0


class _Pool(Generic[Item]):
    def __init__(
        self, make_actor: Callable[[], Any], method: str, items: Sequence[Item], num_actors: int, rules: Rules
    ):
        self._make_actor, self._method, self._rules = make_actor, method, rules
        self._num_actors = max(1, num_actors)
        self._waiting = deque(items)
        # In flight beside others when something died, so any of them may be at fault: each is run with nothing else.
        self._suspects: deque[Item] = deque()
        self._alone = False  # a suspect is in flight
        self._crashes: dict[int, int] = {}
        self._actors: list[_Actor[Item]] = []
        self._failed_starts = 0
        self._looked_at = time.monotonic()

    def outcomes(self) -> Iterator[Outcome[Item]]:
        while self._outstanding():
            self._resize()
            self._feed()
            refs = [ref for a in self._actors for ref in (a.running or ([a.start] if a.node is None else []))]
            finished, _ = ray.wait(refs, num_returns=1, timeout=self._patience())
            for ref in finished:
                yield from self._finished(ref)
            yield from self._stalled()

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor.handle)

    def _outstanding(self) -> int:
        return len(self._waiting) + len(self._suspects) + self._in_flight()

    def _in_flight(self) -> int:
        return sum(len(a.running) for a in self._actors)

    def _resize(self) -> None:
        """As many actors as there is work for; the worn-out and the idle go, first those that do not run yet."""
        limit = self._rules.recycle_after
        for actor in sorted((a for a in self._actors if not a.running), key=lambda a: a.node is not None):
            if (limit is not None and actor.done >= limit) or len(self._actors) > self._outstanding():
                self._drop(actor)
        while len(self._actors) < min(self._num_actors, self._outstanding()):
            handle = self._make_actor()
            self._actors.append(_Actor(handle, handle.__ray_call__.remote(_node_of)))

    def _feed(self) -> None:
        """The next items to the actors with the fewest, so that all have some before one has many."""
        limit = self._rules.recycle_after
        self._alone = self._alone and self._in_flight() > 0
        while (self._suspects or self._waiting) and not self._alone:
            ready = [a for a in self._actors if a.node is not None and len(a.running) < self._rules.slots]
            ready = [a for a in ready if limit is None or a.done + len(a.running) < limit]
            if not ready or (self._suspects and self._in_flight()):
                return
            actor = min(ready, key=lambda a: len(a.running))
            self._alone = bool(self._suspects)
            item = (self._suspects or self._waiting).popleft()
            actor.running[getattr(actor.handle, self._method).remote(item)] = item

    def _finished(self, ref: Any) -> Iterator[Outcome[Item]]:
        actor = next((a for a in self._actors if ref == a.start or ref in a.running), None)
        if actor is None:
            return
        try:
            value = ray.get(ref)
        except RayTaskError as error:
            if not self._is_crash(error.cause):
                # Ray's dual exception hides `message` and `fix`; our own errors come back as they were raised.
                ours = isinstance(error.cause, DualVLAError)
                raise (error.cause if ours else error.as_instanceof_cause()) from error
            others = self._in_flight() > 1
            actor.done += 1
            yield from self._crashed([actor.running.pop(ref)], f"{error.cause}", "crashed", sure=not others)
        except RayActorError as error:
            if error.actor_init_failed:  # Ray keeps only the text of what its constructor raised
                raise PlatformError(f"A worker could not start: {str(error).splitlines()[-1]}") from error
            yield from self._died(actor, error)
        else:
            if ref == actor.start:
                actor.node, self._failed_starts = value, 0
                return
            actor.done += 1
            yield Outcome(actor.running.pop(ref), value=value)

    def _is_crash(self, cause: BaseException) -> bool:
        if isinstance(cause, DualVLAError):
            return isinstance(cause, self._rules.retried)
        return self._rules.errors_crash

    def _died(self, actor: _Actor[Item], error: RayActorError) -> Iterator[Outcome[Item]]:
        self._drop(actor)
        items = list(actor.running.values())
        if actor.node is None:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise PlatformError(f"Workers die as they start: {error}") from error
        elif not _alive(actor.node):
            log.warning("node %s is gone; %d items are run again", actor.node[:8], len(items))
            console.tell("pool", "retries", len(items))
            self._waiting.extendleft(reversed(items))
        else:
            yield from self._crashed(items, f"{error}", "crashed", sure=len(items) == 1)

    def _stalled(self) -> Iterator[Outcome[Item]]:
        """Asks busy actors for a sign of life, and gives those up that owe one."""
        stall_s, now = self._rules.stall_s, time.monotonic()
        if stall_s is None or now - self._looked_at < stall_s / _LOOKS_PER_STALL:
            return
        self._looked_at = now
        for actor in [a for a in self._actors if a.running]:
            if actor.ping is None or ray.wait([actor.ping], timeout=0)[0]:
                actor.ping, actor.pinged_at = actor.handle.__ray_call__.remote(_node_of), now
            elif now - actor.pinged_at > stall_s:
                self._drop(actor)
                items = list(actor.running.values())
                failure = f"did not come back for {stall_s:g} s"
                yield from self._crashed(items, failure, "stalled", sure=len(items) == 1)

    def _crashed(self, items: Sequence[Item], failure: str, reason: Reason, sure: bool) -> Iterator[Outcome[Item]]:
        """sure: nothing else can be at fault."""
        for item in items:
            crashes = self._crashes[id(item)] = self._crashes.get(id(item), 0) + sure
            if crashes >= self._rules.max_crashes:
                what = "crashed its worker" if reason == "crashed" else "stalled its worker"
                yield Outcome(item, failure=f"{what} {crashes} times: {failure}", reason=reason)
                continue
            log.warning("%s was interrupted and will be run again: %s", item, failure)
            console.tell("pool", "retries", 1)
            if sure and self._rules.slots == 1:  # it harms nobody else
                self._waiting.appendleft(item)
            else:
                self._suspects.append(item)

    def _drop(self, actor: _Actor[Item]) -> None:
        self._actors.remove(actor)
        ray.kill(actor.handle)

    def _patience(self) -> float | None:
        return None if self._rules.stall_s is None else self._rules.stall_s / _LOOKS_PER_STALL


def _node_of(actor: object) -> str:
    return ray.get_runtime_context().get_node_id()


def _alive(node: str) -> bool:
    return any(n["NodeID"] == node and n["Alive"] for n in ray.nodes())
