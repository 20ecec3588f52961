"""A sweep: policies x tasks x numbered episodes, run by a pool of workers, exactly once, into an evaluation folder.

Work is cut into fixed items, so the number of workers changes no outcome. What is recorded in `parts/` is done; a
killed sweep goes on from there. Knows nothing of what a policy or a task is.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dualvla import console
from dualvla.errors import UsageError, did_you_mean
from dualvla.io import dataset, manifest, storage
from dualvla_cluster import connect, pool, resources
from dualvla_eval import policies, results, statistics
from dualvla_eval.actors import LoadPolicy, SweepWorker, WorkerConfig, WorkItem, write_crashed
from dualvla_eval.policies import PolicyRef
from dualvla_eval.suites import Suite

log = logging.getLogger(__name__)

_EPISODES_PER_ITEM = 10


@dataclass(frozen=True)
class SweepConfig:
    """What changes the result of a sweep, beside the policies and the suite.

    tasks: task -> number of episodes. reasoning: when checkpoints may think ("auto", "never", "every:K" control steps).
    envs_per_worker: how many episodes share one forward pass.
    """

    tasks: Mapping[str, int]
    seed: int = 0
    reasoning: str = "auto"
    envs_per_worker: int = 5
    videos_per_task: int = 2


def run_sweep(
    folder: str,
    suite: Suite,
    refs: Sequence[PolicyRef],
    config: SweepConfig,
    *,
    workers: int,
    load_policy: LoadPolicy = policies.load,
) -> dict[str, Any]:
    """Fills `folder` and returns its summary; returns at once if it was finished from the same inputs.

    Raises: UsageError for two policies of one name; OutputError if the folder belongs to another run; whatever
    loading a policy raises.
    """
    refuse_duplicates(refs)
    identity = {
        "suite": suite.name,
        "policies": [r.name for r in refs],
        "tasks": dict(config.tasks),
        "seed": config.seed,
        "reasoning": config.reasoning,
        "envs_per_worker": config.envs_per_worker,
        "videos_per_task": config.videos_per_task,
    }
    inputs = {f"policy:{r.name}": policies.digest(r) for r in refs}
    if not manifest.begin(folder, results.KIND, identity, inputs):
        return {**results.read_json(storage.join(folder, results.SUMMARY)), "skipped": True}

    items = [item for ref in refs for task, count in config.tasks.items() for item in _cut(ref, suite, task, count)]
    worker = WorkerConfig(
        folder, suite, load_policy, config.seed, config.reasoning, config.envs_per_worker, config.videos_per_task
    )
    _run_items(worker, items, workers)

    table = results.merge_parts(folder, parts_done(folder), results.EPISODE_SCHEMA, results.EPISODE_KEY)
    dataset.write_table(storage.join(folder, results.EPISODES), table)
    rows = table.to_pylist()
    summary = summarise(suite, refs, config, rows)
    results.write_json(storage.join(folder, results.SUMMARY), summary)
    manifest.finish(folder, results.KIND, identity, inputs, episodes=len(rows), suite=suite.name)
    return {**summary, "skipped": False}


def refuse_duplicates(refs: Iterable[PolicyRef]) -> None:
    for name, count in Counter(r.name for r in refs).items():
        if count > 1:
            raise UsageError(f"Two policies are called '{name}'.", "name them: --policy first=... --policy second=...")


def parse_tasks(suite: Suite, tasks: str | None, episodes: str) -> dict[str, int]:
    """`--tasks touch,pick` and `--episodes 20` or `touch=100,pick=20` as task -> number of episodes.

    Tasks that `--episodes` does not name get what the suite's task fixes.
    Raises: UsageError for an unknown task or a number that is not positive.
    """
    names = [t.strip() for t in tasks.split(",")] if tasks else [t.name for t in suite.tasks]
    counts = {name: suite.task(name).num_episodes for name in names}
    for word in filter(None, episodes.split(",")):
        name, sign, number = word.partition("=")
        if not sign:
            counts = dict.fromkeys(names, _positive(word))
            continue
        if name not in counts:
            raise UsageError(f"--episodes names task '{name}', which is not evaluated.", did_you_mean(name, counts))
        counts[name] = _positive(number)
    return counts


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UsageError(f"--episodes: '{text}' is not a positive number.", "write 20, or touch=100,pick=20")
    return int(text)


def _cut(ref: PolicyRef, suite: Suite, task: str, count: int) -> list[WorkItem]:
    episodes = suite.episodes(task, count)
    size = _EPISODES_PER_ITEM
    return [WorkItem(ref, task, tuple(episodes[i : i + size])) for i in range(0, len(episodes), size)]


def parts_done(folder: str) -> list[str]:
    files = storage.list_files(storage.join(folder, "parts"), ".parquet")
    return [f.rsplit("/", 1)[-1].removesuffix(".parquet") for f in files]


def _pending(items: Iterable[WorkItem], done: set[str]) -> list[WorkItem]:
    """What is left to run. An item that was split because it crashed goes on as its single episodes."""
    pending = []
    for item in items:
        singles = _singles(item)
        if item.part in done:
            continue
        begun = any(s.part in done for s in singles)
        pending += [s for s in singles if s.part not in done] if begun else [item]
    return pending


def _singles(item: WorkItem) -> list[WorkItem]:
    return [replace(item, episodes=(episode,)) for episode in item.episodes]


def _run_items(config: WorkerConfig, items: Sequence[WorkItem], workers: int) -> None:
    """Runs what is not recorded yet. Episodes that crash their worker even alone are recorded as crashed."""
    total = sum(len(i.episodes) for i in items)
    pending = _pending(items, set(parts_done(config.folder)))
    todo = sum(len(i.episodes) for i in pending)
    if not pending:
        return
    connect.connect()
    options = resources.reservation("eval", cpus=pool_share(workers))
    with console.progress("evaluate", total=total, done=total - todo) as advance:
        while pending:
            crashed: list[WorkItem] = []
            for outcome in pool.run(
                lambda: SweepWorker.options(**options).remote(config),
                "run",
                pending,
                num_actors=workers,
            ):
                if outcome.failure is None:
                    advance(outcome.value)
                elif len(outcome.item.episodes) > 1:
                    log.warning("%s crashed; its episodes are run one by one", outcome.item)
                    crashed += _singles(outcome.item)
                else:
                    write_crashed(config.folder, outcome.item, outcome.failure)
                    advance(1)
            pending = crashed


def pool_share(workers: int) -> float:
    """Logical CPUs of one worker, so that all fit into the cluster: one that waits for a CPU would hang the sweep."""
    import ray

    return min(1.0, 0.9 * ray.cluster_resources().get("CPU", 1.0) / workers)


def summarise(
    suite: Suite, refs: Sequence[PolicyRef], config: SweepConfig, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """summary.json: for each policy its tasks with Wilson intervals, named means, costs and stop reasons."""
    per_policy = {
        ref.name: _summarise_policy(ref, config, [r for r in rows if r["policy"] == ref.name]) for ref in refs
    }
    return {
        "suite": suite.name,
        "control_hz": suite.control_hz,
        "tasks": flat_tasks({name: p["tasks"] for name, p in per_policy.items()}),
        "policies": per_policy,
        "termination_rule": suite.termination_rule,
        "conventions": dict(suite.conventions),
        "assets": {"used": [], "substituted": []},
        "interval": "Wilson, 95 %",
        "reasoning": config.reasoning,
        "seed": config.seed,
    }


def flat_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """contract.md's `tasks`: by task for one policy, by policy/task for several."""
    if len(tasks) == 1:
        return dict(next(iter(tasks.values())))
    return {f"{policy}/{task}": value for policy, of_policy in tasks.items() for task, value in of_policy.items()}


