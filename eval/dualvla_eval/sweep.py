"""A sweep: policies x tasks x numbered episodes x seeds, by simulators and policy hosts, exactly once, into a folder.

The unit of work is one episode. What is recorded in `parts/` is done; a killed sweep goes on from there. Neither the
order of the work nor the number of processes changes an outcome. Knows nothing of what a policy or a task is.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import ray

from dualvla import console
from dualvla.errors import SessionLostError, UsageError, did_you_mean
from dualvla.io import dataset, manifest, storage
from dualvla_cluster import connect, pool, resources
from dualvla_eval import policies, results
from dualvla_eval.actors import Host, LoadPolicy, Simulator, SimulatorConfig, WorkItem, write_crashed
from dualvla_eval.conventions import Conventions
from dualvla_eval.policies import PolicyRef
from dualvla_eval.rollout import Limits
from dualvla_eval.suites import Suite
from dualvla_eval.summary import summarise

log = logging.getLogger(__name__)

_GPU_BATCH = 16  # what `max_batch` None means where policies run on a GPU; on a CPU, 1


@dataclass(frozen=True)
class SweepConfig:
    """What changes the result of a sweep, beside the policies and the suite.

    tasks: task -> number of episodes of each of its variants. variants: of the suite's (None: all). seeds: of the
    policies' randomness; every episode is run with each. reasoning: when checkpoints may think ("auto", "never",
    "every:K" control steps). conventions: how replies become actions. max_batch: of observations that a checkpoint is
    asked about at once; batches form as work comes, and change the last bits of a network's sums, so that 1 alone
    repeats to the bit (None: 1 on a CPU, 16 on a GPU). videos_per_task: of the first episodes of each task and variant,
    with the first seed; with only_failures, kept if the episode was not solved.
    """

    tasks: Mapping[str, int]
    variants: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    reasoning: str = "auto"
    conventions: Conventions = field(default_factory=Conventions)
    max_batch: int | None = None
    videos_per_task: int = 2
    only_failures: bool = False


@dataclass(frozen=True)
class Machinery:
    """What runs a sweep, and changes no outcome.

    workers: simulator processes, at most; a cluster that has no room for all gives work to those that run.
    envs_per_worker: episodes that a simulator has in flight, so that it simulates some while others wait for a policy.
    hosts: processes that hold checkpoints (None: one a GPU; without one as many as workers on a machine of our own,
    else one). recycle_after: episodes after which a simulator is replaced, which bounds what it can leak. patience_s:
    how long an endpoint, or a host that is restarted, may be away.
    """

    workers: int
    envs_per_worker: int = 4
    hosts: int | None = None
    recycle_after: int = 200
    limits: Limits = field(default_factory=Limits)
    patience_s: float = 60.0


def run_sweep(
    folder: str,
    suite: Suite,
    refs: Sequence[PolicyRef],
    config: SweepConfig,
    *,
    machinery: Machinery = Machinery(workers=1),
    load_policy: LoadPolicy = policies.load,
) -> dict[str, Any]:
    """Fills `folder` and returns its summary; returns at once if it was finished from the same inputs.

    Raises: UsageError for two policies of one name or an unknown variant; OutputError if the folder belongs to another
    run; whatever loading a policy raises.
    """
    refuse_duplicates(refs)
    if any(ref.scripted for ref in refs):
        suite.need_expert()
    items = plan(suite, refs, config)
    identity = {"suite": suite.name, "policies": [r.name for r in refs], **asdict(config)}
    identity |= {"variants": list(config.variants or ()), "seeds": list(config.seeds)}
    inputs = {f"policy:{r.name}": policies.digest(r) for r in refs}
    if not manifest.begin(folder, results.KIND, identity, inputs):
        return {**results.read_json(storage.join(folder, results.SUMMARY)), "skipped": True}

    # A built-in policy answers at once: one episode at a time keeps a simulator busy, and saves environments.
    envs = 1 if all(ref.built_in for ref in refs) else machinery.envs_per_worker
    worker = SimulatorConfig(
        folder,
        suite,
        load_policy,
        config.reasoning,
        config.conventions,
        machinery.limits,
        machinery.patience_s,
        config.only_failures,
        envs,
    )
    _run_items(worker, items, machinery, config.max_batch)

    parts = [item.part for item in items]
    table = results.merge_parts(folder, parts, results.EPISODE_SCHEMA, results.EPISODE_KEY)
    dataset.write_table(storage.join(folder, results.EPISODES), table)
    tasks = list(config.tasks)
    rows = sorted(table.to_pylist(), key=lambda row: tasks.index(row["task"]))
    summary = {
        **summarise(suite, refs, rows, config.conventions),
        "reasoning": config.reasoning,
        "seeds": list(config.seeds),
        "max_batch": config.max_batch,
        "machines": results.read_machines(folder),
    }
    results.write_json(storage.join(folder, results.SUMMARY), summary)
    manifest.finish(folder, results.KIND, identity, inputs, episodes=len(rows), suite=suite.name)
    return {**summary, "skipped": False}


def plan(suite: Suite, refs: Sequence[PolicyRef], config: SweepConfig) -> list[WorkItem]:
    """All that is to be run, policy by policy. Raises: UsageError if the chosen tasks have none of the variants."""
    cells = [
        (spec.name, spec.variant)
        for name in config.tasks
        for spec in suite.tasks
        if spec.name == name and (config.variants is None or spec.variant in config.variants)
    ]
    for variant in config.variants or ():
        known = {spec.variant for spec in suite.tasks if spec.name in config.tasks}
        if variant not in known:
            raise UsageError(f"The tasks have no variant '{variant}'.", did_you_mean(variant, known))
    return [
        WorkItem(ref, episode, seed, filmed=seed == config.seeds[0] and number < config.videos_per_task)
        for ref in refs
        for task, variant in cells
        for seed in config.seeds
        for number, episode in enumerate(suite.episodes(task, config.tasks[task], variant))
    ]


def refuse_duplicates(refs: Iterable[PolicyRef]) -> None:
    for name, count in Counter(r.name for r in refs).items():
        if count > 1:
            raise UsageError(f"Two policies are called '{name}'.", "name them: --policy first=... --policy second=...")


def parse_tasks(suite: Suite, tasks: str | None, episodes: str) -> dict[str, int]:
    """`--tasks touch,pick` and `--episodes 20` or `touch=100,pick=20` as task -> number of episodes of each variant.

    Tasks that `--episodes` does not name get what the suite's task fixes.
    Raises: UsageError for an unknown task or a number that is not positive.
    """
    names = [t.strip() for t in tasks.split(",")] if tasks else suite.task_names
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


def parse_seeds(text: str) -> tuple[int, ...]:
    """`--seeds 0,2,4`. Raises: UsageError for what is no number, or comes twice."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise UsageError(f"--seeds: '{text}' is no list of different numbers.", "write 0,1,2")
    return tuple(map(int, words))


