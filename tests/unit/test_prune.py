"""Pruning a data set folder, without Ray: what is put aside, what is lost, and what the report shows.

The same job runs on Ray in tests/ray/test_prune.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dualvla.errors import DataError, OutputError, UsageError
from dualvla.io import dataset, manifest
from dualvla.pruning.ddm import KIND as DETECTOR_KIND
from dualvla.pruning.ddm import DDMConfig, DDMNet, load_detector, save_detector
from dualvla_pipelines import labelling, prune_report, timeline
from dualvla_pipelines.prune import PartPruner, PruneConfig, PruneJob, prune
from dualvla_pipelines.prune_report import ReportConfig
from dualvla_pipelines.ray_parts import Workers

MakeDataset = Callable[..., str]
HOSTILE = "<script>document.title='owned'</script>"


def here(job: PruneJob, names: Sequence[str], workers: Workers) -> Iterator[tuple[str, dict[str, Any]]]:
    part = PartPruner(job)
    return ((name, part(name)) for name in names)


def run(data: str, out: Path | str, detector: str | None = None, timelines: int = 0, **config: Any) -> dict[str, Any]:
    report = ReportConfig(timelines=timelines)
    return prune(data, str(out), PruneConfig(**config), detector=detector, report=report, execute=here)


def read_report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report" / "report.json").read_text())


def change(folder: str, part: int, edit: Callable[[list[dict[str, Any]]], object]) -> list[dict[str, Any]]:
    """Rewrites a part after `edit` has changed its rows."""
    url = dataset.part_url(folder, part)
    rows = dataset.read_table(url).to_pylist(maps_as_pydicts="strict")
    edit(rows)
    dataset.write_table(url, dataset.rows_to_table(rows))
    return rows


def truncate(folder: str, part: int) -> None:
    path = Path(dataset.part_url(folder, part))
    path.write_bytes(path.read_bytes()[:-100])


def test_unfit_episodes_are_quarantined_and_counted(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, out = make_dataset(), tmp_path / "out"
    spoiled = change(data, 1, lambda rows: rows[3].update(ee_pose=[np.nan] * 6))[3]["episode_id"]
    result = run(data, out)
    assert result["rows_quarantined"] == 12
    assert result["rows_in"] == result["rows_out"] + 12
    assert result["quarantine_reasons"] == {"ee_pose is not finite": 12}
    (file,) = (out / "quarantine").iterdir()
    assert set(dataset.read_table(str(file))["episode_id"].to_pylist()) == {spoiled}
    assert spoiled not in dataset.open_dataset(str(out)).read(["episode_id"])["episode_id"].to_pylist()

    with pytest.raises(DataError, match=f"{spoiled}.*step 0: ee_pose is not finite"):
        run(data, tmp_path / "strict", strict=True)


def test_truncated_part_costs_that_part_and_is_named(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, out = make_dataset(parts=3), str(tmp_path / "out")
    truncate(data, 1)
    result = run(data, out)
    assert list(result["files_lost"]) == ["part-00001.parquet"]
    assert "not a readable parquet file" in result["files_lost"]["part-00001.parquet"]
    assert result["rows_lost"] == 3 * 12 + 2
    assert result["rows_in"] == result["rows_out"] == 2 * result["rows_lost"]
    assert len(dataset.open_dataset(out).read(["step"])) == result["rows_out"]
    assert "part-00001.parquet" in Path(result["report"]).read_text()

    with pytest.raises(DataError, match=r"part-00001\.parquet' is not a readable parquet file") as caught:
        run(data, tmp_path / "strict", strict=True)
    assert caught.value.fix
    assert manifest.read(tmp_path / "strict") is None


def test_nothing_readable_is_an_error(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(parts=1)
    truncate(data, 0)
    with pytest.raises(DataError, match="No part of"):
        run(data, tmp_path / "out")


def test_rows_that_vanished_are_noticed(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(parts=1)
    change(data, 0, lambda rows: rows.pop())
    with pytest.raises(DataError, match="holds 37 rows where its manifest says 38"):
        run(data, tmp_path / "out")


def test_an_episode_split_between_parts_is_refused(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(parts=3, episodes=1, questions=0)
    whole = dataset.read_table(dataset.part_url(data, 0))
    dataset.write_table(dataset.part_url(data, 0), whole.slice(0, 5))
    dataset.write_table(dataset.part_url(data, 2), whole.slice(5))
    with pytest.raises(
        DataError, match=r"'synthetic/robot/0-0'.* is split between part-00000\.parquet and part-00002\.parquet"
    ):
        run(data, tmp_path / "out")


def test_random_keeps_as_many_as_both_in_every_episode(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data = make_dataset(parts=2)
    kept = {}
    for mode in ("both", "random"):
        run(data, tmp_path / mode, mode=mode)
        rows = dataset.open_dataset(str(tmp_path / mode)).read(["episode_id", "domain", "keep_reasoning"])
        counts = rows.filter(rows["domain"].to_numpy() == "robot").group_by("episode_id")
        kept[mode] = sorted(map(str, counts.aggregate([("keep_reasoning", "sum")]).to_pylist()))
    assert kept["random"] == kept["both"]


def test_report_counts_what_the_data_holds_and_escapes_its_texts(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, out = make_dataset(parts=3), tmp_path / "out"
    change(data, 0, lambda rows: [row.update(reasoning=HOSTILE, instruction=HOSTILE) for row in rows])
    page = Path(run(data, out, timelines=9)["report"]).read_text()
    report = read_report(out)
    rows = dataset.open_dataset(str(out)).read(["domain", "keep_reasoning"]).to_pylist()
    robot = [row["keep_reasoning"] for row in rows if row["domain"] == "robot"]
    assert report["total"]["kept_frames"] == sum(robot)
    assert report["total"]["keep_ratio"] == sum(robot) / len(robot)
    assert report["text"]["kept"]["texts"] == report["text"]["random"]["texts"] == sum(robot)
    assert report["text"]["all"]["tokens"] == report["total"]["tokens_before"]  # so small that all are in the sample
    assert report["text"]["kept"]["tokens"] == report["total"]["tokens_after"]
    assert len(report["timelines"]) == 9
    for shown in report["timelines"]:
        with Image.open(out / "report" / shown["file"]) as picture:
            assert picture.width == 1200
        assert sum(step["kept"] for step in shown["steps"]) == shown["kept_frames"]
    assert "&lt;script&gt;" in page
    assert "<script" not in page


def test_report_is_made_again_only_when_asked_differently(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, out = make_dataset(parts=1), tmp_path / "out"
    run(data, out, timelines=1)
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert run(data, out, timelines=1)["skipped"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*")} == made
    run(data, out, timelines=2)
    assert len(read_report(out)["timelines"]) == 2
    assert {path: path.stat().st_mtime_ns for path in made if "report" not in path.parts} == {
        path: mtime for path, mtime in made.items() if "report" not in path.parts
    }


def test_share_of_events_with_a_kept_frame_near(make_dataset: MakeDataset, tmp_path: Path) -> None:
    data, out = make_dataset(parts=1, episodes=1, questions=0), tmp_path / "out"
    change(data, 0, lambda rows: [rows[6].update(events=["contact:square"]), rows[9].update(events=["lift:square"])])
    run(data, out, mode="action")  # fires at the stop, the gripper's flip and the new start: frames 5 to 7
    assert read_report(out)["events"] == {
        "count": 2, "tolerance": 0.05, "kept_share": 0.5, "random_share": pytest.approx(0.5, abs=0.5),
    }  # fmt: skip
    run(make_dataset("without", parts=1), tmp_path / "eventless")
    assert read_report(tmp_path / "eventless")["events"] is None


def test_sampled_parts_are_few_and_miss_no_task() -> None:
    parts = {f"part-{i:05d}": {"common": {}} for i in range(1000)} | {"part-00333": {"rare": {}}, "part-00900": {}}
    chosen = prune_report.choose_parts(parts)
    assert "part-00333" in chosen
    assert "part-00900" not in chosen
    assert 16 <= len(chosen) <= 32
    assert prune_report.choose_parts({}) == []


@pytest.mark.parametrize("length", [1, 2, 200])
@pytest.mark.parametrize("size", [(64, 64), (20, 300), (300, 20)])
def test_a_timeline_of_any_shape_is_drawn_alike_twice(length: int, size: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (length, *size, 3)).astype(np.uint8)
    episode = timeline.Episode(
        title="stack · a long instruction " * 12, frames=frames, time_s=np.arange(length) / 5,
        motion=np.zeros((length, 2)), motion_mean=np.zeros(2), gripper=np.ones((length, 2)), scene=None,
        action=np.ones(length, dtype=bool), keep=np.ones(length, dtype=bool),
        reasoning=["unbreakable" * 40] * length, events=[[]] * length,
    )  # fmt: skip
    assert timeline.draw(episode) == timeline.draw(episode)


def test_a_learned_detector_labels_as_it_does_alone(make_dataset: MakeDataset, tmp_path: Path) -> None:
    folder, data, out = str(tmp_path / "detector"), make_dataset(parts=1), str(tmp_path / "out")
    torch.manual_seed(0)
    save_detector(folder, DDMNet(DDMConfig()), threshold=0.5, gap=1)
    manifest.finish(folder, DETECTOR_KIND, {}, {})
    run(data, out, folder, mode="scene")
    labelled = dataset.open_dataset(out).read()
    robot = labelled.filter(labelled["domain"].to_numpy() == "robot")
    frames = labelling.decode_frames(robot["images"])
    expected = load_detector(folder)(np.split(frames, len(frames) // 12))
    assert robot["scene_label"].to_pylist() == np.concatenate(expected).tolist()
    with pytest.raises(OutputError, match="input 'detector'"):
        run(data, out, mode="scene")
    with pytest.raises(UsageError, match="Mode 'action' uses no detector"):
        run(data, tmp_path / "other", folder, mode="action")


@pytest.mark.parametrize(
    ("parts", "cpus", "gpus", "asked", "learned", "expected"),
    [
        (97, 2, 0, Workers(), True, (2, 0.5, 0)),
        (97, 16, 1, Workers(), True, (16, 0.5, 1 / 16)),
        (97, 16, 2, Workers(5), True, (5, 0.5, 0.3333)),  # 2/5 each would leave the fifth worker without a place
        (97, 16, 1, Workers(6), True, (6, 0.5, 0.1666)),
        (97, 16, 4, Workers(2), True, (2, 0.5, 1)),
        (97, 16, 1, Workers(gpus=0.5), True, (2, 0.5, 0.5)),
        (97, 16, 1, Workers(gpus=0), True, (16, 0.5, 0)),
        (97, 16, 1, Workers(), False, (16, 0.5, 0)),
        (97, 2, 0, Workers(8), False, (8, 0.125, 0)),  # half of the CPUs stay for Ray Data's own tasks
        (3, 16, 0, Workers(8), False, (3, 0.5, 0)),
    ],
)
def test_workers_ask_for_no_more_than_there_is(
    parts: int, cpus: float, gpus: float, asked: Workers, learned: bool, expected: tuple[int, float, float]
) -> None:
    count, resources = asked.plan(parts, cpus, gpus, learned)
    assert (count, resources["num_cpus"], resources["num_gpus"]) == expected
    assert not resources["num_gpus"] or resources["num_gpus"] * count <= gpus
