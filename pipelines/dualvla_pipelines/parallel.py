"""One function over many items on Ray, each item to one worker, results as they come. Knows nothing of the items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from dualvla import console

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Worker(Generic[Item, Result]):
    """Runs in a process of its own."""

    def __init__(self, work: Callable[[Item], Result]):
        import pyarrow as pa

        pa.set_cpu_count(1)  # one process a CPU: threads beside it only get in each other's way
        self._work = work

    def run(self, item: Item) -> Result:
        return self._work(item)


def run_each(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int | None,
    description: str,
    give_up: Callable[[Item, str], Result],
) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) in no particular order, under a progress bar.

    workers: processes (default and bound: one a CPU of the cluster). give_up: the result of an item that has killed its
    worker twice. An error that `work` raises ends everything.
    """
    import ray

    from dualvla_cluster import pool
    from dualvla_cluster.connect import connect

    connect()
    cpus = int(ray.cluster_resources()["CPU"])
    remote: Any = ray.remote(num_cpus=1)(_Worker)
    shared = ray.put(work)
    with console.progress(description, len(items)) as advance:
        for outcome in pool.run(lambda: remote.remote(shared), "run", items, num_actors=min(workers or cpus, cpus)):
            failed = outcome.failure is not None
            yield outcome.item, give_up(outcome.item, str(outcome.failure)) if failed else outcome.value
            advance(1)
