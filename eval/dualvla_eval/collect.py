"""Data sets of demonstrations by scripted experts, with noise and recoveries, and of questions about scenes.

The work is cut into parts of a fixed number of episodes; a part is a pure function of its name and the configuration,
is made by one actor, and becomes one file. So neither the number of workers nor a kill changes a byte. Knows the suite,
the experts and the data set format; nothing of policies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualvla.config import to_dict
from dualvla.console import progress
from dualvla.errors import DataError, UsageError
from dualvla.io import dataset, manifest, storage
from dualvla_eval.experts import make_expert
from dualvla_eval.qa import QASplit, make_question
from dualvla_eval.sim.base import SimEnv
from dualvla_eval.suites import Episode, Suite, get_suite

_EPISODES_PER_PART = 25
_QUESTIONS_PER_PART = 100
_MAX_ATTEMPTS = 50
_FOLLOW_THROUGH = 2  # steps after success: a demonstration goes deeper than the test asks
_LONG_FOLLOW_THROUGH = 8  # where success may come before the object is let go, and has to last
_MAX_STEP_M = 0.03


@dataclass(frozen=True)
class Noise:
    """What is done to the executed action; the recorded one stays clean, so that recoveries are demonstrated.

    sigma: standard deviation per axis, in steps of 3 cm. noisy_share: of demonstrations. push_share: of the noisy ones,
    where one full step goes a random way for `push_steps` steps.
    """

    sigma: float = 0.35
    noisy_share: float = 0.7
    push_share: float = 0.2
    push_steps: int = 2


@dataclass(frozen=True)
class CollectConfig:
    """episodes: task -> demonstrations. qa, qa_test: questions in the splits train and test.

    variant: the look of the scenes demonstrated in, one of the suite's; questions are about the usual one.
    """

    suite: str
    episodes: dict[str, int]
    qa: int
    qa_test: int
    seed: int
    noise: Noise = Noise()
    variant: str = "base"


@dataclass(frozen=True)
class Part:
    """One file: `count` episodes (or questions) of one task (or "qa/<split>"), from number `start`."""

    index: int
    source: str
    start: int
    count: int


def plan_parts(config: CollectConfig) -> list[Part]:
    """In the order of the rows' episode_id."""
    sources = {task: (count, _EPISODES_PER_PART) for task, count in config.episodes.items()}
    sources["qa/test"] = (config.qa_test, _QUESTIONS_PER_PART)
    sources["qa/train"] = (config.qa, _QUESTIONS_PER_PART)
    cuts = [
        (source, start, min(size, total - start))
        for source, (total, size) in sorted(sources.items())
        for start in range(0, total, size)
    ]
    return [Part(i, *cut) for i, cut in enumerate(cuts)]


def collect(config: CollectConfig, out: str, workers: int, assets: str | None = None) -> dict[str, Any]:
    """Makes or resumes the data set in `out`. assets: folder of the suite's files. Returns its manifest.

    Raises: OutputError if `out` belongs to another run, PlatformError without a Vulkan device.
    """
    suite = get_suite(config.suite, assets)
    suite.need_expert()
    if (config.qa or config.qa_test) and suite.name != "blocks":
        raise UsageError(f"Suite '{suite.name}' has no questions.", "leave --qa and --qa-test out")
    for task in config.episodes:
        suite.training_episode(task, 0, config.seed, variant=config.variant)  # refuses names it does not know
    suite.check([task for task in suite.tasks if task.name in config.episodes and task.variant == config.variant])
    if not manifest.begin(out, dataset.KIND, to_dict(config), {}):
        return {**(manifest.read(out) or {}), "skipped": True}
    parts = plan_parts(config)
    todo = [part for part in parts if not storage.exists(_progress_url(out, part))]
    if todo:
        _run(config, out, assets, todo, workers, done=len(parts) - len(todo), total=len(parts))
    facts = [json.loads(storage.read_bytes(_progress_url(out, part))) for part in parts]
    return dataset.finish_dataset(
        out,
        to_dict(config),
        {},
        rows_in=sum(f["rows"] for f in facts),
        failed_attempts=_sum_by_source(parts, facts, "failed_attempts"),
        rows_by_task=_sum_by_source(parts, facts, "rows"),
        failure_reasons=_count_reasons(facts),
    )


def _run(
    config: CollectConfig, out: str, assets: str | None, parts: list[Part], workers: int, done: int, total: int
) -> None:
    import ray

    from dualvla_cluster import connect, pool, resources

    connect.connect()
    # Without a profile the pool bounds the number of actors, not Ray's CPU count.
    actor = ray.remote(**resources.reservation("collect", cpus=0.1))(Collector)
    with progress("collect", total, done) as advance:
        for outcome in pool.run(lambda: actor.remote(config, out, assets), "collect", parts, num_actors=workers):
            if outcome.failure:
                raise DataError(f"{outcome.item} could not be made: {outcome.failure}.", "run `dualvla doctor`")
            advance(1)


