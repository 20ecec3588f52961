"""Sweeps on a real Ray cluster with a fake suite: exactly once, resumed, the same whatever the number of workers."""

import functools
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import eval_fakes
import numpy as np
import pytest
from eval_fakes import CrashingPolicy, FakePolicy, FaultyPolicy, fake_suite
from ray import cloudpickle

from dualvla.errors import CheckpointError, OutputError, UsageError
from dualvla.io import manifest
from dualvla_eval import results
from dualvla_eval.policies import PolicyRef
from dualvla_eval.rollout import Limits
from dualvla_eval.sweep import Machinery, SweepConfig, parse_seeds, parse_tasks, parse_videos, run_sweep

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


def sweep_into(folder, load=load_fake, tasks=None, refs=REFS, suite=None, machinery=None, **options):
    config = SweepConfig(tasks or {"touch": 12}, **{"videos_per_task": 0, **options})
    machinery = Machinery(**{"workers": 1, **(machinery or {})})
    return run_sweep(str(folder), suite or fake_suite(), refs, config, machinery=machinery, load_policy=load)


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


def checkpoint(folder):
    """As much of one as names it; what it holds comes from `load_policy`."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(b"{}")
    return str(folder)


def test_the_number_of_workers_changes_no_outcome(tmp_path):
    sweep_into(tmp_path / "one")
    refs = [REFS[0], PolicyRef("second", checkpoint(tmp_path / "checkpoint"))]
    sweep_into(tmp_path / "two", refs=refs, machinery={"workers": 2, "hosts": 1, "envs_per_worker": 3}, max_batch=4)
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
    parts = sorted((tmp_path / "killed" / "parts").iterdir())
    kept = {part: part.stat().st_mtime_ns for part in parts[::3]}
    for part in set(parts) - set(kept):
        part.unlink()
    sweep_into(tmp_path / "killed")
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
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
    assert len(list(marks.iterdir())) == 3  # among others, then twice alone, and never again


def test_what_loading_a_policy_raises_comes_through_with_its_fix(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        sweep_into(tmp_path, load=load_misfit)
    assert (caught.value.message, caught.value.fix) == ("It has 14 actions.", "use another suite")


def test_another_sweep_s_folder_is_refused(tmp_path):
    sweep_into(tmp_path)
    with pytest.raises(OutputError, match="seed"):
        sweep_into(tmp_path, seeds=(1,))


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
    run_sweep(str(tmp_path), fake_suite(), REFS[:1], config, load_policy=load_fake)
    filmed = {r["episode_id"]: r["video"] for r in results.read_episodes(str(tmp_path))}
    assert filmed == {0: "videos/first-touch-0000.mp4", 1: None, 2: None}
    with av.open(str(tmp_path / filmed[0])) as video:
        stream = video.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        steps = results.read_episodes(str(tmp_path))[0]["steps"]
        assert sum(1 for _ in video.decode(stream)) > steps


def test_only_the_films_of_failures_are_kept(tmp_path):
    sweep_into(tmp_path, load=load_crooked, tasks={"touch": 3}, refs=REFS[:1], videos_per_task=3, only_failures=True)
    filmed = {r["episode_id"]: (r["stop_reason"], r["video"]) for r in results.read_episodes(str(tmp_path))}
    assert filmed[1] == ("policy_nan", "videos/first-touch-0001.mp4")
    assert filmed[0] == filmed[2] == ("success", None)
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["first-touch-0001.mp4"]


def load_crooked(ref, **_):
    return FaultyPolicy(not_numbers)


def not_numbers(reply):
    return replace(reply, actions=np.full((4, 7), np.nan))


def test_every_seed_has_rows_files_and_a_rate_of_its_own(tmp_path):
    summary = sweep_into(tmp_path, tasks={"touch": 3}, seeds=(0, 7), refs=REFS[:1])
    rows = results.read_episodes(str(tmp_path))
    assert [(r["episode_id"], r["seed"]) for r in rows] == [(i, s) for i in range(3) for s in (0, 7)]
    assert len({results.trajectory_url(str(tmp_path), r) for r in rows}) == 6
    assert summary["policies"]["first"]["seeds"]["touch"]["rates"] == {"0": 1.0, "7": 1.0}
    assert summary["policies"]["first"]["seeds"]["touch"]["standard_deviation"] == 0.0
    assert summary["tasks"]["touch"]["n"] == 6


def test_seeds_and_videos_on_the_command_line():
    assert parse_seeds("0, 2,4") == (0, 2, 4)
    for text in ("1,1", "a", "-1"):
        with pytest.raises(UsageError, match="--seeds"):
            parse_seeds(text)
    assert parse_videos("3", {"touch": 12}) == (3, False)
    assert parse_videos("all", {"touch": 12, "tap": 20}) == (20, False)
    assert parse_videos("failures", {"touch": 12}) == (12, True)
    with pytest.raises(UsageError, match="--videos"):
        parse_videos("some", {"touch": 12})


class SlowPolicy(FakePolicy):
    """Takes its time, whatever the batch, until both simulators are there; notes how large batches are."""

    def __init__(self, notes):
        super().__init__()
        self._notes = Path(notes)
        self._largest = 0

    def infer(self, observations, sessions):
        time.sleep(0.05 if self._largest > 3 else 2.0)
        self._largest = max(self._largest, len(observations))
        (self._notes / f"{time.monotonic_ns()}").write_text(str(len(observations)))
        return super().infer(observations, sessions)


def load_slow(ref, notes, **_):
    return SlowPolicy(notes)


def test_a_host_batches_over_all_simulators(tmp_path):
    (tmp_path / "notes").mkdir()
    refs = [PolicyRef("slow", checkpoint(tmp_path / "checkpoint"))]
    load = functools.partial(load_slow, notes=str(tmp_path / "notes"))
    machinery = {"workers": 2, "envs_per_worker": 3, "hosts": 1}
    sweep_into(tmp_path / "out", load=load, refs=refs, machinery=machinery, max_batch=5)
    sizes = [int(note.read_text()) for note in (tmp_path / "notes").iterdir()]
    assert 3 < max(sizes) <= 5  # more than one simulator has in flight, never more than asked for
    assert {r["stop_reason"] for r in results.read_episodes(str(tmp_path / "out"))} == {"success"}


def load_killer(ref, marks, once, **_):
    return KillingPolicy(3, marks, once)


class KillingPolicy(CrashingPolicy):
    """Kills its process at episode 3: always, or the first time only."""

    def __init__(self, episode_id, marks, once):
        super().__init__(episode_id, marks)
        self._once = once

    def reply(self, observation, session):
        if self._once and any(self._marks.iterdir()):
            return FakePolicy.reply(self, observation, session)
        return super().reply(observation, session)


@pytest.mark.slow
@pytest.mark.parametrize("once", [True, False])
def test_a_host_that_dies_comes_back_and_no_episode_pays_for_another(tmp_path, once):
    (tmp_path / "marks").mkdir()
    refs = [PolicyRef("second", checkpoint(tmp_path / "checkpoint"))]
    load = functools.partial(load_killer, marks=str(tmp_path / "marks"), once=once)
    machinery = {"workers": 2, "envs_per_worker": 3, "hosts": 1, "patience_s": 20.0}
    sweep_into(tmp_path / "out", load=load, refs=refs, machinery=machinery)
    rows = {r["episode_id"]: r for r in results.read_episodes(str(tmp_path / "out"))}
    assert {r["stop_reason"] for i, r in rows.items() if i != 3} == {"success"}
    assert rows[3]["stop_reason"] == ("success" if once else "crashed")
    assert len(rows) == 12


class StuckEnv(eval_fakes.FakeEnv):
    """Never comes back from the second step of episode 2."""

    def reset(self, *, seed=None, options=None):
        self._stuck = options["episode"].episode_id == 2
        return super().reset(seed=seed, options=options)

    def step(self, action):
        if self._stuck and self.state().step == 1:
            time.sleep(3600)
        return super().step(action)


class RaisingEnv(eval_fakes.FakeEnv):
    """The device is lost in episode 2."""

    def reset(self, *, seed=None, options=None):
        if options["episode"].episode_id == 2:
            raise RuntimeError("ErrorDeviceLost")
        return super().reset(seed=seed, options=options)


@pytest.mark.slow
@pytest.mark.parametrize(("env", "reason", "words"), [(StuckEnv, "stalled", "2 s"), (RaisingEnv, "crashed", "Lost")])
def test_a_simulator_that_hangs_or_raises_costs_one_episode(tmp_path, env, reason, words):
    suite = replace(fake_suite(), make_env=env)
    limits = Limits(step_s=2.0)
    sweep_into(tmp_path, suite=suite, refs=REFS[:1], machinery={"workers": 2, "limits": limits})
    rows = {r["episode_id"]: r for r in results.read_episodes(str(tmp_path))}
    assert rows[2]["stop_reason"] == reason
    assert words in rows[2]["failure"]
    assert {r["stop_reason"] for i, r in rows.items() if i != 2} == {"success"}


@pytest.mark.slow
def test_simulators_are_replaced_before_they_can_leak_much(tmp_path):
    (tmp_path / "pids").mkdir()
    suite = replace(fake_suite(), make_env=functools.partial(TellingEnv, str(tmp_path / "pids")))
    sweep_into(tmp_path / "out", suite=suite, refs=REFS[:1], machinery={"recycle_after": 4})
    assert len(list((tmp_path / "pids").iterdir())) == 3
    assert len(results.read_episodes(str(tmp_path / "out"))) == 12


class TellingEnv(eval_fakes.FakeEnv):
    """Leaves a mark of its process."""

    def __init__(self, folder):
        (Path(folder) / f"{os.getpid()}").touch()