def _summarise_policy(ref: PolicyRef, config: SweepConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_task = {task: [r for r in rows if r["task"] == task] for task in config.tasks}
    tasks = {t: statistics.wilson(sum(r["success"] for r in of), len(of)).to_dict() for t, of in by_task.items()}
    mean, low, high = statistics.bootstrap_mean_of_means([[float(r["success"]) for r in of] for of in by_task.values()])
    steps = sum(r["steps"] for r in rows)
    replies = sum(r["replies"] for r in rows)
    waited = sum(r["infer_ms"] * r["replies"] for r in rows if r["replies"])
    kinds = {r["policy_kind"] for r in rows} - {"unknown"}
    return {
        "source": "built-in" if ref.built_in else "endpoint" if ref.remote else "checkpoint",
        "ablation": ref.ablation,
        "control": ref.control,
        "kind": kinds.pop() if kinds else "unknown",
        "tasks": tasks,
        "means": {
            "mean of tasks": {"value": mean, "low": low, "high": high, "tasks": list(by_task), "trials": len(rows)}
        },
        "steps": steps,
        "mean_steps": steps / len(rows),
        "infer_ms": waited / replies if replies else None,
        "reasoning_tokens_per_step": sum(r["reasoning_tokens"] for r in rows) / max(1, steps),
        "reasoning_steps_share": sum(r["reasoning_steps"] for r in rows) / max(1, steps),
        "stop_reasons": dict(sorted(Counter(r["stop_reason"] for r in rows).items())),
        "mean_wall_s": float(np.mean([r["wall_s"] for r in rows])),
    }
