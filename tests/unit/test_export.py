"""Export: a LeRobotDataset v3 that holds every robot step, its labels and its text, and comes back as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inline import run_inline
from robot_sources import picture

from dualvla.errors import DataError, OutputError
from dualvla.io import dataset, manifest, storage
from dualvla_pipelines import export, ingest
from dualvla_pipelines.export import ExportConfig, Video
from dualvla_pipelines.ingest import IngestConfig
from dualvla_pipelines.labelling import label_table

MakeDataset = Callable[..., str]
MakeRows = Callable[..., list[dict[str, Any]]]
EMBEDDED = ExportConfig(images="embedded")


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    run_inline(monkeypatch, ingest, export)


def contents(folder: str | Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def write(folder: Path, *parts: pa.Table) -> str:
    manifest.begin(str(folder), dataset.KIND, {}, {})
    for number, table in enumerate(parts):
        dataset.write_table(dataset.part_url(str(folder), number), table)
    dataset.finish_dataset(str(folder), {}, {}, rows_in=sum(map(len, parts)))
    return str(folder)


def labelled(rows: list[dict[str, Any]]) -> pa.Table:
    return label_table(dataset.rows_to_table(rows), "action", 0, None)[0]


def test_pruned_data_come_back_to_the_bit(tmp_path: Path, make_rows: MakeRows) -> None:
    """Embedded images, text, labels, events and targets; only timestamps pass through LeRobot's float32."""
    one, two, three = make_rows("a/1"), make_rows("a/2", steps=5), make_rows("b")
    for i, row in enumerate(one):
        row |= {"events": ["contact:cube"] if i % 3 == 0 else [], "reasoning": None if i % 4 == 3 else f"think {i}"}
        row |= {"motion_primitive": None if i < 2 else ("left" if i < 7 else "up"), "split": "test"}
    two[2]["target_pixel"] = None
    data = write(tmp_path / "data", labelled(one + two), labelled(three))
    result = export.export(data, str(tmp_path / "lerobot"), EMBEDDED)
    assert (result["episodes"], result["rows_in"], result["rows_out"]) == (3, 29, 29)
    ingest.ingest(str(tmp_path / "lerobot"), str(tmp_path / "back"), IngestConfig("lerobot"))
    before, after = dataset.open_dataset(data).read(), dataset.open_dataset(str(tmp_path / "back")).read()
    for name in after.column_names:
        if name == "timestamp_s":
            np.testing.assert_allclose(after[name].to_numpy(), before[name].to_numpy(), atol=1e-6)
        else:
            assert after[name].to_pylist() == before[name].to_pylist(), name


def test_labels_lie_in_the_language_columns(tmp_path: Path, make_rows: MakeRows) -> None:
    rows = make_rows("a")
    table = labelled(rows)
    export.export(write(tmp_path / "data", table), str(tmp_path / "out"), EMBEDDED)
    written = pq.read_table(tmp_path / "out/data/chunk-000/file-000.parquet")
    for step, events in enumerate(written["language_events"].to_pylist()):
        said = {row["style"]: row["content"] for row in events}
        assert said["reasoning"] == rows[step]["reasoning"]
        assert said["action_label"] == json.dumps(table["action_label"][step].as_py())
        assert said["keep_reasoning"] == json.dumps(table["keep_reasoning"][step].as_py())
        assert "scene_label" not in said  # mode action has none
        assert set(events[0]) == {"role", "content", "style", "camera", "tool_calls"}
    (motion,) = written["language_persistent"][0].as_py()
    assert motion == {
        "role": "assistant", "content": "move right", "style": "motion", "timestamp": 0.0, "camera": None,
        "tool_calls": None,
    }  # fmt: skip
    assert len({str(value) for value in written["language_persistent"].to_pylist()}) == 1  # the same on every frame


