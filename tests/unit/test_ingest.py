"""Ingest: what a source holds comes out converted and complete, or in quarantine with the reason, never neither."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inline import run_inline
from robot_sources import (
    TASKS,
    bridge_episode,
    fractal_episode,
    jpeg,
    picture,
    serialize,
    tfrecord,
    write_bridge,
    write_lerobot_v3,
    write_lerobot_v21,
    write_video,
)

from dualvla.errors import DataError, OutputError, UsageError
from dualvla.io import dataset, storage
from dualvla_pipelines import checks, ingest
from dualvla_pipelines.ingest import IngestConfig
from dualvla_pipelines.sources.conventions import BRIDGE_LEROBOT

RLDS, LEROBOT = IngestConfig("rlds"), IngestConfig("lerobot", convention="bridge")
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    run_inline(monkeypatch, ingest)

    def once(source: Path, out: Path, config: IngestConfig, annotations: Path | None = None) -> dict[str, Any]:
        result = ingest.ingest(str(source), str(out), config, None if annotations is None else str(annotations))
        assert result["rows_in"] == result["rows_out"] + result["rows_quarantined"]
        assert sum(result["quarantine_reasons"].values()) == result["rows_quarantined"]
        assert len(quarantine(out)) == result["rows_quarantined"]
        assert not (out / "progress").exists()
        return result

    return once


def rows(out: Path) -> list[dict[str, Any]]:
    return dataset.open_dataset(str(out)).read().to_pylist()


def quarantine(out: Path) -> list[dict[str, Any]]:
    files = storage.list_files(out / "quarantine", ".parquet")
    return [row for file in files for row in dataset.read_table(file).to_pylist()]


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def one_record(folder: Path, *episodes: dict[str, Any], name: str = "x-train.tfrecord-00000-of-00001") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(tfrecord([serialize(episode) for episode in episodes]))
    return folder


# --- RLDS ---


def test_bridge_becomes_our_columns_and_its_images_stay_as_they_are(run: Run, tmp_path: Path) -> None:
    write_bridge(tmp_path / "src", files=2, episodes=2, steps=8)
    result = run(tmp_path / "src", tmp_path / "out", RLDS)
    assert (result["episodes"], result["rows_out"], result["quarantine_reasons"]) == (4, 24, {"convention": 8})
    found = rows(tmp_path / "out")
    assert [row["step"] for row in found[:7]] == [0, 1, 2, 3, 4, 5, 0]
    source = bridge_episode(0, 8, "")
    for row in found[:6]:
        step = row["step"] + 1  # the first is dropped
        assert dict(row["images"]) == {"image_0": source["steps/observation/image_0"][step]}  # to the byte
        np.testing.assert_array_equal(row["ee_pose"], source["steps/observation/state"][step, :6].astype(float))
        moved = np.diff(source["steps/observation/state"].astype(float), axis=0)[step, :3]
        np.testing.assert_allclose(row["action"][:3], moved, atol=1e-6)
        assert row["timestamp_s"] == pytest.approx(row["step"] / 5)
    first = found[0]
    assert (first["control_hz"], first["split"], first["task"], first["action_space"]) == (
        5.0, "train", "bridge", "ee_delta_pose+gripper",
    )  # fmt: skip
    assert first["instruction"] == "put the spoon on the cloth"


def test_fractal_is_recognised_by_its_columns(run: Run, tmp_path: Path) -> None:
    source = one_record(tmp_path / "src", fractal_episode(0, 7), fractal_episode(1, 1))
    result = run(source, tmp_path / "out", RLDS)
    found = rows(tmp_path / "out")
    assert (result["episodes"], len(found), result["rows_quarantined"]) == (2, 8, 0)
    assert [row["action"][6] for row in found[:7]] == [1, 1, 1, 0, 0, 0, 0]  # closes half-way, and stays
    np.testing.assert_allclose([row["gripper"][0] for row in found[:7]], np.linspace(1, 0, 7), atol=1e-6)
    np.testing.assert_allclose(found[6]["ee_pose"][5], 0.8, atol=1e-6)  # quaternion of half the angle 0.8
    assert found[0]["control_hz"] == 3.0


def test_columns_without_a_place_are_named(run: Run, tmp_path: Path) -> None:
    episode = fractal_episode(0, 4) | {"steps/observation/workspace_bounds": np.zeros(12, np.float32)}
    assert run(one_record(tmp_path / "src", episode), tmp_path / "out", RLDS)["columns_left_out"] == [
        "observation/workspace_bounds"
    ]


def test_an_unknown_schema_asks_for_a_convention(tmp_path: Path) -> None:
    episode = {"steps/is_first": np.ones(3, int), "steps/state": np.zeros((3, 7), np.float32)}
    with pytest.raises(UsageError, match="do not say what its numbers mean") as caught:
        ingest.ingest(str(one_record(tmp_path / "src", episode)), str(tmp_path / "out"), RLDS)
    assert "bridge, fractal" in str(caught.value.fix)
    with pytest.raises(DataError, match=r"holds no \*\.tfrecord\* files"):
        ingest.ingest(str(tmp_path), str(tmp_path / "out"), RLDS)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_tfrecord_costs_its_rest_and_is_named(run: Run, tmp_path: Path, damage: str) -> None:
    write_bridge(tmp_path / "src", files=3, episodes=2, steps=6)
    file = tmp_path / "src" / "bridge_dataset-train.tfrecord-00001-of-00003"
    data = bytearray(file.read_bytes())
    if damage == "cut":
        data = data[:-200]
    elif damage == "flip":
        data[-200] ^= 1
    else:
        data = data[:0]
    file.write_bytes(data)
    result = run(tmp_path / "src", tmp_path / "out", RLDS)
    assert result["episodes"] == {"cut": 5, "flip": 5, "empty": 4}[damage]
    assert list(result["damaged_files"]) == ([] if damage == "empty" else [file.name])
    if damage != "empty":
        (lost,) = [row for row in quarantine(tmp_path / "out") if row["reason"].startswith("file")]
        assert f"'{file.name}', record 1" in lost["reason"]


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (lambda e: e["steps/observation/state"].__setitem__((3, 1), np.nan), "finite"),
        (lambda e: e["steps/observation/state"].__setitem__((3, 0), 312.0), "units"),
        (lambda e: e["steps/observation/state"].__setitem__((slice(2, 5), 5), 170.0), "units"),
        (lambda e: e["steps/observation/state"].__setitem__((3, 6), 37.0), "gripper"),
        (lambda e: e["steps/observation/image_0"].__setitem__(3, b"\xff\xd8\xff no image"), "image"),
    ],
)
def test_an_unfit_row_takes_its_episode_to_quarantine_and_no_other(
    run: Run, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], check: str
) -> None:
    bad = bridge_episode(1, 8, "b")
    spoil(bad)
    source = one_record(tmp_path / "src", bridge_episode(0, 8, "a"), bad, bridge_episode(2, 8, "c"))
    result = run(source, tmp_path / "out", RLDS)
    assert (result["episodes"], result["rows_out"], result["rows_quarantined"]) == (2, 12, 12)
    assert check in result["quarantine_reasons"]
    assert result["quarantine_reasons"]["same episode"] >= 3
    guilty = [row for row in quarantine(tmp_path / "out") if row["reason"].startswith(check)]
    assert all(row["episode_id"].endswith("/00001") for row in guilty)
    strict = IngestConfig("rlds", strict=True)
    with pytest.raises(DataError, match=r"00001', step \d"):
        ingest.ingest(str(source), str(tmp_path / "strict"), strict)


def test_a_record_that_is_no_episode_costs_itself(run: Run, tmp_path: Path) -> None:
    broken = bridge_episode(1, 6, "b")
    broken["steps/action"] = broken["steps/action"][:4]  # 28 numbers for 6 steps
    source = one_record(tmp_path / "src", bridge_episode(0, 6, "a"), broken, bridge_episode(2, 6, "c"))
    result = run(source, tmp_path / "out", RLDS)
    assert (result["episodes"], result["quarantine_reasons"]) == (2, {"convention": 4, "record": 6})


# --- LeRobot ---


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_lerobot_is_read_with_all_its_cameras(run: Run, tmp_path: Path, version: str) -> None:
    write = write_lerobot_v21 if version == "v2.1" else write_lerobot_v3
    sizes = {"episodes": 3} if version == "v2.1" else {"files": 2, "episodes": 2}
    write(tmp_path / "src", steps=9, fps=10, cameras=2, **sizes)
    result = run(tmp_path / "src", tmp_path / "out", IngestConfig("lerobot", convention="bridge", frames="png"))
    found = rows(tmp_path / "out")
    episodes = 3 if version == "v2.1" else 4
    assert (result["episodes"], result["rows_out"], result["columns_left_out"]) == (
        episodes, episodes * 9, ["next.reward"],
    )  # fmt: skip
    for row in found:
        episode = int(row["episode_id"].rsplit("/", 1)[-1])
        for camera in range(2):
            decoded = dataset.decode_image(dict(row["images"])[f"image_{camera}"]).astype(int)
            shown = [np.abs(decoded - picture(episode, step, camera)).mean() for step in range(9)]
            assert int(np.argmin(shown)) == row["step"]  # the frame of this very step and episode
            assert min(shown) < 4
        assert row["instruction"] == TASKS[episode % 2]
        assert row["timestamp_s"] == pytest.approx(row["step"] / 10, abs=1e-6)
        assert row["control_hz"] == 10.0


def test_embedded_images_stay_as_they_are(run: Run, tmp_path: Path) -> None:
    write_lerobot_v3(tmp_path / "src", files=1, cameras=0)
    path = tmp_path / "src/data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    images = [dataset.encode_png(picture(0, step)) for step in range(len(table))]
    column = pa.array([{"bytes": data, "path": None} for data in images])
    pq.write_table(table.append_column("observation.image", column), path)
    info = json.loads((tmp_path / "src/meta/info.json").read_text())
    info["features"]["observation.image"] = {"dtype": "image", "shape": [32, 32, 3], "names": None}
    (tmp_path / "src/meta/info.json").write_text(json.dumps(info))
    run(tmp_path / "src", tmp_path / "out", LEROBOT)
    assert [dict(row["images"])["image"] for row in rows(tmp_path / "out")] == images


def test_a_truncated_parquet_costs_its_episodes_and_is_named(run: Run, tmp_path: Path) -> None:
    write_lerobot_v3(tmp_path / "src", files=3, episodes=2, steps=6)
    file = tmp_path / "src/data/chunk-000/file-001.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    result = run(tmp_path / "src", tmp_path / "out", LEROBOT)
    assert (result["episodes"], result["rows_in"], result["quarantine_reasons"]) == (4, 36, {"file": 12})
    assert list(result["damaged_files"]) == ["data/chunk-000/file-001.parquet"]
    assert {row["episode_id"] for row in quarantine(tmp_path / "out")} == {"src/000002", "src/000003"}


@pytest.mark.parametrize("faststart", [False, True])
def test_a_truncated_video_costs_its_episodes_and_is_named(run: Run, tmp_path: Path, faststart: bool) -> None:
    write_lerobot_v3(tmp_path / "src", files=2, episodes=2, steps=8)
    file = tmp_path / "src/videos/observation.images.image_0/chunk-000/file-001.mp4"
    # Of file 1 only the second episode is left in this video; the first one is in the first file's.
    write_video(file, [picture(3, step) for step in range(8)], 5, faststart)
    file.write_bytes(file.read_bytes()[: -len(file.read_bytes()) // 3])
    result = run(tmp_path / "src", tmp_path / "out", LEROBOT)
    assert list(result["damaged_files"]) == ["videos/observation.images.image_0/chunk-000/file-001.mp4"]
    assert (result["episodes"], result["rows_in"], result["rows_quarantined"]) == (3, 32, 8)
    assert {row["episode_id"] for row in quarantine(tmp_path / "out")} == {"src/000003"}
    assert all("file-001.mp4" in row["reason"] for row in quarantine(tmp_path / "out"))


def test_a_missing_video_and_a_missing_row_are_named(run: Run, tmp_path: Path) -> None:
    write_lerobot_v21(tmp_path / "src", episodes=3, steps=6, cameras=1)
    (tmp_path / "src/videos/chunk-000/observation.images.image_0/episode_000000.mp4").unlink()
    path = tmp_path / "src/data/chunk-000/episode_000001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 4), path)
    result = run(tmp_path / "src", tmp_path / "out", LEROBOT)
    assert (result["rows_in"], result["rows_out"]) == (18, 6)
    reasons = {row["episode_id"]: row["reason"] for row in quarantine(tmp_path / "out")}
    assert "episode_000000.mp4' does not exist" in reasons["src/000000"]
    assert "data/chunk-000/episode_000001.parquet' lacks this row" in reasons["src/000001"]


def test_a_bad_timestamp_or_language_row_costs_its_episode(run: Run, tmp_path: Path) -> None:
    write_lerobot_v21(tmp_path / "src", episodes=3, steps=6, cameras=1)
    path = tmp_path / "src/data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    times = pa.array([0.0, None, 0.4, 0.6, 0.8, 1.0], type=pa.float32())
    pq.write_table(table.set_column(table.schema.get_field_index("timestamp"), "timestamp", times), path)
    path = tmp_path / "src/data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)
    said = [[{"role": "assistant", "content": "{", "style": "target_pixel", "camera": None}]] * 6
    pq.write_table(table.append_column("language_events", pa.array(said)), path)
    result = run(tmp_path / "src", tmp_path / "out", LEROBOT)
    assert (result["episodes"], result["rows_in"], result["rows_quarantined"]) == (1, 18, 12)
    reasons = {row["episode_id"]: row["reason"] for row in quarantine(tmp_path / "out")}
    assert "a timestamp is not finite" in reasons["src/000000"]
    assert "style 'target_pixel' is not JSON" in reasons["src/000001"]


def test_plans_and_subtasks_of_others_become_reasoning(run: Run, tmp_path: Path) -> None:
    write_lerobot_v21(tmp_path / "src", episodes=1, steps=4, fps=5, cameras=1)
    path = tmp_path / "src/data/chunk-000/episode_000000.parquet"

    def row(style: str, content: str, at_s: float) -> dict[str, Any]:
        return {"role": "assistant", "content": content, "style": style, "timestamp": np.float32(at_s), "camera": None}

    held = [
        row("subtask", "reach", 0.0),
        row("plan", "tidy", 0.2),
        row("subtask", "grasp", 0.4),
        row("motion", "up", 0.4),
    ]
    pq.write_table(pq.read_table(path).append_column("language_persistent", pa.array([held] * 4)), path)
    run(tmp_path / "src", tmp_path / "out", LEROBOT)
    found = [(r["reasoning"], r["motion_primitive"]) for r in rows(tmp_path / "out")]
    assert found == [("reach", None), ("tidy\nreach", None), ("tidy\ngrasp", "up"), ("tidy\ngrasp", "up")]


@pytest.mark.parametrize("what", ["episodes", "tasks", "features", "json"])
def test_damaged_metadata_stop_the_job_and_are_named(tmp_path: Path, what: str) -> None:
    write_lerobot_v21(tmp_path / "src", episodes=1, steps=4, cameras=0)
    meta = tmp_path / "src/meta"
    if what == "episodes":
        (meta / "episodes.jsonl").write_text('{"episode_index": 0}')
    elif what == "tasks":
        (meta / "tasks.jsonl").unlink()
    elif what == "features":
        info = json.loads((meta / "info.json").read_text())
        info["features"]["action"] = {}
        (meta / "info.json").write_text(json.dumps(info))
    else:
        (meta / "info.json").write_text((meta / "info.json").read_text()[:-9])
    message = {
        "episodes": "have no 'length'", "tasks": r"tasks\.jsonl' does not exist", "features": "feature 'action'",
        "json": r"info\.json' is not valid JSON",
    }[what]  # fmt: skip
    with pytest.raises(DataError, match=message):
        ingest.ingest(str(tmp_path / "src"), str(tmp_path / "out"), LEROBOT)


@pytest.mark.parametrize("version", ["v1.6", "v9.0", None])
def test_another_version_is_refused_by_name(tmp_path: Path, version: str | None) -> None:
    write_lerobot_v3(tmp_path / "src", files=1, episodes=1, cameras=0)
    info = json.loads((tmp_path / "src/meta/info.json").read_text()) | {"codebase_version": version}
    (tmp_path / "src/meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=f"LeRobot {version}, which is not read here"):
        ingest.ingest(str(tmp_path / "src"), str(tmp_path / "out"), LEROBOT)


def test_a_convention_that_does_not_fit_is_refused_before_any_episode_is_read(tmp_path: Path) -> None:
    write_lerobot_v3(tmp_path / "lerobot", files=1, episodes=1, cameras=0)
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps({"name": "wide", "arms": [{**vars(BRIDGE_LEROBOT.arms[0]), "gripper": "action[7:8]"}]}))
    for convention, message in (
        (str(wide), "asks for more than the 7"),
        ("dualvla", "no column 'observation.ee_pose'"),
    ):
        with pytest.raises(DataError, match=message):
            ingest.ingest(str(tmp_path / "lerobot"), str(tmp_path / "out"), IngestConfig("lerobot", convention))
    write_bridge(tmp_path / "rlds", files=1, episodes=1)
    with pytest.raises(DataError, match="which convention 'fractal' needs"):
        ingest.ingest(str(tmp_path / "rlds"), str(tmp_path / "out"), IngestConfig("rlds", convention="fractal"))
    with pytest.raises(UsageError, match="does not say its control rate"):
        ingest.ingest(
            str(tmp_path / "rlds"), str(tmp_path / "out"), IngestConfig("rlds", overrides=("control_hz=null",))
        )
    assert not (tmp_path / "out").exists()


# --- what all sources share ---


def test_work_resumes_to_the_same_bytes_in_any_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault_seed: int
) -> None:
    """Stopped after any unit, with files of a half-made one lying about."""
    write_bridge(tmp_path / "src", files=4, episodes=2, steps=6)
    annotations = tmp_path / "a.json"
    annotations.write_text(json.dumps({"/bridge/1.npy": {"2": {"features": {"move_primitive": ["move"] * 6}}}}))
    arguments = (str(tmp_path / "src"), str(tmp_path / "resumed"), RLDS, str(annotations))
    run_inline(monkeypatch, ingest)
    ingest.ingest(str(tmp_path / "src"), str(tmp_path / "straight"), RLDS, str(annotations))

    random = np.random.default_rng(fault_seed)
    writes_left = int(random.integers(1, 12))
    write = storage.write_bytes

    def write_or_die(url: Any, data: bytes) -> None:
        nonlocal writes_left
        if writes_left == 0:
            raise KeyboardInterrupt
        writes_left -= 1
        write(url, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", write_or_die)
        with pytest.raises(KeyboardInterrupt):
            ingest.ingest(*arguments)
    assert not (tmp_path / "resumed/manifest.json").exists()
    run_inline(monkeypatch, ingest, order=lambda items: [items[i] for i in random.permutation(len(items))])
    ingest.ingest(*arguments)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "straight")
    assert ingest.ingest(*arguments)["skipped"]
    with pytest.raises(OutputError, match="config 'frames'"):
        ingest.ingest(*arguments[:2], IngestConfig("rlds", frames="png"), str(annotations))


def test_parts_stay_small_whatever_the_file(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ingest, "_PART_BYTES", 12_000)
    episodes = [bridge_episode(i, 8, "") for i in range(6)]
    result = run(one_record(tmp_path / "src", *episodes), tmp_path / "out", RLDS)
    files = storage.list_files(tmp_path / "out/data", ".parquet")
    assert len(files) >= 3
    assert result["rows_out"] == 36
    held = [set(dataset.read_table(file)["episode_id"].to_pylist()) for file in files]
    assert sum(map(len, held)) == len(set().union(*held)) == 6  # an episode lies in one part


MEASURE = """
import resource, sys
from dualvla_pipelines import ingest
ingest._PART_BYTES = 2 << 20
config = ingest.IngestConfig("rlds")
source = config.open(sys.argv[1])
ingest.UnitIngest(source, sys.argv[2], config, annotated=False)(ingest.Job(source.units()[0]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_ten_times_the_data_take_no_more_memory(tmp_path: Path) -> None:
    """One file of 5 MB and one of 50 MB, in processes of their own."""
    noise = np.random.default_rng(0).integers(0, 40, (128, 128, 3))
    episode = bridge_episode(0, 40, "")
    episode["steps/observation/image_0"] = [jpeg((picture(0, s, size=128) + noise).astype(np.uint8)) for s in range(40)]
    record = tfrecord([serialize(episode)])
    peak = {}
    for copies in (20, 200):
        folder = tmp_path / str(copies)
        folder.mkdir()
        (folder / "x.tfrecord").write_bytes(record * copies)
        command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / f"out-{copies}")]
        peak[copies] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak[200] < 1.15 * peak[20]


