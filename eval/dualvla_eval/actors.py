"""The processes of a sweep: simulators, each with several environments, and hosts, each with the checkpoints they ask.

`SimulatorImpl` and `HostImpl` are plain classes; Ray comes with the last lines. Both have asynchronous methods, so that
one thread does all the simulating of a process while its other episodes wait for their policy. An episode's row is one
part file, written after everything else of that episode: a part that exists is an episode that is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from dualvla.errors import DualVLAError, SessionLostError
from dualvla.io import dataset, manifest, storage
from dualvla.policy import Policy
from dualvla.schema import Observation, PolicySpec
from dualvla_eval import results, versions, videos
from dualvla_eval.asking import Answer, Batched, Direct, EpisodePolicy, Remote
from dualvla_eval.conventions import Conventions
from dualvla_eval.policies import Ablated, PolicyRef
from dualvla_eval.rollout import EpisodeResult, Limits, run_episode
from dualvla_eval.sim.base import SimEnv
from dualvla_eval.suites import Episode, Suite

LoadPolicy = Callable[..., Policy]
_MAX_REMOTE_CALLS = 64  # at once, of one simulator
_PAUSE_S = 0.5


@dataclass(frozen=True)
class WorkItem:
    """One episode for one policy with one seed; the unit that is run and recorded exactly once."""

    policy: PolicyRef
    episode: Episode
    seed: int
    filmed: bool = False

    @property
    def part(self) -> str:
        return results.stem(
            self.policy.name, self.episode.task, self.episode.variant, self.episode.episode_id, self.seed
        )

    def __str__(self) -> str:
        return self.part


@dataclass(frozen=True)
class SimulatorConfig:
    """folder: the evaluation folder. patience_s: how long a remote policy may be away. only_failures: films of what was
    solved are not kept."""

    folder: str
    suite: Suite
    load_policy: LoadPolicy
    reasoning: str = "auto"
    conventions: Conventions = field(default_factory=Conventions)
    limits: Limits = field(default_factory=Limits)
    patience_s: float = 60.0
    only_failures: bool = False
    envs: int = 1


@dataclass(frozen=True)
class _Record:
    """What is kept of an episode beside its film. video: path in the folder, None without one. The rest: parquet."""

    video: str | None
    trajectory_url: str
    trajectory: bytes
    part: bytes


class SimulatorImpl:
    """Runs episodes: `envs` of those that it is asked for at the same time, in environments that are used again.

    One more should be at hand, so that no environment waits while a result is written and the next episode comes.

    hosts: handles of `Host` actors for the policies that are not loaded here: checkpoints.
    """

    def __init__(self, config: SimulatorConfig, hosts: Sequence[Any] = ()):
        self._config, self._hosts = config, hosts
        self._free: deque[SimEnv] = deque()
        self._room = asyncio.Semaphore(config.envs)
        self._loaded: dict[tuple[str, int], Policy] = {}
        self._sessions: Counter[int] = Counter()  # by host, of this simulator
        self._calls = ThreadPoolExecutor(_MAX_REMOTE_CALLS)
        self._known = False

    async def run(self, item: WorkItem) -> None:
        """Runs and records the item's episode."""
        config, ref = self._config, item.policy
        async with self._policy(ref, item.seed) as loaded:
            policy = loaded if ref.ablation == "none" else Ablated(loaded, ref.ablation, item.seed)
            async with self._room:
                env = self._free.popleft() if self._free else config.suite.make_env()
                result = await run_episode(
                    policy,
                    env,
                    config.suite,
                    item.episode,
                    seed=item.seed,
                    conventions=config.conventions,
                    limits=config.limits,
                    frame_size=videos.FRAME_PX if item.filmed else None,
                )
                self._free.append(env)  # one in which something was raised is not used again
        record = self._packed(item, policy.spec, result)
        await asyncio.to_thread(self._write, item, record, result)

    @contextlib.asynccontextmanager
    async def _policy(self, ref: PolicyRef, seed: int) -> AsyncIterator[EpisodePolicy]:
        config = self._config
        if self._hosts and ref.hosted:
            number = min(range(len(self._hosts)), key=lambda i: self._sessions[i])
            self._sessions[number] += 1
            try:
                yield await Hosted.connected(ref, self._hosts[number], config.patience_s)
            finally:
                self._sessions[number] -= 1
            return
        key = (ref.name, seed)
        if key not in self._loaded:
            self._loaded[key] = config.load_policy(ref, suite=config.suite, reasoning=config.reasoning, seed=seed)
        policy = self._loaded[key]
        yield Remote(policy, config.patience_s, self._calls) if ref.remote else Direct(policy)

    def _packed(self, item: WorkItem, spec: PolicySpec, result: EpisodeResult) -> _Record:
        """Python's part of recording. Beside a simulator, a thread of its own takes three times as long for it."""
        filmed = bool(result.frames) and not (self._config.only_failures and result.success)
        video = f"videos/{item.part}.mp4" if filmed else None
        row = results.episode_row(result, item.policy.name, spec.kind, item.seed, video)
        trajectory = dataset.to_parquet(results.trajectory_table(result))
        part = dataset.to_parquet(results.rows_table([row], results.EPISODE_SCHEMA))
        return _Record(video, results.trajectory_url(self._config.folder, row), trajectory, part)

    def _write(self, item: WorkItem, record: _Record, result: EpisodeResult) -> None:
        folder, suite = self._config.folder, self._config.suite
        if not self._known:
            self._known = True
            machine = dataclasses.asdict(versions.machine(suite.simulator()))
            results.write_json(storage.join(folder, "machines", f"{manifest.digest(machine)[:12]}.json"), machine)
        if record.video is not None:
            data = videos.rollout_video(result, item.policy.name, suite.control_hz)
            storage.write_bytes(storage.join(folder, record.video), data)
        storage.write_bytes(record.trajectory_url, record.trajectory)
        storage.write_bytes(results.part_url(folder, item.part), record.part)


