"""`dualvla ingest` and `export` on a real Ray: the same bytes however they are run, and whatever kills them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from robot_sources import write_bridge, write_lerobot_v21

from dualvla import cli
from dualvla.errors import DataError
from dualvla.io import dataset, manifest
from dualvla_pipelines.sources.rlds import RldsSource

MakeDataset = Callable[..., str]
pytestmark = pytest.mark.usefixtures("ray_cluster")


def contents(folder: str | Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_workers_change_no_byte_on_the_way_in_and_out(tmp_path: Path) -> None:
    write_lerobot_v21(tmp_path / "src", episodes=5, steps=6, cameras=1)
    source, options = str(tmp_path / "src"), ["--format", "lerobot", "--convention", "bridge"]
    for workers in ("1", "3"):
        data, out = str(tmp_path / f"data-{workers}"), str(tmp_path / f"out-{workers}")
        result = cli.call("ingest", [source, data, *options, "--workers", workers])
        assert (result["rows_in"], result["rows_out"], result["skipped"]) == (30, 30, False)
        cli.call("export", [data, out, "--format", "lerobot", "--workers", workers])
        assert cli.call("validate", [data, "--workers", workers])["ok"]
    assert contents(tmp_path / "data-1") == contents(tmp_path / "data-3")
    assert contents(tmp_path / "out-1") == contents(tmp_path / "out-3")
    assert cli.call("ingest", [source, data, *options])["skipped"]


def test_an_error_of_a_worker_comes_back_as_it_was_raised(tmp_path: Path) -> None:
    write_bridge(tmp_path / "src", files=2, episodes=1, steps=5)
    file = tmp_path / "src/bridge_dataset-train.tfrecord-00001-of-00002"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"00001-of-00002', record 0 is cut off") as caught:
        cli.call("ingest", [str(tmp_path / "src"), str(tmp_path / "out"), "--format", "rlds", "--strict"])
    assert caught.value.fix
    assert manifest.read(tmp_path / "out") is None


def test_a_file_that_kills_its_worker_costs_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bridge(tmp_path / "src", files=3, episodes=1, steps=5)
    from dualvla_pipelines import ingest

    class Deadly(RldsSource):
        def episodes(self, unit):  # type: ignore[no-untyped-def]
            if unit.index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().episodes(unit)

    monkeypatch.setattr(ingest, "RldsSource", Deadly)
    result = cli.call("ingest", [str(tmp_path / "src"), str(tmp_path / "out"), "--format", "rlds"])
    assert (result["episodes"], result["rows_out"]) == (2, 6)
    assert result["quarantine_reasons"] == {"convention": 4, "file": 1}
    (reason,) = result["damaged_files"].values()
    assert "crashed its worker 2 times" in reason


def kill_after_first(command: list[str], sign: Path, pattern: str, delay_s: float) -> None:
    """Runs a command and kills it, and all under it, a moment after the first file of that name has appeared."""
    process = subprocess.Popen([sys.executable, "-m", "dualvla", *command])
    deadline = time.monotonic() + 400
    while not list(sign.glob(pattern)) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay_s)  # another moment for each seed
    if process.poll() is None:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=60)
    process.wait()


@pytest.mark.slow
def test_killed_half_way_ingest_and_export_resume_to_the_same_bytes(tmp_path: Path, fault_seed: int) -> None:
    write_bridge(tmp_path / "src", files=24, episodes=2, steps=6)
    delay_s = float(np.random.default_rng(fault_seed).uniform(0, 0.2))
    source, options = str(tmp_path / "src"), ["--format", "rlds"]
    cli.call("ingest", [source, str(tmp_path / "straight"), *options])
    command = ["ingest", source, str(tmp_path / "resumed"), *options, "--workers", "1"]
    kill_after_first(command, tmp_path / "resumed", "progress/unit-*.json", delay_s)
    was_finished = manifest.read(tmp_path / "resumed") is not None
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "resumed/data").glob("part-*.parquet")}
    result = cli.call("ingest", [source, str(tmp_path / "resumed"), *options])
    assert result["skipped"] == was_finished
    assert contents(tmp_path / "resumed") == contents(tmp_path / "straight")
    # At most the part whose record had not been written yet is made again.
    assert sum(p.stat().st_mtime_ns != before for p, before in kept.items()) <= 1

    data = str(tmp_path / "straight")
    cli.call("export", [data, str(tmp_path / "straight-out"), "--format", "lerobot"])
    command = ["export", data, str(tmp_path / "resumed-out"), "--format", "lerobot", "--workers", "1"]
    kill_after_first(command, tmp_path / "resumed-out", "progress/file-*.json", delay_s)
    cli.call("export", [data, str(tmp_path / "resumed-out"), "--format", "lerobot"])
    assert contents(tmp_path / "resumed-out") == contents(tmp_path / "straight-out")
    assert dataset.open_dataset(data).manifest["rows_out"] == 24 * 2 * 4
