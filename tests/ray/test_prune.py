"""`dualvla prune` on a real Ray: the same bytes however it is run, and no bad input without its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import s3fs
from s3_faults import FaultPlan, fault_proxy, moto_server

from dualvla import cli
from dualvla.errors import DataError, OutputError, PlatformError, UsageError
from dualvla.io import dataset, manifest
from dualvla_pipelines.labelling import SceneSource
from dualvla_pipelines.prune import PruneConfig, PruneJob, on_ray
from dualvla_pipelines.ray_parts import Workers

MakeDataset = Callable[..., str]
pytestmark = pytest.mark.usefixtures("ray_cluster")


def contents(folder: str | Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*.parquet"))}


def pictures(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((Path(folder) / "report").glob("*.png"))}


def spoil(folder: str, part: int) -> str:
    """Gives the first episode of a part a NaN pose; returns its name."""
    url = dataset.part_url(folder, part)
    rows = [row | {"images": dict(row["images"])} for row in dataset.read_table(url).to_pylist()]
    rows[3]["ee_pose"] = [np.nan] * 6
    dataset.write_table(url, dataset.rows_to_table(rows))
    return rows[3]["episode_id"]


def test_workers_change_no_byte_and_a_finished_folder_is_skipped(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, one, three = make_dataset(parts=4), str(tmp_path / "one"), str(tmp_path / "three")
    result = cli.call("prune", [data, one, "--workers", "1"])
    cli.call("prune", [data, three, "--workers", "3"])
    assert contents(one) == contents(three)
    assert pictures(one) == pictures(three)
    assert result["rows_in"] == result["rows_out"] == 4 * (3 * 12 + 2)
    again = cli.call("prune", [data, one])
    assert again == result | {"skipped": True}
    with pytest.raises(OutputError, match="config 'mode' is 'both' there and 'action' here"):
        cli.call("prune", [data, one, "--mode", "action"])


def test_an_error_in_a_worker_arrives_as_it_was_raised(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(parts=1)
    spoiled = spoil(data, 0)
    with pytest.raises(DataError, match=f"{spoiled}.*step 0: ee_pose is not finite") as caught:
        cli.call("prune", [data, str(tmp_path / "out"), "--strict"])
    assert caught.value.fix == "repair it, or leave out --strict"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(["nowhere", "out"], DataError), (["nowhere", "out", "--mode", "bth"], UsageError)],
)
def test_wrong_input_is_refused(tmp_path: Path, arguments: list[str], error: type[Exception]) -> None:
    with pytest.raises(error):
        cli.call("prune", [str(tmp_path / arguments[0]), str(tmp_path / arguments[1]), *arguments[2:]])


def start(data: str, out: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dualvla", "prune", data, str(out), "--workers", str(workers)]
    return subprocess.Popen(command, start_new_session=True)


def wait_until(process: subprocess.Popen[bytes], met: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (found := met()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    return found


@pytest.mark.slow
def test_killed_anywhere_it_resumes_to_the_same_bytes(
    make_dataset: MakeDataset, tmp_path: Path, fault_seed: int
) -> None:
    data, straight, resumed = make_dataset(parts=24), str(tmp_path / "straight"), tmp_path / "resumed"
    spoil(data, 5)
    cli.call("prune", [data, straight])
    kill_after = int(np.random.default_rng([fault_seed, 1]).integers(1, 20))
    process = start(data, resumed, workers=1)
    wait_until(process, lambda: len(list((resumed / "data").glob("*.parquet"))) >= kill_after)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    written = {path.name: path.stat().st_mtime_ns for path in (resumed / "data").glob("*.parquet")}
    assert manifest.read(resumed) is None or len(written) == 24
    cli.call("prune", [data, str(resumed)])
    assert contents(resumed) == contents(straight)
    assert pictures(resumed) == pictures(straight)
    assert manifest.read(resumed) == manifest.read(straight)
    assert {name: (resumed / "data" / name).stat().st_mtime_ns for name in written} == written


@pytest.mark.slow
def test_a_killed_worker_costs_nothing(make_dataset: MakeDataset, tmp_path: Path, fault_seed: int) -> None:
    data, straight, out = make_dataset(parts=60, episodes=6), str(tmp_path / "straight"), tmp_path / "out"
    cli.call("prune", [data, straight])
    kill_after = int(np.random.default_rng([fault_seed, 2]).integers(1, 20))
    process = start(data, out, workers=2)
    wait_until(process, lambda: len(list((out / "data").glob("*.parquet"))) >= kill_after)

    def workers() -> list[psutil.Process]:
        mine = psutil.Process(process.pid).children(recursive=True)
        return [p for p in mine if any("MapWorker" in word for word in p.cmdline())]

    wait_until(process, workers)[0].kill()
    assert process.wait(timeout=120) == 0
    assert contents(out) == contents(straight)


class DeadlyJob(PruneJob):
    """Its workers die on every part that they look at."""

    def scenes(self, device: str) -> SceneSource:
        return SceneSource(lambda episodes: os._exit(1))


@pytest.mark.slow
def test_a_part_that_kills_every_worker_stops_the_job(make_dataset: MakeDataset, tmp_path: Path) -> None:
    job = DeadlyJob(make_dataset(parts=1), str(tmp_path / "out"), PruneConfig())
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    try:
        with pytest.raises(PlatformError, match="died 3 times on the same part"):
            list(on_ray(job, ["part-00000.parquet"], Workers(1)))
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.slow
def test_a_store_that_fails_in_passing_changes_no_byte(
    make_dataset: MakeDataset, tmp_path: Path, fault_seed: int
) -> None:
    data, here, back = make_dataset(parts=4), str(tmp_path / "here"), str(tmp_path / "back")
    spoil(data, 2)
    cli.call("prune", [data, here])
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    plan = FaultPlan(fault_seed, rate=0.1)
    with moto_server() as port, fault_proxy(port, plan) as proxy:
        store = s3fs.S3FileSystem(key="test", secret="test", endpoint_url=f"http://127.0.0.1:{port}")
        store.mkdir("bucket")
        store.put(data, "bucket/data", recursive=True)
        subprocess.run(
            [sys.executable, "-m", "dualvla", "prune", "s3://bucket/data", "s3://bucket/out"],
            env={**os.environ, **keys, "AWS_ENDPOINT_URL": proxy},
            check=True,
        )
        store.get("bucket/out", back, recursive=True)
    assert len(plan.faults()) > 1
    assert contents(back) == contents(here)
    assert pictures(back) == pictures(here)
