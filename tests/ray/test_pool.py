"""The actor pool: every item once, whatever dies, and errors as they were raised."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray

from dualvla.errors import CheckpointError, DataError, PlatformError
from dualvla_cluster import pool

pytestmark = pytest.mark.usefixtures("ray_cluster")


class WorkerImpl:
    """Notes each item it takes in a file; odd characters of the item decide how it behaves."""

    def __init__(self, notes: str, broken: bool = False):
        if broken:
            raise CheckpointError("no such checkpoint", "pass another")
        self._notes = notes

    def work(self, item: str) -> str:
        seen = Path(self._notes, item)
        times = len(seen.read_text()) if seen.exists() else 0
        seen.write_text("x" * (times + 1))
        if item == "poison" or (item == "dies once" and times == 0):
            os._exit(1)
        if item == "bad":
            raise DataError("bad item", "leave it out")
        return item.upper()


Worker: Any = ray.remote(num_cpus=0.1)(WorkerImpl)


def run(folder: Path, items: list[str], actors: int = 2, **options: bool) -> list[pool.Outcome[str]]:
    return list(pool.run(lambda: Worker.remote(str(folder), **options), "work", items, num_actors=actors))


@pytest.mark.parametrize("actors", [1, 3])
def test_every_item_is_done_exactly_once(tmp_path: Path, actors: int) -> None:
    items = [f"item {i}" for i in range(8)]
    outcomes = run(tmp_path, items, actors)
    assert sorted((o.item, o.value) for o in outcomes) == [(item, item.upper()) for item in items]
    assert all(path.read_text() == "x" for path in tmp_path.iterdir())


def test_a_death_is_retried_and_poison_does_not_stop_the_rest(tmp_path: Path) -> None:
    outcomes = {o.item: o for o in run(tmp_path, ["a", "dies once", "poison", "b", "c"])}
    assert {item for item, o in outcomes.items() if o.failure} == {"poison"}
    assert outcomes["dies once"].value == "DIES ONCE"
    assert "crashed its worker 2 times" in (outcomes["poison"].failure or "")
    assert len((tmp_path / "poison").read_text()) == 2


def test_an_error_of_ours_arrives_with_its_message_and_fix(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(tmp_path, ["a", "bad"])
    assert (caught.value.message, caught.value.fix) == ("bad item", "leave it out")


def test_an_actor_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match=r"A worker could not start: .*no such checkpoint"):
        run(tmp_path, ["a", "b"], broken=True)


def test_no_items_is_no_work(tmp_path: Path) -> None:
    assert run(tmp_path, []) == []
