"""The checkpoints behind an endpoint, by name, each of which can be exchanged while robots are connected.

A new version is loaded and warmed up beside the one that answers, in a thread; then it answers, from one batch to the
next. If it does not load, the old one goes on answering and the failure is told. Knows no checkpoint format.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from dualvla.errors import DualVLAError, PolicyError, ServerError, WireError, did_you_mean
from dualvla_serve.batching import LoadPolicy, PolicyRunner

log = logging.getLogger("dualvla.serve")

ModelState = Literal["ready", "loading", "failed"]


@dataclass(frozen=True)
class ModelSource:
    """load: makes the policy. version: what identifies its content (a digest). source: where it comes from, to show."""

    load: LoadPolicy
    version: str
    source: str = ""


@dataclass
class Model:
    """One name. state and message: of the version that was wanted last; `runner` answers meanwhile."""

    name: str
    runner: PolicyRunner
    version: str
    source: str
    state: ModelState = "ready"
    message: str = ""


NewRunner = Callable[[LoadPolicy], PolicyRunner]


class Models:
    """In the order they were given; the first is the default."""

    def __init__(self, new_runner: NewRunner, changed: Callable[[Model], None] = lambda model: None):
        """changed: called when a model begins to answer."""
        self._new_runner = new_runner
        self._changed = changed
        self._models: dict[str, Model] = {}
        self._wanted: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        return list(self._models)

    def all(self) -> list[Model]:
        return list(self._models.values())

    def get(self, name: str) -> Model:
        """No name is the first. Raises: WireError naming what there is; ServerError while there is nothing yet."""
        if not self._models:
            raise ServerError("The policy is not ready.")
        if not name:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise WireError(f"There is no model '{name[:60]}' here.", did_you_mean(name, self._models))
        return self._models[name]

    async def want(self, sources: Mapping[str, ModelSource]) -> None:
        """Makes these the models. Returns once every one has loaded or failed.

        Raises: PolicyError if a name has no version at all that could answer; those that have one keep it instead.
        """
        missing: list[str] = []
        for name, source in sources.items():
            error = await self._want_one(name, source)
            if error is not None and name not in self._models:
                missing.append(f"{name}: {error}")
        for name in [name for name in self._models if name not in sources]:
            await _drain(self._models.pop(name).runner)
        self._models = {name: self._models[name] for name in sources if name in self._models}
        if missing:
            raise PolicyError("; ".join(missing))

    async def _want_one(self, name: str, source: ModelSource) -> str | None:
        """What went wrong, or None."""
        self._wanted[name] = source.version
        current = self._models.get(name)
        if current is not None and current.version == source.version:
            current.state, current.message = "ready", ""
            return None
        if current is not None:
            current.state, current.message = "loading", source.source
        try:
            runner = await asyncio.to_thread(self._new_runner, source.load)
        except (DualVLAError, OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
            log.error("model '%s' does not load from %s", name, source.source, exc_info=error)
            if current is not None:
                current.state, current.message = "failed", f"{type(error).__name__}: {error}"
            return f"{type(error).__name__}: {error}"
        if self._wanted[name] != source.version:  # something newer was wanted meanwhile
            runner.close()
            return None
        fresh = Model(name, runner, source.version, source.source)
        self._models[name] = fresh
        self._changed(fresh)
        if current is not None:
            log.info("model '%s' is now version %s", name, source.version)
            await _drain(current.runner)
        return None


async def _drain(runner: PolicyRunner) -> None:
    """What the old version was given, it answers."""
    while not runner.idle:
        await asyncio.sleep(0.01)
    runner.close()
