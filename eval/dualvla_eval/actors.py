"""The workers of a sweep: each holds environments and a policy, runs work items, and writes what came out.

`SweepWorkerImpl` is a plain class; Ray comes with the last lines. An item's rows are one part file, written after
everything else of that item: a part that exists is an item that is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from dualvla.io import storage
from dualvla.policy import Policy
from dualvla_eval import results, videos
from dualvla_eval.policies import PolicyRef
from dualvla_eval.rollout import EpisodeResult, run_episodes
from dualvla_eval.sim.base import SimEnv
from dualvla_eval.suites import Episode, Suite

LoadPolicy = Callable[..., Policy]


@dataclass(frozen=True)
class WorkItem:
    """Some episodes of one task for one policy; the unit that is run and recorded exactly once."""

    policy: PolicyRef
    task: str
    episodes: tuple[Episode, ...]

    @property
    def part(self) -> str:
        first, last = self.episodes[0].episode_id, self.episodes[-1].episode_id
        return f"{self.policy.name}-{self.task}-{first:04d}-{last:04d}"

    def __str__(self) -> str:
        return self.part


@dataclass(frozen=True)
class WorkerConfig:
    """folder: the evaluation folder. videos_per_task: that many of the first episodes of each task are filmed."""

    folder: str
    suite: Suite
    load_policy: LoadPolicy
    seed: int
    reasoning: str
    envs_per_worker: int
    videos_per_task: int


class SweepWorkerImpl:
    """Builds its environments once, and a policy when the next item names another one."""

    def __init__(self, config: WorkerConfig):
        self._config = config
        self._envs: list[SimEnv] = []
        self._policy: tuple[PolicyRef, Policy] | None = None

    def run(self, item: WorkItem) -> int:
        """Runs the item's episodes and returns how many there were."""
        config, policy = self._config, self._load(item.policy)
        while len(self._envs) < min(config.envs_per_worker, len(item.episodes)):
            self._envs.append(config.suite.make_env())
        filmed = {e.episode_id: videos.FRAME_PX for e in item.episodes if e.episode_id < config.videos_per_task}
        rows = [
            self._record(item.policy, policy, result)
            for result in run_episodes(
                policy, self._envs, config.suite, item.episodes, seed=config.seed, frame_size=filmed
            )
        ]
        results.write_rows(results.part_url(config.folder, item.part), rows, results.EPISODE_SCHEMA)
        return len(rows)

    def _load(self, ref: PolicyRef) -> Policy:
        if self._policy is None or self._policy[0] != ref:
            self._policy = None  # frees the old one before the new one is loaded
            config = self._config
            loaded = config.load_policy(ref, suite=config.suite, reasoning=config.reasoning, seed=config.seed)
            self._policy = (ref, loaded)
        return self._policy[1]

    def _record(self, ref: PolicyRef, policy: Policy, result: EpisodeResult) -> Mapping[str, Any]:
        folder, episode = self._config.folder, result.episode
        video = None
        if result.frames:
            name = results.stem(ref.name, episode.task, episode.variant, episode.episode_id)
            video = f"videos/{name}.mp4"
            data = videos.rollout_video(result, ref.name, self._config.suite.control_hz)
            storage.write_bytes(storage.join(folder, video), data)
        row = results.episode_row(result, ref.name, policy.spec.kind, video)
        results.write_trajectory(folder, row, result)
        return row


SweepWorker = ray.remote(SweepWorkerImpl)


def write_crashed(folder: str, item: WorkItem, failure: str) -> None:
    rows: Sequence[Mapping[str, Any]] = [results.crashed_row(e, item.policy.name, failure) for e in item.episodes]
    results.write_rows(results.part_url(folder, item.part), rows, results.EPISODE_SCHEMA)
