"""Training on a real Ray cluster and the real ZeRO-3 engine: workers, interruptions and broken input."""

import json
import random
import shutil
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dualvla.errors import CheckpointError, OutputError, TrainingError, UsageError
from dualvla_pipelines.train import train

# The smallest model that goes the whole way, on 16 px images; four steps of eight samples, in fp32.
SETTINGS = ["model.image_size=16"]
OF_THE_MACHINE = ("samples_per_s", "tokens_per_s", "memory_gb", "mfu", "padding")  # padding: each worker has its own
FOUR_STEPS = [
    f"{stage}.{key}"
    for stage in ("specialist", "reasoning", "dual")
    for key in ("steps=4", "batch_size=8", "multimodal_fraction=0.25", "checkpoint_every=2", "zero.dtype=fp32")
]


TWELVE_STEPS = ("specialist.steps=12", "specialist.checkpoint_every=3")


def run(stage, data, out, *more, **options):
    return train(stage, "debug", str(data), str(out), assignments=[*SETTINGS, *FOUR_STEPS, *more], threads=1, **options)


def losses(folder):
    """Step -> everything that is logged but the speed."""
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in OF_THE_MACHINE} for line in lines]


def weights(folder):
    return load_file(Path(folder, "model.safetensors"))


def assert_close(ours, theirs, tolerance):
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], name)


@pytest.fixture(scope="module")
def data(tmp_path_factory, synthetic_dataset):
    folder = str(tmp_path_factory.mktemp("train") / "data")
    synthetic_dataset(folder, parts=2, episodes=2, questions=4, steps=8)
    return folder


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory, ray_cluster):
    out = tmp_path_factory.mktemp("straight") / "specialist"
    assert run("specialist", data, out)["finished"]
    return out


def test_a_finished_checkpoint_loads_and_is_not_made_again(straight, data):
    from dualvla.models.checkpoint import load_model

    model, _, config = load_model(str(straight))
    assert config.kind == "specialist"
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not (straight / "resume").exists()
    assert run("specialist", data, straight)["skipped"]
    with pytest.raises(OutputError, match="seed"):
        run("specialist", data, straight, seed=1)


def test_two_workers_in_micro_batches_give_the_losses_of_one(straight, data, tmp_path):
    run("specialist", data, tmp_path / "two", "specialist.zero.micro_batch=2", workers=2)
    assert_close(losses(tmp_path / "two"), losses(straight), 1e-5)


def test_two_steps_and_two_more_equal_four(straight, data, tmp_path):
    out = tmp_path / "resumed"
    assert not run("specialist", data, out, stop_after=2)["finished"]
    assert len(losses(out)) == 2
    assert run("specialist", data, out)["finished"]
    assert losses(out) == losses(straight)
    ours, theirs = weights(out), weights(straight)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_the_dual_stage_resumes_and_shards_exactly_too(straight, data, tmp_path):
    """Frozen parameters, adapters and both teachers on the way."""
    run("reasoning", data, tmp_path / "reasoning", init=str(straight))
    given = {"init": str(tmp_path / "reasoning"), "action_teacher": str(straight)}
    run("dual", data, tmp_path / "one", **given)
    run("dual", data, tmp_path / "two", workers=2, **given)
    run("dual", data, tmp_path / "resumed", workers=2, stop_after=2, **given)
    run("dual", data, tmp_path / "resumed", workers=2, **given)
    assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), 1e-5)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "two")
    before, after = weights(tmp_path / "reasoning"), weights(tmp_path / "one")
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert any(".adapters." in name for name in moved)
    assert not any(name.startswith("head.") for name in moved)
    assert all(line["kd_flow"] >= 0 and line["kd_token"] > -1e-6 for line in losses(tmp_path / "one"))  # rounded


@pytest.mark.slow
def test_another_number_of_workers_goes_on_where_the_last_ones_stopped(straight, data, tmp_path):
    out = tmp_path / "reshaped"
    for workers, steps in ((2, 1), (1, 2), (2, None)):
        run("specialist", data, out, workers=workers, stop_after=steps)
    assert_close(losses(out), losses(straight), 1e-4)
    ours, theirs = weights(out), weights(straight)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


