"""Pieces of work, each a name, through a pool of Ray Data actors: the outer layer of `prune` and `teach`.

Ray Data carries names, not contents: every actor reads and writes its part itself, so nothing is shuffled and nothing
large crosses a process. Knows nothing of what a part is.
"""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dualvla import errors

log = logging.getLogger(__name__)

# Actors that hold every CPU starve Ray Data's own tasks, and it waits for ever without an error.
_CPUS_PER_WORKER = 0.5
# Ray Data takes about 10 ms of the driver for a task, beside workers that hold every core: parts go in small groups.
_TASKS_PER_WORKER, _MOST_PARTS_A_TASK = 32, 8
_UNTIL_DEAD_S = 60.0  # Ray's head asks each node every few seconds, and gives it up after some silence
_RETRIES = 2  # of a part whose worker died, before the job stops: a part that kills every worker must not loop for ever


@dataclass(frozen=True)
class Workers:
    """How the work is spread; changes no result.

    count: processes (default: one a CPU). gpus: share of a GPU for each that uses one (default: the cluster's GPUs
    divided evenly among the workers; 0 keeps them on CPUs).
    """

    count: int | None = None
    gpus: float | None = None

    def plan(self, parts: int, cluster_cpus: float, cluster_gpus: float, learned: bool) -> tuple[int, dict[str, float]]:
        """(number of actors, what each asks Ray for), such that all of them can be placed at once.

        learned: whether the work runs a network, which a GPU would help.
        """
        count = max(1, min(parts, self.count or int(cluster_cpus)))
        share = self.gpus if learned and cluster_gpus else 0.0
        if share is None:
            share = math.floor(1e4 / max(1, math.ceil(count / cluster_gpus))) / 1e4  # Ray counts in 1/10000
        if share:
            count = min(count, max(1, int(cluster_gpus * math.floor(1.0 / share))))
        return count, {"num_cpus": min(_CPUS_PER_WORKER, 0.5 * cluster_cpus / count), "num_gpus": share}


class _Worker:
    """What does the parts, as Ray Data calls it: a row with a part's name in, with its result or its error out."""

    def __init__(self, start: Callable[[str], Callable[[str], Any]], device: str):
        import pyarrow as pa

        pa.set_cpu_count(1)  # one process a CPU: threads beside it only get in each other's way
        self._work = start(device)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        try:
            return {"name": row["name"], "result": json.dumps(self._work(row["name"])), "error": ""}
        except errors.DualVLAError as error:
            return {"name": row["name"], "result": "", "error": json.dumps([type(error).__name__, *error.args])}


def run(
    stage: str, start: Callable[[str], Callable[[str], Any]], names: Sequence[str], workers: Workers, learned: bool
) -> Iterator[tuple[str, Any]]:
    """(name, its result) as the parts finish, in no particular order. A few names are one block.

    stage: whose share of a profile each actor takes. start: called once in every actor with its device, as PyTorch
    names it; gives what turns a name into a JSON-ready result. Raises: what that raises of ours; PlatformError for a
    part that kills its workers.
    """
    import ray

    from dualvla_cluster.connect import connect

    connect()
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts parts
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it announces every plan, and that its bars are off
    left = dict.fromkeys(names)
    while left:
        nodes = _alive()
        try:
            for name, result in _once(stage, start, list(left), workers, learned):
                del left[name]
                yield name, result
        except ray.exceptions.RayActorError as error:
            # Ray Data spends the retries of a part within seconds, long before a lost node counts as dead.
            if not _lost_one_of(nodes, isinstance(error, ray.exceptions.ActorUnavailableError)):
                raise errors.PlatformError(
                    f"A worker died {_RETRIES + 1} times on the same part: {str(error).splitlines()[0]}",
                    "give it more memory (fewer --workers), then run the same command again: it resumes",
                ) from error
            log.warning("a node is gone; the %d parts that are left are run by the others", len(left))


def _once(
    stage: str, start: Callable[[str], Callable[[str], Any]], names: Sequence[str], workers: Workers, learned: bool
) -> Iterator[tuple[str, Any]]:
    import ray

    from dualvla_cluster import resources

    cluster = ray.cluster_resources()
    count, shares = workers.plan(len(names), cluster["CPU"], cluster.get("GPU", 0.0), learned)
    tasks = max(math.ceil(len(names) / _MOST_PARTS_A_TASK), min(len(names), count * _TASKS_PER_WORKER))
    options = resources.reservation(stage, cpus=shares["num_cpus"], gpus=shares["num_gpus"])
    with warnings.catch_warnings():
        # Deprecated for 2.64, but without it Ray Data tries a part that kills its worker for ever.
        warnings.simplefilter("ignore", DeprecationWarning)
        parts = ray.data.from_items([{"name": name} for name in names], override_num_blocks=tasks).map(
            _Worker,
            fn_constructor_args=(start, "cuda" if options["num_gpus"] else "cpu"),
            compute=ray.data.ActorPoolStrategy(size=count),
            max_task_retries=_RETRIES,
            **options,
        )
    for row in parts.iter_rows():
        if row["error"]:
            kind, *arguments = json.loads(row["error"])
            raise getattr(errors, kind)(*arguments)
        yield row["name"], json.loads(row["result"])


def _alive() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _lost_one_of(nodes: set[str], unavailable: bool) -> bool:
    """unavailable: nothing is known but that an actor does not answer; its node, if there are others, has until the
    deadline to be found dead."""
    deadline = time.monotonic() + (_UNTIL_DEAD_S if unavailable and len(nodes) > 1 else 0.0)
    while nodes <= _alive():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
    return True
