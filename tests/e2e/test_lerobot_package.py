"""Round trip with the `lerobot` package, the reference: it reads what we write, and we read what it writes.

It does not resolve with our pins, so it lives in an environment of its own: DUALVLA_TEST_LEROBOT names its python, or
is "install" to make one below the cache folder (some minutes and 5 GB: it brings its own torch). Skipped without it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inline import run_inline
from robot_sources import picture

from dualvla.io import dataset, manifest
from dualvla_pipelines import export, ingest
from dualvla_pipelines.export import ExportConfig
from dualvla_pipelines.ingest import IngestConfig
from dualvla_pipelines.labelling import label_table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PACKAGE = "lerobot[dataset]==0.6.1"  # needs Python 3.12
READ = """
import json, sys
from lerobot.datasets.lerobot_dataset import LeRobotDataset
root, out = sys.argv[1:]
data = LeRobotDataset("dualvla/test", root=root, video_backend="pyav")
found = {"frames": [], "fps": data.meta.fps, "episodes": data.meta.total_episodes, "tasks": list(data.meta.tasks.index)}
found["stats"] = {key: value["mean"].ravel().tolist() for key, value in data.meta.stats.items()}
for i in range(len(data)):
    item = data[i]
    numbers = ("observation.state", "observation.ee_pose", "observation.gripper", "action")
    row = {key: item[key].tolist() for key in numbers}
    row |= {key: item[key].item() for key in ("timestamp", "frame_index", "episode_index", "index")}
    row |= {"task": item["task"], "events": item["language_events"], "persistent": item["language_persistent"]}
    row["images"] = {k: (v * 255).round().byte().permute(1, 2, 0).tolist() for k, v in item.items() if "images" in k}
    found["frames"].append(row)
json.dump(found, open(out, "w"))
"""
WRITE = """
import sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
root, images = sys.argv[1:]
given = np.load(images)
kind = "video" if "video" in root else "image"
features = {
    "observation.state": {"dtype": "float32", "shape": (8,), "names": None},
    "action": {"dtype": "float32", "shape": (7,), "names": None},
    "observation.images.front": {"dtype": kind, "shape": given.shape[2:], "names": ["height", "width", "channels"]},
}
data = LeRobotDataset.create("dualvla/test", fps=10, features=features, root=root, use_videos=kind == "video")
for episode in range(len(given)):
    for step in range(len(given[episode])):
        state = np.array([0.1 * step, 0.2, 0.3, 0.1, -0.2, 0.01 * episode, 0.0, 1.0 - 0.1 * step], dtype=np.float32)
        action = np.array([0.1, 0, 0, 0, 0, 0.1, 1], dtype=np.float32)
        task = f"task {episode % 2}"
        image = given[episode, step]
        data.add_frame({"observation.state": state, "action": action, "observation.images.front": image, "task": task})
    data.save_episode()
