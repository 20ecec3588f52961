"""Profiles: what they place, what they refuse before anything starts, and what options win over them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualvla.config import to_dict
from dualvla.errors import UsageError
from dualvla_cluster import resources
from dualvla_cluster.resources import STAGES, Pool, Profile, Work, add_profile, apply_profile, get_profile, place
from dualvla_serve.commands import serve


@pytest.mark.parametrize("name", ["laptop", "node8", "nodes:1", "nodes:16", "spot:3"])
def test_every_stage_of_a_built_in_profile_has_room_and_a_price(name: str) -> None:
    profile = get_profile(name)
    for stage in STAGES:
        work = profile.work(stage)
        assert 1 <= profile.nodes(stage) <= profile.pools[work.pool].most
        assert profile.usd_per_hour(stage) > 0 or name == "laptop"


@pytest.mark.parametrize("text", ["lapptop", "nodes", "nodes:0", "nodes:-1", "node8:2", "spot:x", ""])
def test_an_unknown_profile_is_refused_with_the_nearest(text: str) -> None:
    with pytest.raises(UsageError, match="Unknown profile") as refused:
        get_profile(text)
    assert "laptop" in refused.value.fix


def test_training_workers_that_take_every_cpu_from_the_readers_are_refused() -> None:
    """The known deadlock: Ray Train places all of them, and Ray Data then waits for a CPU that never comes free."""
    two = {"here": Pool(cpus=2, memory_gb=8)}
    with pytest.raises(UsageError, match=r"2 workers of 1 CPU take 2 of 2 CPUs.*hang without an error") as refused:
        Profile("x", "here", two, {"train": Work("here", 2, 1.0, free_cpus=0.5)})
    assert "0.75 CPU" in refused.value.fix
    Profile("x", "here", two, {"train": Work("here", 2, 0.75, free_cpus=0.5)})


@pytest.mark.parametrize(
    "work",
    [Work("here", 1, 5.0), Work("here", 3, 1.0, gpus=1.0), Work("here", 2, 0.1, memory_gb=9.0)],
    ids=["a worker larger than a machine", "GPUs", "memory"],
)
def test_workers_that_find_no_room_are_refused_naming_what_lacks(work: Work) -> None:
    pools = {"here": Pool(cpus=4, memory_gb=16, gpus=2)}
    with pytest.raises(UsageError, match="find no room") as refused:
        Profile("x", "here", pools, {"train": work})
    assert resources.show(work.bundle) in refused.value.message


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), max_size=12),
    st.lists(st.tuples(st.integers(1, 16), st.integers(0, 8)), max_size=4),
)
def test_no_machine_gets_more_than_it_has_and_nothing_is_lost(
    bundles: list[tuple[int, int]], machines: list[tuple[int, int]]
) -> None:
    wanted = [{"CPU": float(cpu), "GPU": float(gpu)} for cpu, gpu in bundles]
    nodes = [{"CPU": float(cpu), "GPU": float(gpu)} for cpu, gpu in machines]
    used, left = place(wanted, nodes)
    assert sum(used.values()) + len(left) == len(wanted)
    for name in ("CPU", "GPU"):
        placed = sum(b[name] for b in wanted) - sum(b[name] for b in left)
        assert placed <= sum(node[name] for node in nodes)
    for bundle in left:  # what waits would not even fit on a machine of its own, or there is too much of it
        alone = any(all(node[name] >= bundle[name] for name in bundle) for node in nodes)
        assert not alone or len(used) > 0


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float)
    add_profile(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("argv", "workers", "gpus"),
    [
        ([], 2, None),
        (["--profile", "node8"], 8, 1.0),
        (["--workers", "2", "--profile", "node8"], 2, 1.0),
        (["--profile", "node8", "--workers", "2", "--gpus", "0"], 2, 0.0),
    ],
)
def test_what_is_said_wins_over_the_profile(argv: list[str], workers: int, gpus: float | None) -> None:
    arguments = parsed(*argv)
    apply_profile(arguments, "train")
    assert (arguments.workers, arguments.gpus) == (workers, gpus)
    apply_profile(parsed(), "train")  # leaves nothing behind
    assert resources.reservation("train", cpus=0.5) == {"num_cpus": 0.5, "num_gpus": 0.0}


def test_an_endpoint_takes_replicas_and_shares_from_the_profile() -> None:
    parser = argparse.ArgumentParser()
    serve.add_endpoint_options(parser)
    scaling = serve.endpoint_config(parser.parse_args(["--profile", "node8", "--cpus", "3"])).scaling
    assert (scaling.replicas, scaling.gpus, scaling.cpus) == (8, 1.0, 3.0)
    assert serve.endpoint_config(parser.parse_args([])).scaling.replicas == 1


def test_a_reservation_is_what_the_profile_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked for once: a machine that is lost later will be replaced, and its workers wait for the new one."""
    asked: list[str] = []
    monkeypatch.setattr(resources, "require", lambda stage, work: asked.append(stage))
    for stage in ("eval", "train"):
        apply_profile(parsed("--profile", "nodes:2"), stage)
    spread = {"num_cpus": 2.0, "num_gpus": 0.25, "memory": 16e9, "scheduling_strategy": "SPREAD"}
    assert [resources.reservation("eval", cpus=0.1) for _ in range(2)] == [spread, spread]
    assert "scheduling_strategy" not in resources.reservation("train", cpus=0.5)  # packed, as Ray Train does
    assert asked == ["eval", "train"]
    apply_profile(parsed("--profile", "spot:2"), "eval")
    resources.reservation("eval", cpus=0.1)
    assert asked == ["eval", "train"]  # a pool that grows is not asked for what it may become
    for stage in ("eval", "train"):
        apply_profile(parsed(), stage)


def test_a_profile_goes_through_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(to_dict(get_profile("spot:3"))))
    assert get_profile(str(file)) == get_profile("spot:3")
    file.write_text(json.dumps({**to_dict(get_profile("node8")), "heda": 1}))
    with pytest.raises(UsageError, match=r"profile\.heda"):
        get_profile(str(file))