def test_what_no_worker_survives_is_counted(tmp_path: Path) -> None:
    write_lerobot_v3(tmp_path / "src", files=1, episodes=2, steps=5)
    source = LEROBOT.open(str(tmp_path / "src"))
    work = ingest.UnitIngest(source, str(tmp_path / "out"), LEROBOT, annotated=False)
    tally = work.give_up(ingest.Job(source.units()[0]), "crashed its worker 2 times")
    assert (tally.rows_in, tally.rows_quarantined, dict(tally.reasons)) == (10, 10, {"file": 10})
    assert work(ingest.Job(source.units()[0])) == tally  # and is not tried again on resuming


def test_the_manifest_names_its_convention_and_quarantine(run: Run, tmp_path: Path) -> None:
    write_bridge(tmp_path / "src", files=1, episodes=1)
    run(tmp_path / "src", tmp_path / "out", IngestConfig("rlds", overrides=("control_hz=10",)))
    found = dataset.open_dataset(str(tmp_path / "out")).manifest
    assert found["config"]["convention"]["control_hz"] == 10.0
    assert found["config"]["convention"]["action"] == "reached"
    assert list(found["quarantine_files"]) == ["part-00000-000.parquet"]
    assert rows(tmp_path / "out")[1]["timestamp_s"] == pytest.approx(0.1)