@pytest.mark.slow
def test_looking_at_gradients_changes_no_step_and_does_not_depend_on_the_workers(straight, data, tmp_path):
    given = {"init": str(straight)}
    looking = "reasoning.conflict_every=2"
    run("reasoning", data, tmp_path / "plain", **given)
    run("reasoning", data, tmp_path / "one", looking, **given)
    run("reasoning", data, tmp_path / "two", looking, workers=2, **given)
    one, two, plain = (losses(tmp_path / name) for name in ("one", "two", "plain"))
    seen = {name for name in one[0] if name.startswith("grad_")} - {"grad_norm"}
    assert {"grad_norm/lm", "grad_norm/flow", "grad_cosine"} <= seen
    assert all(-1 <= line["grad_cosine"] <= 1 for line in (one[0], one[2]))
    assert_close(two, one, 1e-4)
    assert [{k: v for k, v in line.items() if k not in seen} for line in one] == plain


@pytest.mark.slow
def test_a_damaged_resume_state_costs_steps_not_results(straight, data, tmp_path):
    out = tmp_path / "damaged"
    run("specialist", data, out, stop_after=3)
    newest = max((out / "resume").glob("step-*"))
    assert len(list((out / "resume").glob("step-*"))) == 2
    next(newest.rglob("*.pt")).write_bytes(b"not what was hashed")
    run("specialist", data, out)
    assert losses(out) == losses(straight)


@pytest.fixture(scope="module")
def twelve_steps(data, tmp_path_factory, ray_cluster):
    out = tmp_path_factory.mktemp("twelve") / "specialist"
    run("specialist", data, out, *TWELVE_STEPS, workers=2)
    return out


@pytest.mark.slow
def test_a_killed_worker_costs_steps_not_results(twelve_steps, data, tmp_path, fault_seed):
    rng = random.Random(fault_seed)
    out = tmp_path / "killed"
    killer = threading.Thread(target=kill_worker_after, args=(out / "metrics.jsonl", rng.randrange(1, 11), rng))
    killer.start()
    run("specialist", data, out, *TWELVE_STEPS, workers=2)
    killer.join()
    assert losses(out) == losses(twelve_steps)
    ours, theirs = weights(out), weights(twelve_steps)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def kill_worker_after(metrics, steps, rng):
    """One of two, at any moment of a step."""
    while not (metrics.exists() and metrics.read_text().count("\n") >= steps):
        time.sleep(0.01)
    time.sleep(rng.uniform(0.0, 0.2))
    workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    rng.choice(sorted(workers, key=lambda process: process.pid)).kill()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_training_and_keeps_the_batch(data, tmp_path, ray_cluster):
    out = tmp_path / "nan"
    with pytest.raises(TrainingError, match=r"step \d"):
        run("specialist", data, out, "specialist.lr=1e30", "specialist.grad_clip=1e30")
    (kept,) = (out / "failed").iterdir()
    with safe_open(kept, "pt") as batch:
        rows = json.loads(batch.metadata()["rows"])
        assert len(set(rows)) == len(batch.get_tensor("images")) == 8


def test_what_does_not_fit_is_refused_before_anything_is_claimed(straight, data, tmp_path):
    out = tmp_path / "out"
    for key, value in {"control_hz": "10.0", "image_size": "64", "proprio_dim": "5", "cameras": '["wrist"]'}.items():
        with pytest.raises(CheckpointError, match=key):
            run("specialist", data, out, f"model.{key}={value}")
    with pytest.raises(CheckpointError, match=r"another architecture.*num_queries"):
        run("reasoning", data, out, "model.num_queries=2", init=str(straight))
    with pytest.raises(UsageError, match="--action-teacher"):
        run("dual", data, out, init=str(straight))
    with pytest.raises(UsageError, match="needs --init"):
        run("reasoning", data, out)
    with pytest.raises(UsageError, match="3 workers"):
        run("specialist", data, out, workers=3)
    assert not out.exists()


def test_a_damaged_checkpoint_is_refused(straight, data, tmp_path):
    copy = shutil.copytree(straight, tmp_path / "copy")
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        run("reasoning", data, tmp_path / "out", init=str(copy))