class Hosted:
    """One episode's policy, in a `Host` actor.

    Raises, from `ask`: what the policy raises; SessionLostError if the host has died, once it is back, or has not come
    back within patience_s.
    """

    def __init__(self, ref: PolicyRef, host: Any, spec: PolicySpec, patience_s: float):
        self.spec = spec
        self._ref, self._host, self._patience_s = ref, host, patience_s

    @classmethod
    async def connected(cls, ref: PolicyRef, host: Any, patience_s: float) -> Hosted:
        """Once the host is there and has loaded the policy."""
        give_up = time.monotonic() + patience_s
        while True:
            try:
                return cls(ref, host, await _call(host.spec.remote(ref)), patience_s)
            except SessionLostError:
                if time.monotonic() >= give_up:
                    raise
                await asyncio.sleep(_PAUSE_S)

    async def ask(self, observation: Observation, session: str) -> Answer:
        try:
            return await _call(self._host.ask.remote(self._ref, observation, session))
        except SessionLostError:
            await self.connected(self._ref, self._host, self._patience_s)
            raise

    def attach(self, session: str, env: SimEnv, episode: Episode) -> None:
        """Nothing here is shown to another process."""

    def renew(self, session: str) -> None:
        self.reset(session)

    def reset(self, session: str) -> None:
        self._host.reset.remote(self._ref, session)


async def _call(reference: Any) -> Any:
    try:
        return await reference
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, DualVLAError) else error) from None
    except RayActorError as error:
        raise SessionLostError(f"The policy's process died: {error}") from error


class HostImpl:
    """Holds policies, each from its first question until it is dropped, and batches over all simulators.

    max_batch: at most so many observations in one forward pass; 1 makes answers independent of what else is asked.
    """

    def __init__(self, suite: Suite, load_policy: LoadPolicy, reasoning: str, max_batch: int | None):
        self._suite, self._load, self._reasoning, self._max_batch = suite, load_policy, reasoning, max_batch
        self._policies: dict[str, asyncio.Task[Batched]] = {}
        self._computing = ThreadPoolExecutor(1)

    async def spec(self, ref: PolicyRef) -> PolicySpec:
        return (await self._policy(ref)).spec

    async def ask(self, ref: PolicyRef, observation: Observation, session: str) -> Answer:
        return await (await self._policy(ref)).ask(observation, session)

    async def reset(self, ref: PolicyRef, session: str) -> None:
        (await self._policy(ref)).reset(session)

    async def drop(self, ref: PolicyRef) -> None:
        """Frees the policy's memory."""
        self._policies.pop(ref.name, None)

    async def _policy(self, ref: PolicyRef) -> Batched:
        if ref.name not in self._policies:
            self._policies[ref.name] = asyncio.create_task(self._loaded(ref))
        return await self._policies[ref.name]

    async def _loaded(self, ref: PolicyRef) -> Batched:
        def load() -> Policy:
            return self._load(ref, suite=self._suite, reasoning=self._reasoning, seed=0)

        policy = await asyncio.get_running_loop().run_in_executor(self._computing, load)
        return Batched(policy, self._max_batch, self._computing)


Simulator = ray.remote(SimulatorImpl)
Host = ray.remote(HostImpl)


def write_crashed(folder: str, item: WorkItem, stop_reason: str, failure: str) -> None:
    row: Mapping[str, Any] = results.crashed_row(item.episode, item.policy.name, item.seed, stop_reason, failure)
    results.write_rows(results.part_url(folder, item.part), [row], results.EPISODE_SCHEMA)
