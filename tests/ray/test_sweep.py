"""Sweeps on a real Ray cluster with a fake suite: exactly once, resumed, the same whatever the number of workers."""

import functools
import json
import sys

import eval_fakes
import pytest
from eval_fakes import CrashingPolicy, FakePolicy, fake_suite
from ray import cloudpickle

from dualvla.errors import CheckpointError, OutputError, UsageError
from dualvla.io import manifest
from dualvla_eval import results
from dualvla_eval.policies import PolicyRef
from dualvla_eval.sweep import SweepConfig, parse_tasks, run_sweep

pytestmark = pytest.mark.usefixtures("ray_cluster")

# Workers do not see the tests' folder.
for module in (eval_fakes, sys.modules[__name__]):
    cloudpickle.register_pickle_by_value(module)

REFS = [PolicyRef("first", "expert"), PolicyRef("second", "random")]
COLUMNS = ("policy", "task", "episode_id", "success", "steps", "stop_reason", "failure", "reasoning_tokens")


def load_fake(ref, **_):
    return FakePolicy("reasoning" if ref.name == "first" else "specialist")


def load_crashing(ref, marks, **_):
    return CrashingPolicy(3, marks) if ref.name == "second" else FakePolicy()


def load_misfit(ref, **_):
    raise CheckpointError("It has 14 actions.", "use another suite")


def sweep_into(folder, load=load_fake, workers=1, tasks=None, **options):
    config = SweepConfig(tasks or {"touch": 12}, videos_per_task=0, envs_per_worker=4, **options)
    return run_sweep(str(folder), fake_suite(), REFS, config, workers=workers, load_policy=load)


def outcomes(folder):
    return [tuple(row[c] for c in COLUMNS) for row in results.read_episodes(str(folder))]


def test_a_sweep_fills_its_folder_and_a_second_run_skips_it(tmp_path):
    summary = sweep_into(tmp_path, tasks={"touch": 12, "tap": 3})
    assert not summary["skipped"]
    first = summary["policies"]["first"]
    assert first["tasks"]["touch"]["n"] == 12
    assert first["tasks"]["tap"]["successes"] == 3
    assert first["kind"] == "reasoning"
    assert first["reasoning_tokens_per_step"] > 0
    assert first["stop_reasons"] == {"success": 15}
    assert summary["tasks"]["second/tap"]["n"] == 3
    keys = [row[:3] for row in outcomes(tmp_path)]
    assert len(keys) == len(set(keys)) == 30
    assert manifest.require(str(tmp_path), "evaluation")["episodes"] == 30

    again = sweep_into(tmp_path, load=load_misfit, tasks={"touch": 12, "tap": 3})
    assert again == {**summary, "skipped": True}


def test_the_number_of_workers_changes_no_outcome(tmp_path):
    sweep_into(tmp_path / "one", workers=1)
    sweep_into(tmp_path / "two", workers=2)
    assert outcomes(tmp_path / "one") == outcomes(tmp_path / "two")
    for row in results.read_episodes(str(tmp_path / "one")):
        one, two = (results.read_trajectory(str(tmp_path / name), row) for name in ("one", "two"))
        assert one.states == two.states
        assert (one.actions == two.actions).all()


def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    sweep_into(tmp_path / "whole")
    sweep_into(tmp_path / "killed")
    # What a kill in the middle leaves: a started folder, and the parts that were written until then.
    for name in (manifest.NAME, results.EPISODES, results.SUMMARY):
        (tmp_path / "killed" / name).unlink()
    kept = tmp_path / "killed" / "parts" / "first-touch-0000-0009.parquet"
    before = kept.stat().st_mtime_ns
    for part in (tmp_path / "killed" / "parts").iterdir():
        if part != kept:
            part.unlink()
    sweep_into(tmp_path / "killed")
    assert kept.stat().st_mtime_ns == before
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "whole")


def test_an_episode_that_kills_its_worker_is_recorded_and_the_rest_goes_on(tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    summary = sweep_into(tmp_path / "out", load=functools.partial(load_crashing, marks=str(marks)))
    second = summary["policies"]["second"]
    assert second["stop_reasons"] == {"crashed": 1, "success": 11}
    assert second["tasks"]["touch"]["successes"] == 11
    rows = results.read_episodes(str(tmp_path / "out"))
    assert len(rows) == 24
    (crashed,) = [r for r in rows if r["stop_reason"] == "crashed"]
    assert (crashed["policy"], crashed["episode_id"]) == ("second", 3)
    assert "crashed its worker" in crashed["failure"]
    assert len(list(marks.iterdir())) == 4  # twice among others, twice alone, and never again


@pytest.mark.slow
def test_a_split_item_resumes_as_its_single_episodes(tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    load = functools.partial(load_crashing, marks=str(marks))
    sweep_into(tmp_path / "out", load=load)
    before = outcomes(tmp_path / "out")
    (tmp_path / "out" / manifest.NAME).unlink()
    (tmp_path / "out" / "parts" / "second-touch-0004-0004.parquet").unlink()
    attempts = len(list(marks.iterdir()))
    sweep_into(tmp_path / "out", load=load)
    assert outcomes(tmp_path / "out") == before
    assert len(list(marks.iterdir())) == attempts


def test_what_loading_a_policy_raises_comes_through_with_its_fix(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        sweep_into(tmp_path, load=load_misfit)
    assert (caught.value.message, caught.value.fix) == ("It has 14 actions.", "use another suite")


def test_another_sweep_s_folder_is_refused(tmp_path):
    sweep_into(tmp_path)
    with pytest.raises(OutputError, match="seed"):
        sweep_into(tmp_path, seed=1)


def test_the_summary_is_plain_json(tmp_path):
    summary = sweep_into(tmp_path)
    stored = json.loads((tmp_path / results.SUMMARY).read_text())
    assert {**stored, "skipped": False} == summary


def test_two_policies_of_one_name_are_refused(tmp_path):
    with pytest.raises(UsageError, match="'a'"):
        run_sweep(
            str(tmp_path),
            fake_suite(),
            [PolicyRef("a", "expert"), PolicyRef("a", "random")],
            SweepConfig({"touch": 1}),
            workers=1,
        )


def test_tasks_and_episodes_on_the_command_line():
    suite = fake_suite()
    assert parse_tasks(suite, None, "") == {"touch": 12, "tap": 12}
    assert parse_tasks(suite, "tap", "5") == {"tap": 5}
    assert parse_tasks(suite, None, "3,touch=7") == {"touch": 7, "tap": 3}
    with pytest.raises(UsageError, match="did you mean 'touch'"):
        parse_tasks(suite, "tuoch", "")
    with pytest.raises(UsageError, match="did you mean 'tap'"):
        parse_tasks(suite, None, "tab=3")
    with pytest.raises(UsageError, match="not a positive number"):
        parse_tasks(suite, None, "touch=0")


def test_videos_are_playable_and_named_in_the_rows(tmp_path):
    import av

    config = SweepConfig({"touch": 3}, videos_per_task=1)
    run_sweep(str(tmp_path), fake_suite(), REFS[:1], config, workers=1, load_policy=load_fake)
    filmed = {r["episode_id"]: r["video"] for r in results.read_episodes(str(tmp_path))}
    assert filmed == {0: "videos/first-touch-0000.mp4", 1: None, 2: None}
    with av.open(str(tmp_path / filmed[0])) as video:
        stream = video.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        steps = results.read_episodes(str(tmp_path))[0]["steps"]
        assert sum(1 for _ in video.decode(stream)) > steps