# --- VLA-IT ---


def annotations_file(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def told(*primitives: str, **texts: Any) -> dict[str, Any]:
    return {"features": {"move_primitive": list(primitives)}, "alt_instruction": texts}


def test_annotations_join_by_their_key_and_nothing_is_guessed(run: Run, tmp_path: Path) -> None:
    source = one_record(
        tmp_path / "src",
        bridge_episode(0, 6, "/p/a.npy"), bridge_episode(1, 6, "/p/b.npy"),
        bridge_episode(7, 6, "/p/c.npy"), bridge_episode(7, 6, "/p/c.npy"),  # two of one key
    )  # fmt: skip
    content = {
        "/p/a.npy": {
            "0": told(
                "stop", "left", "right", "up", "down", "close",
                Caption="A cloth.", CR=[{"question": "Tidy up?", "answer": "I take the spoon."}],
                QA=[{"question": "Which colour?", "answer": "Grey."}, {"question": "Where?", "answer": "Here."}],
            )
        },
        "/p/b.npy": {"1": told("one", "two", "three", "four", "five", "six", "too", "many")},
        "/p/c.npy": {"7": told("x", "y", "z", "u", "v", "w")},
        "/p/nowhere.npy": {"3": told("a", "b")},
    }  # fmt: skip
    result = run(source, tmp_path / "out", RLDS, annotations_file(tmp_path / "a.json", content))
    assert result["annotations"] == {
        "in_the_file": 22, "matched": 12, "unmatched": 4, "doubly_matched": 6, "steps_without": 8,
    }  # fmt: skip
    listing = json.loads((tmp_path / "out/annotations.json").read_text())
    assert listing["unmatched_episodes"] == {"/p/nowhere.npy_3": 2}
    assert listing["unmatched_after_the_last_step"] == {"/p/b.npy_1": 2}
    assert listing["doubly_matched_episodes"] == {"/p/c.npy_7": 6}

    found = rows(tmp_path / "out")
    by_id: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        by_id.setdefault(row["episode_id"], []).append(row)
    name = "x-train.tfrecord-00000-of-00001"
    primitives = {
        key: [row["motion_primitive"] for row in by_id[f"{name}/{key}"]] for key in ("00000", "00001", "00002")
    }
    assert primitives["00000"] == ["left", "right", "up", "down"]  # the convention drops the first and the last step
    assert primitives["00001"] == ["two", "three", "four", "five"]
    assert primitives["00002"] == [None] * 4
    assert by_id[f"{name}/00000"][0]["reasoning"] == "left"
    asked = [row for row in found if row["domain"] == "multimodal"]
    assert [(row["task"], row["instruction"], row["reasoning"]) for row in asked] == [
        ("vla-it/CR", "Tidy up?", "I take the spoon."), ("vla-it/Caption", "", "A cloth."),
        ("vla-it/QA", "Which colour?", "Grey."), ("vla-it/QA", "Where?", "Here."),
    ]  # fmt: skip
    assert all(row["images"] == by_id[f"{name}/00000"][0]["images"] for row in asked)
    assert result["rows_in"] == 4 * 6 + 4


def test_a_key_that_the_file_holds_twice_is_used_for_nothing(run: Run, tmp_path: Path) -> None:
    source = one_record(tmp_path / "src", bridge_episode(0, 5, "/p/a"), bridge_episode(1, 5, "/p/b"))
    first, second, third = (json.dumps(told(*words)) for words in ("abcde", "fghij", "klmno"))
    text = f'{{"/p/a": {{"0": {first}}}, "/p/b": {{"1": {second}}}, "/p/a": {{"0": {third}}}}}'
    result = run(source, tmp_path / "out", RLDS, annotations_file(tmp_path / "a.json", text))
    assert result["annotations"]["doubly_matched"] == 10
    assert [row["motion_primitive"] for row in rows(tmp_path / "out")] == [None] * 3 + ["g", "h", "i"]


@pytest.mark.parametrize("content", ["[1, 2]", "{", '{"a": {"0": {"features": {"move_primitive": [1]}}}}', '{"a": []}'])
def test_a_file_that_is_not_vla_it_is_refused(run: Run, tmp_path: Path, content: str) -> None:
    source = one_record(tmp_path / "src", bridge_episode(0, 5, "/p/a"))
    with pytest.raises(DataError, match="is not a VLA-IT file"):
        run(source, tmp_path / "out", RLDS, annotations_file(tmp_path / "a.json", content))


def test_lerobot_joins_by_folder_and_episode(run: Run, tmp_path: Path) -> None:
    write_lerobot_v21(tmp_path / "src", episodes=2, steps=4, cameras=1)
    file = annotations_file(tmp_path / "a.json", {"src": {"1": told("a", "b", "c", "d")}})
    result = run(tmp_path / "src", tmp_path / "out", LEROBOT, file)
    assert result["annotations"]["matched"] == 4
    assert [row["motion_primitive"] for row in rows(tmp_path / "out")] == [None] * 4 + ["a", "b", "c", "d"]


def test_what_ingest_writes_is_fit_by_its_own_checks(run: Run, tmp_path: Path) -> None:
    write_bridge(tmp_path / "src", files=1)
    run(tmp_path / "src", tmp_path / "out", RLDS)
    table = dataset.open_dataset(str(tmp_path / "out")).read()
    assert checks.check_schema(table.schema) == []
    assert checks.check_rows(table) == []
