"""The teacher cache on a real Ray cluster: made once, resumed, read by training, and refused where it is stale."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import ray
import torch

from dualvla import cli
from dualvla.distill.cache import CacheSettings
from dualvla.distill.teacher_server import TeacherService, serving
from dualvla.distill.teachers import Teachers
from dualvla.errors import CheckpointError, DataError, OutputError, ServerError, UsageError
from dualvla.io import manifest
from dualvla.models.checkpoint import load_model, save_checkpoint
from dualvla.models.processing import Processor
from dualvla.models.stages import prepare
from dualvla.models.vla import VLA
from dualvla.wire import teacher as wire
from dualvla_pipelines import teach as pipeline
from dualvla_pipelines.recipes import get_recipe
from dualvla_pipelines.samples import TrainRows
from dualvla_pipelines.teach import teach
from dualvla_pipelines.teacher_actors import ActorForward, teaching
from dualvla_pipelines.train import train

SETTINGS = ["model.image_size=16", "dual.batch_size=8", "dual.multimodal_fraction=0.25", "dual.zero.dtype=fp32"]
CACHE = CacheSettings(top_k=40, views=2)


@pytest.fixture(scope="module")
def school(tmp_path_factory, synthetic_dataset):
    """Folder with `data`, and finished random checkpoints `specialist`, `reasoning` and `foreign`."""
    root = tmp_path_factory.mktemp("school")
    synthetic_dataset(str(root / "data"), parts=2, episodes=2, questions=4, steps=8)
    rows = TrainRows.load(str(root / "data"))
    from dualvla.config import override

    model = override(get_recipe("debug"), SETTINGS).model
    for name, stage, texts in (
        ("specialist", "specialist", rows.texts()),
        ("reasoning", "reasoning", rows.texts()),
        ("foreign", "specialist", ["something else"] * 9),
    ):
        config = prepare(model, stage)
        processor = Processor.fit(config, texts, rows.actions, rows.proprio, rows.target_positions())
        vla = VLA.create(config, processor, seed=1)
        folder = str(root / name)
        manifest.begin(folder, "checkpoint", {"stage": stage, "name": name}, {})
        save_checkpoint(folder, vla.state_dict(), vla.config, processor, {})
        manifest.finish(folder, "checkpoint", {"stage": stage, "name": name}, {})
    return root


@pytest.fixture(scope="module")
def cached(school, ray_cluster):
    teach(str(school / "data"), str(school / "cache"), settings=CACHE, workers=2, **teachers(school))
    return school / "cache"


def teachers(school):
    return {"action_teacher": str(school / "specialist"), "reasoning_teacher": str(school / "reasoning")}


def run_dual(school, out, cache, steps=2, **given):
    options = {"init": str(school / "reasoning"), "action_teacher": str(school / "specialist"), **given}
    return train(
        "dual", "debug", str(school / "data"), str(out), teacher_cache=cache and str(cache), threads=1,
        assignments=[*SETTINGS, f"dual.steps={steps}"], **options,
    )  # fmt: skip


def parts(folder):
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*.parquet")}


def test_a_cache_depends_neither_on_workers_nor_on_interruption(school, cached, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_SAMPLES_PER_PART", 10)
    whole = teach(str(school / "data"), str(tmp_path / "whole"), settings=CACHE, workers=2, **teachers(school))
    assert whole["robot"]["entries"] == 2 * 32
    assert whole["multimodal"]["entries"] == 2 * 8
    assert whole["multimodal"]["tokens"] >= 2 * 8 * 2
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", resumed)
    (resumed / "manifest.json").unlink()
    for lost in list((resumed / "actions").iterdir())[1:]:
        lost.unlink()
    teach(str(school / "data"), str(resumed), settings=CACHE, workers=1, **teachers(school))
    assert parts(resumed) == parts(tmp_path / "whole")
    assert teach(str(school / "data"), str(resumed), settings=CACHE, **teachers(school))["skipped"]
    with pytest.raises(OutputError, match="settings"):
        teach(str(school / "data"), str(resumed), settings=CacheSettings(top_k=30, views=2), **teachers(school))


def test_the_dual_stage_trains_from_the_cache_alone(school, cached, tmp_path):
    assert run_dual(school, tmp_path / "dual", cached)["finished"]
    lines = [json.loads(line) for line in (tmp_path / "dual" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["kd_flow"] >= 0 and line["kd_token"] >= 0 for line in lines)
    assert lines[0]["kd_flow"] + lines[0]["kd_token"] > 0


def test_what_is_stale_or_foreign_is_refused_before_anything_is_claimed(school, cached, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"domain 'robot': it was made by another teacher checkpoint"):
        run_dual(school, out, cached, action_teacher=str(school / "reasoning"))
    with pytest.raises(DataError, match="softened by temperature"):
        train(
            "dual", "debug", str(school / "data"), str(out), teacher_cache=str(cached), init=str(school / "reasoning"),
            action_teacher=str(school / "specialist"), assignments=[*SETTINGS, "dual.losses.temperature=1.5"],
        )  # fmt: skip
    with pytest.raises(UsageError, match="has no teachers"):
        train("specialist", "debug", str(school / "data"), str(out), teacher_cache=str(cached))
    with pytest.raises(CheckpointError, match=r"foreign' cannot be a teacher here: its tokenizer"):
        teach(
            str(school / "data"), str(out), action_teacher=str(school / "specialist"),
            reasoning_teacher=str(school / "foreign"),
        )  # fmt: skip
    with pytest.raises(UsageError, match="No teacher was given"):
        teach(str(school / "data"), str(out))
    assert not out.exists()


class CountingService(TeacherService):
    """Notes what it was asked for."""

    def __init__(self, folder):
        super().__init__(folder)
        self.kinds = []

    def answer(self, frame):
        self.kinds.append(wire.ask_from_bytes(frame).kind)
        return super().answer(frame)


def test_the_dual_stage_learns_from_teachers_that_are_served_elsewhere(school, tmp_path, ray_cluster):
    """That their targets are those of teachers in process is tested in tests/unit/test_remote_teacher.py."""
    services = [CountingService(str(school / name)) for name in ("specialist", "reasoning")]
    with serving(services[0]) as one, serving(services[1]) as two:
        for server in (one, two):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"ws://127.0.0.1:{server.socket.getsockname()[1]}" for server in (one, two)]
        run_dual(school, tmp_path / "far", None, steps=1, action_teacher=urls[0], reasoning_teacher=urls[1])
        with pytest.raises(UsageError, match="A teacher cache beside the served teacher"):
            run_dual(school, tmp_path / "both", "cache", action_teacher=urls[0])
        for server in (one, two):
            server.shutdown()
    (line,) = [json.loads(line) for line in (tmp_path / "far" / "metrics.jsonl").read_text().splitlines()]
    assert [set(service.kinds) for service in services] == [{"velocity"}, {"words"}]
    assert line["kd_token"] == pytest.approx(0.0, abs=1e-4)  # the student starts as its reasoning teacher
    assert line["kd_flow"] >= 0
    inputs = manifest.require(str(tmp_path / "far"), "checkpoint")["inputs"]
    for name, folder in (("action_teacher", "specialist"), ("reasoning_teacher", "reasoning")):
        assert inputs[name] == manifest.input_digests({"": str(school / folder)})[""]  # known by its files


@pytest.mark.slow
def test_teachers_behind_actors_answer_as_those_in_process_whoever_dies(school, ray_cluster):
    """Killed between two asks and in the middle of one, restarted, gone for good one after the other."""
    rows = TrainRows.load(str(school / "data"))
    model, processor, config = load_model(str(school / "reasoning"))
    samples = [rows.sample(d, i, config.horizon, True) for d in ("robot", "multimodal") for i in range(4)]
    batch = processor.collate(samples, seed=0, step=0)
    expected = Teachers.in_process(model, model).targets(batch)
    folders = {d: str(school / "reasoning") for d in ("robot", "multimodal")}
    with teaching(folders, 2, bf16=False, cpus=2.0, gpus=0.0) as names:
        assert all(len(found) == 2 for found in names.values())
        action, reasoning = (ActorForward(names[d]) for d in ("robot", "multimodal"))
        teachers = Teachers.in_process(action, reasoning)

        def same():
            found = teachers.targets(batch)
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)

        same()
        first = ray.get_actor(names["multimodal"][0])
        pid = ray.get(first.pid.remote())
        asked = threading.Timer(0.05, os.kill, (pid, signal.SIGKILL))
        asked.start()
        for _ in range(4):
            same()
        asked.join()
        assert ray.get(first.pid.remote()) != pid  # Ray has started it again
        ray.kill(first)
        for _ in range(3):
            same()
        ray.kill(ray.get_actor(names["multimodal"][1]))
        with pytest.raises(ServerError, match="All actors of a teacher died"):
            teachers.targets(batch)


@pytest.mark.slow
def test_training_with_teacher_actors_logs_the_losses_of_training_without(school, tmp_path, ray_cluster):
    for number in (0, 1):
        run_dual(school, tmp_path / str(number), None, teacher_actors=number)
    alone, asked = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in "01"
    )
    assert alone[-1]["kd_token"] > 0
    for one, other in zip(alone, asked, strict=True):
        for term in ("loss", "kd_flow", "kd_token", "grad_norm"):
            assert other[term] == pytest.approx(one[term], rel=1e-4, abs=1e-5)
    assert not [actor for actor in ray.util.list_named_actors() if actor.startswith("dualvla-teacher")]
    with pytest.raises(UsageError, match="without online teachers"):
        run_dual(school, tmp_path / "cached", "cache", teacher_actors=1)


@pytest.mark.slow
def test_an_online_teacher_with_another_tokenizer_is_refused_too(school, tmp_path, ray_cluster):
    with pytest.raises(CheckpointError, match=r"foreign' cannot be a teacher here: its tokenizer"):
        run_dual(school, tmp_path / "out", None, action_teacher=str(school / "foreign"))


def test_the_command_says_what_it_made(school, cached, capsys):
    assert cli.main(["teach", str(school / "data"), str(cached), "--top-k", "40", "--views", "2",
                     "--action-teacher", str(school / "specialist"),
                     "--reasoning-teacher", str(school / "reasoning")]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "already there" in shown
    assert "of the mass in the tail" in shown
