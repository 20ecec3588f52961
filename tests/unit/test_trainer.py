"""The training loop on the real ZeRO engine, in plain processes: its options, and what it survives."""

import functools
import math
import signal
from pathlib import Path

import loop
import pytest
import torch
from safetensors.torch import load_file

from dualvla.errors import DataError, UsageError
from dualvla_pipelines import resume
from dualvla_pipelines.recipes import TrainConfig
from dualvla_pipelines.trainer import _batches
from dualvla_pipelines.zero import learning_rate

SHARDED = {0: "none", 1: "cpu", 2: "cpu", 3: "cpu"}  # ZeRO stage -> where optimiser state rests


@pytest.fixture(scope="module")
def data(tmp_path_factory, synthetic_dataset):
    folder = tmp_path_factory.mktemp("trainer") / "data"
    synthetic_dataset(str(folder), parts=2, episodes=2, questions=4, steps=8)
    return folder


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """Six steps, with a resume state at every other one."""
    out = tmp_path_factory.mktemp("straight") / "specialist"
    assert loop.train(loop.make_job("specialist", data, out, "specialist.steps=6")) == [0]
    return out


def six_steps(data, out, *settings, **changes):
    return loop.make_job("specialist", data, out, "specialist.steps=6", *settings, **changes)


@pytest.mark.slow
def test_every_zero_stage_gives_the_same_losses_in_micro_batches_and_resumes_to_the_bit(data, tmp_path):
    def job(stage, offload, name, **changes):
        settings = (f"zero.stage={stage}", f"zero.offload={offload}", "zero.micro_batch=2")
        return loop.make_job("specialist", data, tmp_path / name, *(f"specialist.{s}" for s in settings), **changes)

    jobs = {"whole": loop.make_job("specialist", data, tmp_path / "whole")}  # stage 3, one micro-batch
    for stage, offload in SHARDED.items():
        name = f"{stage}-{offload}"
        jobs[name] = job(stage, offload, name)
        jobs[f"{name} resumed"] = job(stage, offload, f"{name}-resumed")
        jobs[f"{name} stopped"] = job(stage, offload, f"{name}-resumed", stop_after=2)
    order = sorted(jobs, key=lambda name: name.endswith("resumed"))
    assert loop.train(*(jobs[name] for name in order), workers=2) == [0, 0]

    expected = loop.lines(jobs["whole"].out)
    for stage, offload in SHARDED.items():
        name = f"{stage}-{offload}"
        for line, reference in zip(loop.lines(jobs[name].out), expected, strict=True):
            assert line == pytest.approx(reference, rel=1e-4, abs=1e-6), name
        assert loop.lines(jobs[f"{name} resumed"].out) == loop.lines(jobs[name].out)
        assert loop.same_weights(jobs[f"{name} resumed"].out, jobs[name].out), name


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "stage"), [(2, 3), (1, 0)])
def test_a_bad_step_is_left_out_and_counted_if_asked_even_over_a_restart(data, tmp_path, workers, stage):
    settings = ("on_bad_loss=skip", f"zero.stage={stage}", "zero.micro_batch=2", "checkpoint_every=1")
    settings = [f"specialist.{s}" for s in (*settings, "keep_checkpoints=4")]
    halves = [six_steps(data, tmp_path / "out", *settings, stop_after=n) for n in (3, None)]
    assert loop.train(*halves, workers=workers, prepare=loop.spoil_step_two) == [0] * workers
    found = loop.lines(tmp_path / "out")
    assert [line["skipped"] for line in found] == [0, 1, 1, 1, 1, 1]
    assert "loss" not in found[1]
    assert all(math.isfinite(value) for line in found for value in line.values())
    assert all(torch.isfinite(tensor).all() for tensor in loop.weights(tmp_path / "out").values())


@pytest.mark.slow
def test_a_bad_step_changes_no_weight_and_stops_by_default(data, tmp_path):
    settings = ("checkpoint_every=1", "keep_checkpoints=6")
    skipping, stopping = (
        six_steps(data, tmp_path / how, *(f"specialist.{s}" for s in (*settings, f"on_bad_loss={how}")))
        for how in ("skip", "stop")
    )
    codes = loop.train(skipping, stopping, prepare=loop.spoil_step_two)
    assert codes == [1]
    states = {saved.step: Path(saved.url) for saved in resume.states(str(tmp_path / "skip" / "resume"))}
    one, two, three = (load_file(states[step] / "averages-0.safetensors") for step in (1, 2, 3))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(two[name], three[name]) for name in two)
    assert [saved.step for saved in resume.states(str(tmp_path / "stop" / "resume"))] == [1]
    (kept,) = (tmp_path / "stop" / "failed").iterdir()
    assert "step-00000002" in kept.name
    assert load_file(kept)["actions"].isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half a file", "no record"])
def test_a_worker_killed_while_it_saves_goes_on_from_the_state_before(data, straight, tmp_path, moment):
    job = six_steps(data, tmp_path / "killed")
    assert loop.train(job, prepare=functools.partial(loop.die_while_saving, moment)) == [-signal.SIGKILL]
    assert loop.train(job) == [0]
    assert loop.lines(tmp_path / "killed") == loop.lines(straight)
    assert loop.same_weights(tmp_path / "killed", straight)


@pytest.mark.slow
def test_buckets_resume_to_the_bit(data, straight, tmp_path):
    bucketed = "specialist.bucket_batches=3"
    jobs = [six_steps(data, tmp_path / "one", bucketed), six_steps(data, tmp_path / "resumed", bucketed, stop_after=2)]
    assert loop.train(*jobs, six_steps(data, tmp_path / "resumed", bucketed)) == [0]
    assert loop.same_weights(tmp_path / "resumed", tmp_path / "one")
    assert loop.lines(tmp_path / "one") != loop.lines(straight)


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # beside an accelerator batches are made in a thread
def test_batches_come_in_order_until_one_cannot_be_made(device):
    def make(step):
        if step == 7:
            raise DataError("Step 7 has no image.", "give it one")
        return 10 * step

    batches = _batches(make, 4, 9, torch.device(device))
    assert [next(batches) for _ in range(3)] == [(4, 40), (5, 50), (6, 60)]
    with pytest.raises(DataError, match="Step 7"):
        next(batches)
    assert list(_batches(make, 0, 3, torch.device(device))) == [(0, 0), (1, 10), (2, 20)]
    assert list(_batches(make, 3, 3, torch.device(device))) == []


def test_the_rate_warms_up_and_then_stays_or_falls_to_a_tenth():
    settings = {"steps": 110, "warmup_steps": 10, "lr": 2e-3}
    cosine, constant = (TrainConfig(schedule=schedule, **settings) for schedule in ("cosine", "constant"))
    for config in (cosine, constant):
        assert [learning_rate(step, config) for step in (0, 4, 9)] == pytest.approx([2e-4, 1e-3, 2e-3])
    assert all(learning_rate(step, constant) == 2e-3 for step in range(10, 110))
    assert learning_rate(60, cosine) == pytest.approx(0.55 * 2e-3)  # half-way: the mean of both ends
    assert learning_rate(110, cosine) == pytest.approx(2e-4)
    rates = [learning_rate(step, cosine) for step in range(10, 110)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("setting", ["keep_checkpoints", "checkpoint_every", "batch_size"])
def test_settings_that_make_no_sense_are_refused(setting):
    with pytest.raises(UsageError, match=f"{setting} = 0"):
        TrainConfig(**{setting: 0})
