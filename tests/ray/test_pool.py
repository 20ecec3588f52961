"""The actor pool: every item once, whatever dies, and errors as they were raised."""

from __future__ import annotations

import asyncio
import os
import time
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


class ManyImpl:
    """Works on several items at once; "poison" kills it, "stuck" never lets another one have a turn."""

    def __init__(self, notes: str):
        self._notes = Path(notes)

    async def work(self, item: str) -> str:
        with (self._notes / item).open("a") as note:
            note.write("x")
        await asyncio.sleep(0.05)
        if item == "poison":
            os._exit(1)
        if item == "raises":
            raise RuntimeError("device lost")
        if item == "stuck":
            time.sleep(3600)
        return item.upper()


Many: Any = ray.remote(num_cpus=0.1)(ManyImpl)


@pytest.mark.parametrize(
    ("bad", "reason", "attempts"), [("poison", "crashed", 3), ("raises", "crashed", 3), ("stuck", "stalled", 3)]
)
def test_who_was_in_flight_beside_poison_is_run_alone_and_cleared(
    tmp_path: Path, bad: str, reason: str, attempts: int
) -> None:
    items = ["a", "b", bad, "c", "d", "e", "f"]
    rules = pool.Rules(slots=3, stall_s=4.0 if bad == "stuck" else None, errors_crash=True)
    found = pool.run(lambda: Many.remote(str(tmp_path)), "work", items, num_actors=1, rules=rules)
    outcomes = {o.item: o for o in found}
    assert {item: o.reason for item, o in outcomes.items()} == {i: reason if i == bad else None for i in items}
    assert len((tmp_path / bad).read_text()) == attempts  # among others, then twice alone


def test_actors_are_replaced_after_so_many_items(tmp_path: Path) -> None:
    rules = pool.Rules(slots=2, recycle_after=3)
    made: list[Any] = []

    def make() -> Any:
        made.append(Many.remote(str(tmp_path)))
        return made[-1]

    outcomes = list(pool.run(make, "work", [f"item {i}" for i in range(8)], num_actors=1, rules=rules))
    assert len(outcomes) == 8
    assert len(made) == 3


def test_what_finds_no_room_gets_no_work_and_holds_nothing_up(tmp_path: Path) -> None:
    """As when more is asked for than a cluster has: those that run do all the work."""
    number = iter(range(4))

    def make() -> Any:
        return Many.options(num_cpus=0.1 if next(number) == 1 else 1e6).remote(str(tmp_path))

    outcomes = list(pool.run(make, "work", [f"item {i}" for i in range(5)], num_actors=3))
    assert len(outcomes) == 5


def test_an_error_of_ours_arrives_with_its_message_and_fix(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(tmp_path, ["a", "bad"])
    assert (caught.value.message, caught.value.fix) == ("bad item", "leave it out")


def test_an_actor_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match=r"A worker could not start: .*no such checkpoint"):
        run(tmp_path, ["a", "b"], broken=True)


def test_no_items_is_no_work(tmp_path: Path) -> None:
    assert run(tmp_path, []) == []