def test_video_shows_every_frame_at_its_time(tmp_path: Path, make_dataset: MakeDataset) -> None:
    data = make_dataset(parts=2, episodes=3, questions=1, steps=7)
    result = export.export(data, str(tmp_path / "out"), ExportConfig(crf=1))
    assert (result["rows_in"], result["rows_out"], result["rows_left_out"]) == (44, 42, 2)
    meta = pq.read_table(tmp_path / "out/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    steps = [row for row in dataset.open_dataset(data).read().to_pylist() if row["domain"] == "robot"]
    for row in meta:
        key = "videos/observation.images.main"
        path = info["video_path"].format(
            video_key="observation.images.main",
            chunk_index=row[f"{key}/chunk_index"],
            file_index=row[f"{key}/file_index"],
        )
        with av.open(str(tmp_path / "out" / path)) as container:
            frames = {
                round(float(f.pts * f.time_base), 3): f.to_ndarray(format="rgb24") for f in container.decode(video=0)
            }
        for step in range(row["length"]):
            shown = frames[round(row[f"{key}/from_timestamp"] + step / 5, 3)].astype(int)
            stored = dataset.decode_image(dict(steps[row["dataset_from_index"] + step]["images"])["main"])
            assert np.abs(shown - stored).mean() < 12  # 4:2:0 smears the colour of a 4-pixel square
    assert [row["dataset_to_index"] for row in meta] == list(range(7, 43, 7))
    assert (info["total_episodes"], info["total_frames"], info["fps"]) == (6, 42, 5)


def test_equal_frames_give_equal_video_bytes_whatever_lies_in_memory() -> None:
    frames = [picture(episode, step) for episode in range(2) for step in range(6)]
    rng = np.random.default_rng(0)
    seen, junk = set(), []
    for _ in range(500):  # x264 left to its defaults differs in about 15 of 1,000
        video = Video(5.0, (32, 32), 18)
        for frame in frames:
            video.add(frame)
        seen.add(video.close())
        junk = [*junk[-20:], rng.bytes(int(rng.integers(1_000, 300_000)))]
        del junk[int(rng.integers(len(junk)))]
    assert len(seen) == 1


def test_statistics_are_those_of_all_frames(tmp_path: Path, make_rows: MakeRows) -> None:
    rows = [*make_rows("a", steps=9), *make_rows("b", steps=4)]
    export.export(write(tmp_path / "data", dataset.rows_to_table(rows)), str(tmp_path / "out"), EMBEDDED)
    stats = json.loads((tmp_path / "out/meta/stats.json").read_text())
    action = np.array([row["action"] for row in rows], dtype=np.float32).astype(float)
    for name, value in (
        ("min", action.min(0)),
        ("max", action.max(0)),
        ("mean", action.mean(0)),
        ("std", action.std(0)),
    ):
        np.testing.assert_allclose(stats["action"][name], value, atol=1e-7)
    assert stats["action"]["count"] == [13]
    pixels = np.stack([dataset.decode_image(row["images"]["main"]) for row in rows]) / 255.0
    np.testing.assert_allclose(np.ravel(stats["observation.images.main"]["mean"]), pixels.mean((0, 1, 2)), atol=1e-7)
    assert np.shape(stats["observation.images.main"]["std"]) == (3, 1, 1)


def test_two_arms_and_odd_rates_come_back(tmp_path: Path, make_rows: MakeRows) -> None:
    rows = make_rows("a")
    for i, row in enumerate(rows):
        row |= {
            "ee_pose": row["ee_pose"] * 2, "gripper": [1.0, 0.0], "action": row["action"] * 2, "control_hz": 12.5,
            "action_space": "bimanual_ee_delta_pose+gripper", "timestamp_s": i / 12.5,
        }  # fmt: skip
    data = write(tmp_path / "data", dataset.rows_to_table(rows))
    for images in ("embedded", "video"):
        out = tmp_path / images
        export.export(data, str(out), ExportConfig(images=images))
        back = ingest.ingest(str(out), str(tmp_path / f"{images}-back"), IngestConfig("lerobot"))
        assert (back["rows_out"], back["rows_quarantined"]) == (12, 0)
        table = dataset.open_dataset(str(tmp_path / f"{images}-back")).read(["action", "gripper", "control_hz"])
        assert table["control_hz"].to_pylist() == [12.5] * 12
        assert table["gripper"].to_pylist() == [[1.0, 0.0]] * 12


@pytest.mark.parametrize(
    "change",
    [
        {"control_hz": 10.0},
        {"ee_pose": [0.0] * 12, "gripper": [0.0, 1.0]},
        {"proprio": [0.0]},
        {"images": {"main": dataset.encode_png(np.zeros((8, 8, 3), np.uint8))}},
        {"images": {"other": dataset.encode_png(np.zeros((16, 16, 3), np.uint8))}},
    ],
    ids=["rate", "arms", "proprio", "size", "camera"],
)
def test_what_lerobot_cannot_hold_is_refused_by_name(
    tmp_path: Path, make_rows: MakeRows, change: dict[str, Any]
) -> None:
    odd = [row | change for row in make_rows("odd")]
    data = write(tmp_path / "data", dataset.rows_to_table(make_rows("a")), dataset.rows_to_table(odd))
    with pytest.raises(DataError, match=r"Episode 'odd', step 0"):
        export.export(data, str(tmp_path / "out"), EMBEDDED)
    assert not (tmp_path / "out/meta/info.json").exists()


def test_uneven_timestamps_are_counted(tmp_path: Path, make_rows: MakeRows) -> None:
    rows = make_rows("a")
    rows[3]["timestamp_s"] += 0.05
    data = write(tmp_path / "data", dataset.rows_to_table(rows))
    assert export.export(data, str(tmp_path / "out"), EMBEDDED)["timestamps_made_uniform"] == 1


def test_an_export_resumes_to_the_same_bytes(
    tmp_path: Path, make_dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch, fault_seed: int
) -> None:
    data = make_dataset(parts=4, episodes=2, questions=1, steps=5)
    export.export(data, str(tmp_path / "straight"), ExportConfig())
    random = np.random.default_rng(fault_seed)
    writes_left = int(random.integers(1, 14))
    real = storage.write_bytes

    def write_or_die(url: Any, content: bytes) -> None:
        nonlocal writes_left
        if writes_left == 0:
            raise KeyboardInterrupt
        writes_left -= 1
        real(url, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", write_or_die)
        with pytest.raises(KeyboardInterrupt):
            export.export(data, str(tmp_path / "resumed"), ExportConfig())
    assert not (tmp_path / "resumed/meta/info.json").exists()
    run_inline(monkeypatch, export, order=lambda items: [items[i] for i in random.permutation(len(items))])
    export.export(data, str(tmp_path / "resumed"), ExportConfig())
    assert contents(tmp_path / "resumed") == contents(tmp_path / "straight")
    assert export.export(data, str(tmp_path / "resumed"), ExportConfig())["skipped"]
    with pytest.raises(OutputError, match="config 'crf'"):
        export.export(data, str(tmp_path / "resumed"), ExportConfig(crf=30))