data.finalize()
"""


@pytest.fixture(scope="module")
def lerobot_python() -> str:
    """An interpreter that imports lerobot. Skips, saying why, where there is none and none can be made."""
    named = os.environ.get("DUALVLA_TEST_LEROBOT")
    if not named:
        pytest.skip("lerobot and its torch are 5 GB: set DUALVLA_TEST_LEROBOT to its python, or to 'install'")
    if named != "install":
        return named
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates = ["python3.12", "python3.13", *map(str, sorted(pyenv.glob("versions/3.1[23].*/bin/python")))]
    base = next((found for name in candidates if (found := shutil.which(name)) and answers(found)), None)
    if base is None:
        pytest.skip("lerobot 0.6 needs Python 3.12, which is not here")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualvla-tests" / "lerobot-0.6.1"
    python = cache / "bin" / "python"
    if not (cache / "ready").exists():
        for command in (
            [base, "-m", "venv", "--clear", str(cache)],
            [str(python), "-m", "pip", "install", "-q", PACKAGE],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
            if done.returncode:
                pytest.skip(f"{PACKAGE} cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
        (cache / "ready").touch()
    return str(python)


def answers(python: str) -> bool:
    """Not a shim of a version that is not selected."""
    return subprocess.run([python, "--version"], capture_output=True).returncode == 0


def run_in(python: str, script: str, *arguments: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([python, "-c", script, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("images", ["video", "embedded"])
def test_lerobot_reads_what_we_write(
    lerobot_python: str,
    tmp_path: Path,
    make_rows: Callable[..., list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    images: str,
) -> None:
    run_inline(monkeypatch, ingest, export)
    rows = [*make_rows("a"), *make_rows("b", steps=7)]
    for i, row in enumerate(rows):
        row["images"] = {
            name: dataset.encode_png(picture(i, row["step"], n)) for n, name in enumerate(("main", "wrist"))
        }
        row |= {"reasoning": None if i % 3 else f"think {i}", "instruction": f"task {i // 12}"}
        row["motion_primitive"] = "left" if row["step"] < 4 else "up"
    table, _ = label_table(dataset.rows_to_table(rows), "action", 0, None)
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    manifest.begin(data, dataset.KIND, {}, {})
    for part, (start, count) in enumerate(((0, 12), (12, 7))):
        dataset.write_table(dataset.part_url(data, part), table.slice(start, count))
    dataset.finish_dataset(data, {}, {}, rows_in=19)
    export.export(data, out, ExportConfig(images=images, crf=1))

    run_in(lerobot_python, READ, out, str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["fps"], found["episodes"], found["tasks"]) == (5, 2, ["task 0", "task 1"])
    np.testing.assert_allclose(found["stats"]["action"], np.mean([row["action"] for row in rows], axis=0), atol=1e-6)
    assert len(found["frames"]) == len(rows)
    for i, (frame, row) in enumerate(zip(found["frames"], rows, strict=True)):
        for name, ours in (("observation.state", "proprio"), ("observation.ee_pose", "ee_pose"), ("action", "action")):
            np.testing.assert_allclose(frame[name], row[ours], atol=1e-6)
        assert np.ravel(frame["observation.gripper"]).tolist() == row["gripper"]
        assert (frame["index"], frame["frame_index"], frame["task"]) == (i, row["step"], row["instruction"])
        assert frame["timestamp"] == pytest.approx(row["step"] / 5, abs=1e-6)
        said = {event["style"]: event["content"] for event in frame["events"]}
        assert said.get("reasoning") == row["reasoning"]
        assert said["keep_reasoning"] == json.dumps(table["keep_reasoning"][i].as_py())
        assert [(r["style"], r["content"]) for r in frame["persistent"]] == [("motion", "left"), ("motion", "up")]
        for name, data_ in row["images"].items():
            shown, stored = (
                np.array(frame["images"][f"observation.images.{name}"], dtype=int),
                dataset.decode_image(data_),
            )
            assert np.abs(shown - stored).mean() < (3 if images == "video" else 1e-9)


@pytest.mark.parametrize("kind", ["video", "image"])
def test_we_read_what_lerobot_writes(
    lerobot_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run_inline(monkeypatch, ingest, export)
    given = np.stack([[picture(3 * e, s, size=64) for s in range(9)] for e in range(3)])
    np.save(tmp_path / "images.npy", given)
    source = tmp_path / f"{kind}-source"
    run_in(lerobot_python, WRITE, str(source), str(tmp_path / "images.npy"))
    result = ingest.ingest(
        str(source), str(tmp_path / "out"), IngestConfig("lerobot", convention="bridge", frames="png")
    )
    assert (result["episodes"], result["rows_out"], result["rows_quarantined"]) == (3, 27, 0)
    for i, row in enumerate(dataset.open_dataset(str(tmp_path / "out")).read().to_pylist()):
        episode, step = divmod(i, 9)
        assert (row["step"], row["instruction"], row["control_hz"]) == (step, f"task {episode % 2}", 10.0)
        np.testing.assert_allclose(row["ee_pose"], [0.1 * step, 0.2, 0.3, 0.1, -0.2, 0.01 * episode], atol=1e-6)
        np.testing.assert_allclose(row["gripper"], [1.0 - 0.1 * step], atol=1e-6)
        shown = dataset.decode_image(dict(row["images"])["front"]).astype(int)
        differences = [np.abs(shown - given[episode, other]).mean() for other in range(9)]
        assert int(np.argmin(differences)) == step
        assert min(differences) < (6 if kind == "video" else 1e-9)
