"""`dualvla prune` on a real Ray: the same bytes however it is run, and no bad input without its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dualvla import cli
from dualvla.errors import DataError, OutputError, UsageError
from dualvla.io import dataset, manifest

MakeDataset = Callable[..., str]
pytestmark = pytest.mark.usefixtures("ray_cluster")


def contents(folder: str | Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*.parquet"))}


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
    assert result["rows_in"] == result["rows_out"] == 4 * (3 * 12 + 2)
    again = cli.call("prune", [data, one])
    assert again == result | {"skipped": True}
    with pytest.raises(OutputError, match="config 'mode' is 'both' there and 'action' here"):
        cli.call("prune", [data, one, "--mode", "action"])


def test_unfit_episodes_are_quarantined_and_counted(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, out = make_dataset(), tmp_path / "out"
    spoiled = spoil(data, 1)
    result = cli.call("prune", [data, str(out)])
    assert result["rows_quarantined"] == 12
    assert result["rows_in"] == result["rows_out"] + 12
    assert result["quarantine_reasons"] == {"ee_pose is not finite": 12}
    (file,) = (out / "quarantine").iterdir()
    assert set(dataset.read_table(str(file))["episode_id"].to_pylist()) == {spoiled}
    assert spoiled not in dataset.open_dataset(str(out)).read(["episode_id"])["episode_id"].to_pylist()

    with pytest.raises(DataError, match=f"{spoiled}.*step 0: ee_pose is not finite"):
        cli.call("prune", [data, str(tmp_path / "strict"), "--strict"])


def test_truncated_part_is_named(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset()
    part = Path(dataset.part_url(data, 1))
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"part-00001\.parquet' is not a readable parquet file") as caught:
        cli.call("prune", [data, str(tmp_path / "out")])
    assert caught.value.fix
    assert manifest.read(tmp_path / "out") is None


def test_episode_split_between_parts_is_refused(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(parts=2, episodes=1, questions=0)
    whole = dataset.read_table(dataset.part_url(data, 0))
    dataset.write_table(dataset.part_url(data, 0), whole.slice(0, 5))
    dataset.write_table(dataset.part_url(data, 1), whole.slice(5))
    with pytest.raises(DataError, match=r"is split between part-00000\.parquet and part-00001\.parquet"):
        cli.call("prune", [data, str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(["nowhere", "out"], DataError), (["nowhere", "out", "--mode", "bth"], UsageError)],
)
def test_wrong_input_is_refused(tmp_path: Path, arguments: list[str], error: type[Exception]) -> None:
    with pytest.raises(error):
        cli.call("prune", [str(tmp_path / arguments[0]), str(tmp_path / arguments[1]), *arguments[2:]])


@pytest.mark.slow
def test_killed_half_way_it_resumes_to_the_same_bytes(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, straight, resumed = make_dataset(parts=24), str(tmp_path / "straight"), tmp_path / "resumed"
    cli.call("prune", [data, straight])
    process = subprocess.Popen(
        [sys.executable, "-m", "dualvla", "prune", data, str(resumed), "--workers", "1"], start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list((resumed / "data").glob("*.parquet")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    written = {path.name: path.stat().st_mtime_ns for path in (resumed / "data").glob("*.parquet")}
    assert manifest.read(resumed) is None or len(written) == 24
    cli.call("prune", [data, str(resumed)])
    assert contents(resumed) == contents(straight)
    assert {name: (resumed / "data" / name).stat().st_mtime_ns for name in written} == written
