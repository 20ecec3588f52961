"""Data sets of demonstrations and questions: the same bytes however they are made, and true."""

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dualvla import cli
from dualvla.errors import OutputError, UsageError
from dualvla.io import dataset
from dualvla_eval.commands.collect import parse_episodes
from dualvla_eval.reasoning import parse
from dualvla_eval.tasks.blocks import COLORS

pytestmark = [pytest.mark.sim, pytest.mark.usefixtures("ray_cluster")]

ARGUMENTS = ["--episodes", "touch=27,pick=3,stack=1,move_near=1,put_in_bin=1", "--qa", "80", "--qa-test", "20"]


def _bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder, "data").glob("*.parquet"))}


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("collect") / "data")
    result = cli.call("collect", [*ARGUMENTS, "--workers", "2", "--out", folder])
    return folder, result


@pytest.fixture(scope="module")
def rows(collected):
    return dataset.open_dataset(collected[0]).read().to_pylist()


def _robot_episodes(rows):
    robot = [row for row in rows if row["domain"] == "robot"]
    return [list(group) for _, group in itertools.groupby(robot, key=lambda row: row["episode_id"])]


def test_one_worker_makes_the_same_bytes_as_two(collected, tmp_path):
    cli.call("collect", [*ARGUMENTS, "--workers", "1", "--out", str(tmp_path / "one")])
    assert _bytes(tmp_path / "one") == _bytes(collected[0])


def test_another_seed_makes_other_scenes(collected, rows, tmp_path):
    cli.call("collect", ["--episodes", "touch=2", "--seed", "1", "--out", str(tmp_path / "other")])
    others = dataset.open_dataset(str(tmp_path / "other")).read().to_pylist()
    assert others[0]["episode_id"] == "blocks/touch/train/000000"
    assert others[0]["images"] != next(r for r in rows if r["episode_id"] == others[0]["episode_id"])["images"]


def test_rows_are_complete_sorted_and_counted(collected, rows):
    keys = [(row["episode_id"], row["step"]) for row in rows]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys) == collected[1]["rows"]
    episodes = _robot_episodes(rows)
    assert len(episodes) == 33
    for steps in episodes:
        assert [row["step"] for row in steps] == list(range(len(steps)))
        assert len({row["instruction"] for row in steps}) == 1
        for row in steps:
            assert row["split"] == "train"
            assert parse(row["reasoning"]) is not None
            assert len(row["action"]) == 7
            assert np.linalg.norm(row["action"][:3]) <= 0.03 + 1e-6
            assert dataset.decode_image(dict(row["images"])["main"]).shape == (64, 64, 3)


def test_labels_are_clean_while_the_execution_is_noisy(rows):
    """The recorded action is the expert's; what the tool then did differs, so that recoveries are shown."""
    errors = []
    for steps in _robot_episodes(rows):
        for now, then in itertools.pairwise(steps):
            moved = np.subtract(then["ee_pose"][:3], now["ee_pose"][:3])
            errors.append(np.linalg.norm(moved - now["action"][:3]))
    assert np.median(errors) > 0.004
    assert np.percentile(errors, 20) < 0.006  # three demonstrations in ten are undisturbed


def test_the_recorded_gripper_flips_when_it_is_told_to_though_a_block_keeps_the_fingers_open(rows):
    picks = [steps for steps in _robot_episodes(rows) if "pick" in steps[0]["episode_id"]]
    assert picks
    for steps in picks:
        before = [1.0, *(float(row["action"][6] >= 0.5) for row in steps[:-1])]
        assert [row["gripper"][0] for row in steps] == before
        assert any(row["gripper"] == [0.0] and row["proprio"][3] > 0.5 for row in steps)


def _colors_seen(row):
    """Names of the colours with at least 4 clearly coloured pixels."""
    pixels = dataset.decode_image(dict(row["images"])["main"]).reshape(-1, 3).astype(float)
    vivid = pixels[pixels.max(1) - pixels.min(1) > 60]
    names, values = list(COLORS), np.array(list(COLORS.values()))
    cosines = vivid @ values.T / np.linalg.norm(vivid, axis=1, keepdims=True) / np.linalg.norm(values, axis=1)
    nearest = np.bincount(cosines.argmax(1), minlength=len(names))
    return {name for name, count in zip(names, nearest, strict=True) if count >= 4}


def test_answers_are_true_of_their_pictures(rows):
    questions = [row for row in rows if row["domain"] == "multimodal"]
    assert {row["task"] for row in questions} == {"qa_color", "qa_count", "qa_spatial", "qa_held"}
    numbers = {"two": 2, "three": 3, "four": 4}
    right = {"qa_color": [], "qa_count": [], "qa_held": []}
    for row in questions:
        seen, answer = _colors_seen(row), row["reasoning"]
        if row["task"] == "qa_color":
            right["qa_color"].append(answer in seen)
        elif row["task"] == "qa_count":
            right["qa_count"].append(numbers[answer] == len(seen))
        elif row["task"] == "qa_held" and answer != "nothing":
            right["qa_held"].append(answer.split()[0] in seen)
    assert all(np.mean(values) > 0.85 for values in right.values()), right  # the arm hides a block now and then


def test_no_answer_is_right_most_of_the_time(rows):
    for kind, most in (("qa_color", 0.4), ("qa_count", 0.55), ("qa_spatial", 0.75), ("qa_held", 0.75)):
        answers = [row["reasoning"] for row in rows if row["task"] == kind]
        assert max(answers.count(a) for a in set(answers)) / len(answers) < most


def test_held_out_questions_show_other_scenes(rows):
    pictures = {split: set() for split in ("train", "test")}
    for row in rows:
        if row["domain"] == "multimodal":
            pictures[row["split"]].add(dict(row["images"])["main"])
    assert len(pictures["test"]) == 20
    assert not pictures["train"] & pictures["test"]


def test_a_finished_data_set_is_left_alone_and_another_run_refused(collected):
    folder, _ = collected
    before = {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*.*")}
    assert cli.call("collect", [*ARGUMENTS, "--workers", "1", "--out", folder])["skipped"]
    assert {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*.*")} == before
    with pytest.raises(OutputError, match="belongs to another run"):
        cli.call("collect", [*ARGUMENTS, "--seed", "7", "--out", folder])


@pytest.mark.slow
@pytest.mark.parametrize("parts_before_the_kill", [1, 3])
def test_a_killed_collect_resumes_to_the_same_bytes(collected, tmp_path, parts_before_the_kill):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "dualvla", "collect", *ARGUMENTS, "--workers", "1", "--out", str(out)]
    log = tmp_path / "log.txt"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink)
    while len(list(out.glob("progress/part-*.json"))) < parts_before_the_kill:
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    cli.call("collect", [*ARGUMENTS, "--workers", "2", "--out", str(out)])
    assert _bytes(out) == _bytes(collected[0])
    assert (out / "manifest.json").read_bytes() == Path(collected[0], "manifest.json").read_bytes()


def test_wrong_numbers_and_names_are_refused(tmp_path):
    known = ["touch", "pick"]
    assert parse_episodes("5", None, known) == {"touch": 5, "pick": 5}
    assert parse_episodes("touch=2", None, known) == {"touch": 2}
    for text in ("many", "touch=", "-1"):
        with pytest.raises(UsageError):
            parse_episodes(text, None, known)
    with pytest.raises(UsageError, match="did you mean 'touch'"):
        cli.call("collect", ["--tasks", "tuch", "--episodes", "1", "--out", str(tmp_path / "out")])
    with pytest.raises(UsageError, match="less than 1"):
        cli.call("collect", ["--workers", "0", "--out", str(tmp_path / "out")])