class Collector:
    """Makes parts, one after another, in one environment."""

    def __init__(self, config: CollectConfig, out: str, assets: str | None = None):
        self._config, self._out = config, out
        self._suite = get_suite(config.suite, assets)
        self._env = self._suite.make_env()

    def collect(self, part: Part) -> None:
        """Writes the part's file, and after it what there is to know about it."""
        rows: list[dict[str, Any]] = []
        reasons: list[str] = []
        for index in range(part.start, part.start + part.count):
            if part.source.startswith("qa/"):
                split: QASplit = "train" if part.source == "qa/train" else "test"
                rows.append(question_row(self._env, self._suite, split, index, self._config.seed))
            else:
                rows += self._demonstrate(part.source, index, reasons)
        dataset.write_table(dataset.part_url(self._out, part.index), dataset.rows_to_table(rows))
        facts = {"rows": len(rows), "failed_attempts": len(reasons), "reasons": reasons}
        storage.write_bytes(_progress_url(self._out, part), json.dumps(facts).encode())

    def _demonstrate(self, task: str, index: int, reasons: list[str]) -> list[dict[str, Any]]:
        for attempt in range(_MAX_ATTEMPTS):
            episode = self._suite.training_episode(task, index, self._config.seed, attempt, self._config.variant)
            rows, failure = demonstrate(self._env, self._suite, episode, self._config.noise)
            if failure is None:
                return rows
            reasons.append(f"{task}: {failure}")
        raise DataError(f"Demonstration {index} of '{task}' failed {_MAX_ATTEMPTS} times.", "lower the noise")


def demonstrate(env: SimEnv, suite: Suite, episode: Episode, noise: Noise) -> tuple[list[dict[str, Any]], str | None]:
    """One demonstration: its rows, and why it failed (None: it succeeded).

    Row t: what is seen before action t, the events that led there, and the expert's clean action.
    """
    rng = np.random.default_rng([episode.seed, 1])  # the scene has drawn from the seed itself
    disturb = _Disturbance(noise, suite.task(episode.task).max_steps, rng)
    obs, info = env.reset(options={"episode": episode})
    expert = make_expert(env, rng)
    rows: list[dict[str, Any]] = []
    lasting = suite.default_conventions.get("termination") == "original"
    follow_through = _LONG_FOLLOW_THROUGH if lasting else _FOLLOW_THROUGH
    source = "train" if episode.variant == suite.task(episode.task).variant else f"train-{episode.variant}"
    while True:
        decided = expert.act()
        rows.append(
            {
                "episode_id": f"{suite.name}/{episode.task}/{source}/{episode.episode_id:06d}",
                "step": len(rows),
                "timestamp_s": len(rows) / suite.control_hz,
                "control_hz": suite.control_hz,
                "split": "train",
                "domain": "robot",
                "task": episode.task,
                "instruction": obs["instruction"],
                "images": _encode(obs["images"]),
                "ee_pose": obs["ee_pose"],
                "gripper": obs["gripper"],
                "proprio": obs["proprio"],
                "action": decided.action,
                "action_space": suite.action_space,
                "motion_primitive": decided.motion_primitive,
                "reasoning": decided.reasoning,
                "events": info["events"],
                "target_pixel": decided.target_pixel,
                "target_position": decided.target_position,
            }
        )
        obs, _, _, truncated, info = env.step(disturb(decided.action, len(rows) - 1))
        if info["failure"]:
            return rows, info["failure"]
        if truncated and not info["success"]:
            return rows, "ran out of steps"
        if info["success"]:
            follow_through -= 1
        if truncated or (info["success"] and follow_through < 0):
            return rows, None


class _Disturbance:
    """Noise on the executed translation of one demonstration."""

    def __init__(self, noise: Noise, max_steps: int, rng: np.random.Generator):
        noisy = rng.random() < noise.noisy_share
        self._sigma_m = noise.sigma * _MAX_STEP_M if noisy else 0.0
        push_at = int(rng.integers(max_steps // 2)) if noisy and rng.random() < noise.push_share else max_steps
        self._push_steps = range(push_at, push_at + noise.push_steps)
        direction = rng.normal(size=3)
        self._push_m = _MAX_STEP_M * direction / np.linalg.norm(direction)
        self._rng = rng

    def __call__(self, action: np.ndarray, step: int) -> np.ndarray:
        executed = action.astype(np.float64)
        executed[:3] += self._rng.normal(size=3) * self._sigma_m
        if step in self._push_steps:
            executed[:3] = self._push_m
        return executed


def question_row(env: SimEnv, suite: Suite, split: QASplit, index: int, seed: int) -> dict[str, Any]:
    """One question and answer as a row of the multimodal domain."""
    question = make_question(env, split, index, seed)
    return {
        "episode_id": f"{suite.name}/qa/{split}/{index:06d}",
        "step": 0,
        "timestamp_s": 0.0,
        "control_hz": suite.control_hz,
        "split": split,
        "domain": "multimodal",
        "task": question.kind,
        "instruction": question.question,
        "images": _encode({"main": question.image}),
        "reasoning": question.answer,
        "events": [],
    }


def _encode(images: Mapping[str, np.ndarray]) -> list[tuple[str, bytes]]:
    return [(name, dataset.encode_png(image)) for name, image in sorted(images.items())]


def _progress_url(out: str, part: Part) -> str:
    return storage.join(out, "progress", f"part-{part.index:05d}.json")


def _sum_by_source(parts: list[Part], facts: list[dict[str, Any]], key: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for part, fact in zip(parts, facts, strict=True):
        total[part.source] = total.get(part.source, 0) + fact[key]
    return total


def _count_reasons(facts: list[dict[str, Any]]) -> dict[str, int]:
    reasons = [reason for fact in facts for reason in fact["reasons"]]
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}