def parse_videos(text: str, tasks: Mapping[str, int]) -> tuple[int, bool]:
    """`--videos N`, all or failures: (how many of the first episodes are filmed, whether only failures are kept).

    Raises: UsageError.
    """
    if text in ("all", "failures"):
        return max(tasks.values()), text == "failures"
    if not text.isdecimal():
        raise UsageError(f"--videos '{text}' is no number of episodes.", "write --videos 2, all or failures")
    return int(text), False


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UsageError(f"--episodes: '{text}' is not a positive number.", "write 20, or touch=100,pick=20")
    return int(text)


def parts_done(folder: str) -> list[str]:
    files = storage.list_files(storage.join(folder, "parts"), ".parquet")
    return [f.rsplit("/", 1)[-1].removesuffix(".parquet") for f in files]


def _run_items(config: SimulatorConfig, items: Sequence[WorkItem], machinery: Machinery, max_batch: int | None) -> None:
    """Runs what is not recorded yet. Episodes that crash or stall their worker even alone are recorded as such."""
    done = set(parts_done(config.folder))
    pending = [item for item in items if item.part not in done]
    if not pending:
        return
    connect.connect()
    left = Counter(item.policy for item in pending)
    rules = pool.Rules(
        slots=config.envs + 1,
        recycle_after=machinery.recycle_after,
        stall_s=machinery.limits.step_s,
        retried=(SessionLostError,),
        errors_crash=True,
    )
    with (
        _hosts(config, left, machinery, max_batch) as (hosts, options),
        console.progress("evaluate", total=len(items), done=len(items) - len(pending)) as advance,
    ):

        def simulator() -> Any:
            return Simulator.options(**options).remote(config, hosts)

        for outcome in pool.run(simulator, "run", pending, num_actors=machinery.workers, rules=rules):
            item = outcome.item
            if outcome.failure is not None and outcome.reason is not None:
                log.warning("%s: %s", item, outcome.failure)
                write_crashed(config.folder, item, outcome.reason, outcome.failure)
            advance(1)
            left[item.policy] -= 1
            if not left[item.policy]:
                for host in hosts:
                    host.drop.remote(item.policy)


@contextmanager
def _hosts(
    config: SimulatorConfig, left: Mapping[PolicyRef, int], machinery: Machinery, max_batch: int | None
) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """The hosts that the policies need, and Ray's options of a simulator. left: policy -> number of episodes to run.

    On a Ray of our own all share its CPUs, whatever their number. On a cluster each takes a whole one, so that an
    autoscaler sees what is wanted; hosts come first, as nothing goes on without them. They begin to load at once.
    """
    ours = os.environ.get("RAY_ADDRESS", "local") == "local"
    gpus = int(ray.cluster_resources().get("GPU", 0))
    waiting = sum(number for ref, number in left.items() if ref.hosted)
    number = min(waiting, machinery.hosts or gpus or (machinery.workers if ours else 1))
    num_cpus = pool_share(machinery.workers + number) if ours else 1.0
    options: dict[str, Any] = resources.reservation("eval", cpus=num_cpus)
    share = options.pop("num_gpus") or min(1.0, gpus / max(1, number))  # the GPUs are for policies
    make: Callable[..., Any] = Host.options(num_cpus=num_cpus, num_gpus=share, max_restarts=-1).remote
    batch = max_batch or (_GPU_BATCH if gpus else 1)
    hosts = [make(config.suite, config.load_policy, config.reasoning, batch) for _ in range(number)]
    try:
        loading = [host.spec.remote(ref) for host in hosts for ref in left if ref.hosted]
        if not ours:
            ray.wait(loading, num_returns=len(loading))  # what loading raises comes with the first question
        yield hosts, options
    finally:
        for host in hosts:
            ray.kill(host)


def pool_share(workers: int) -> float:
    """Logical CPUs of one worker, so that all fit into the cluster: one that waits for a CPU would hang the sweep."""
    return min(1.0, 0.9 * ray.cluster_resources().get("CPU", 1.0) / workers)
