"""What distillation, the data path and padding cost a training step, each beside its baseline in the same run.

    python benchmarks/training.py [--only distill,path,padding] [--steps 120] [--out FILE]

distill  a whole step of stage dual (data, teachers, both passes, optimiser, averages) with a teacher cache and with
         online teachers of the student's size, against one without distillation; three engines in one process take
         turns on the same batches
path     a step of `dualvla train` on Ray Train, from parquet to metrics.jsonl and TensorBoard, against a bare DeepSpeed
         loop in a process of its own over the same batches as tensors in memory; they take four turns.
         Both compute with one thread
padding  share of padded positions and positions a sample with and without length-bucketed batches (counted, not timed)

The models are recipe tiny's (or --recipe), the data synthetic with texts of its lengths. Times are medians over steps
after a warm-up; ratios of engines that take turns are medians of the ratios of one step's times. "cpu" counts the
processor time of the process, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are loaded
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # else workers give way to all that the baseline does not give way to

import numpy as np
import torch
import torch.distributed as dist

from dualvla.config import override
from dualvla.io import dataset, manifest
from dualvla_pipelines import trainer, zero
from dualvla_pipelines.recipes import Stage, get_recipe
from dualvla_pipelines.samples import Sampler, TrainRows
from dualvla_pipelines.teach import teach
from dualvla_pipelines.train import train
from dualvla_pipelines.trainer import TrainJob
from dualvla_pipelines.watch import Watch

RESULTS = Path(__file__).parent / "results" / "training.json"
EPISODES, STEPS, QUESTIONS, SIZE = 40, 30, 300, 64
KEEP = 0.25  # share of frames that keep their reasoning, about what pruning leaves
WARM_UP = 5
_TURNS = 4
_COLOURS = ("red", "green", "blue", "yellow", "orange", "purple")
_THINGS = ("cube", "ball", "cylinder", "cone")


def make_data(folder: str) -> None:
    """Robot episodes and questions with noise for pictures; texts of 5 to 40 words where reasoning was kept."""
    rng = np.random.default_rng(0)

    def words(number: int) -> str:
        return " ".join(f"the {rng.choice(_COLOURS)} {rng.choice(_THINGS)}" for _ in range(max(1, number // 3)))

    def image() -> bytes:
        small = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        return dataset.encode_png(np.kron(small, np.ones((SIZE // 8, SIZE // 8, 1), np.uint8)))

    rows = []
    for episode in range(EPISODES):
        instruction = f"touch {words(3)}"
        for step in range(STEPS):
            keep = bool(rng.random() < KEEP)
            rows.append({
                "episode_id": f"synthetic/robot/{episode:03d}", "step": step, "timestamp_s": step / 5,
                "control_hz": 5.0, "split": "train", "domain": "robot", "task": "touch", "instruction": instruction,
                "images": {"main": image()}, "ee_pose": [0.0] * 6, "gripper": [1.0],
                "proprio": rng.normal(size=4).tolist(), "action": rng.normal(size=7).tolist(),
                "action_space": "ee_delta_pose+gripper", "motion_primitive": "move", "events": [],
                "reasoning": words(int(rng.integers(5, 41))), "target_pixel": [0.5, 0.5],
                "target_position": [0.1, 0.0, 0.0], "scene_label": keep, "action_label": keep, "keep_reasoning": keep,
            })  # fmt: skip
    for question in range(QUESTIONS):
        rows.append({
            "episode_id": f"synthetic/qa/{question:04d}", "step": 0, "split": "train", "domain": "multimodal",
            "task": "colour", "instruction": f"what colour is {words(3)}?", "images": {"main": image()},
            "reasoning": words(int(rng.integers(1, 20))), "scene_label": True, "action_label": True,
            "keep_reasoning": True,
        })  # fmt: skip
    manifest.begin(folder, dataset.KIND, {"synthetic": True}, {})
    dataset.write_table(dataset.part_url(folder, 0), dataset.rows_to_table(rows, labels=True))
    dataset.finish_dataset(folder, {"synthetic": True}, {}, rows_in=len(rows))


def make_checkpoints(data: str, folder: Path, recipe: str) -> None:
    """A specialist and a reasoning policy of two steps each, and a cache of what both say."""
    few = [f"{stage}.{key}" for stage in ("specialist", "reasoning") for key in ("steps=2", "warmup_steps=1")]
    common: dict[str, Any] = {"assignments": few, "threads": 1, "track": ["none"]}
    train("specialist", recipe, data, str(folder / "specialist"), **common)
    train("reasoning", recipe, data, str(folder / "reasoning"), init=str(folder / "specialist"), **common)
    teachers = {"action_teacher": str(folder / "specialist"), "reasoning_teacher": str(folder / "reasoning")}
    teach(data, str(folder / "cache"), **teachers)


def distill(data: str, folder: Path, recipe: str, steps: int) -> dict[str, Any]:
    jobs = {
        "without": _dual(data, folder, recipe, ["dual.teachers=none"]),
        "cache": _dual(data, folder, recipe, [], teacher_cache=str(folder / "cache")),
        "online": _dual(data, folder, recipe, []),
    }
    runners = {name: Runner(job) for name, job in jobs.items()}
    wall: dict[str, list[float]] = {name: [] for name in jobs}
    cpu: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for step in range(WARM_UP + steps):
        for name in [*names[step % 3 :], *names[: step % 3]]:
            started, spent = time.perf_counter(), time.process_time()
            runners[name].step(step, runners[name].batch(step))
            if step >= WARM_UP:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - spent)
    return {
        "ms_per_step": {name: round(1e3 * statistics.median(times), 1) for name, times in wall.items()},
        "cache_over_without": _ratios(wall["cache"], wall["without"], cpu["cache"], cpu["without"]),
        "online_over_cache": _ratios(wall["online"], wall["cache"], cpu["online"], cpu["cache"]),
    }


def _ratios(wall: list[float], base_wall: list[float], cpu: list[float], base_cpu: list[float]) -> dict[str, float]:
    """Medians over steps of the ratio of one step's times: a machine's speed drifts by more than is measured here."""
    pairs = {"wall": (wall, base_wall), "cpu": (cpu, base_cpu)}
    return {
        name: round(statistics.median(a / b for a, b in zip(*pair, strict=True)), 3) for name, pair in pairs.items()
    }


def _dual(data: str, folder: Path, recipe: str, settings: list[str], **more: Any) -> TrainJob:
    chosen = override(get_recipe(recipe), settings)
    teachers = {"init": str(folder / "reasoning"), "action_teacher": str(folder / "specialist")}
    return TrainJob("dual", chosen.dual, chosen.model, data, str(folder / "unused"), 0, **teachers, **more)


class Runner:
    """The parts of the training loop, a step at a time."""

    def __init__(self, job: TrainJob):
        self.job, self.rows = job, TrainRows.load(job.data)
        model, self.processor, self.model = trainer.build(job, self.rows)
        trainer.apply_stage(model, job.stage, self.model)
        self.engine = zero.initialize(model, job.config, 1)
        self.engine.train()
        self.averages = zero.Averages(self.engine, job.config.ema_decay)
        self.teachers = trainer.load_teachers(job, self.engine.device)
        self.sampler = trainer.make_sampler(job, self.rows)
        self.watch = Watch(self.engine.module, job.config, self.engine.device)

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        config = self.job.config
        samples = [
            self.rows.sample(d, r, self.model.horizon, config.use_reasoning) for d, r in self.sampler.batch(step)
        ]
        return trainer._collate(self.processor, samples, self.teachers, self.job.seed, step)

    def step(self, step: int, batch: dict[str, torch.Tensor]) -> None:
        trainer._step(self.engine, batch, 1, self.teachers, self.job, step, self.watch)
        self.averages.update(step)

    def bare_step(self, batch: dict[str, torch.Tensor]) -> None:
        """What DeepSpeed's own tutorial does, with autocast as the recipe has it."""
        with torch.autocast(self.engine.device.type, torch.bfloat16, enabled=self.job.config.zero.dtype == "bf16"):
            loss = self.engine(batch, mode="loss", weights=self.job.config.losses)["loss"]
        self.engine.backward(loss)
        self.engine.step()


STAGE: Stage = "specialist"  # of part path: the stage that trains most and has no teachers, so the path weighs most


def path(data: str, folder: Path, recipe: str, steps: int) -> dict[str, Any]:
    """Turns: Ray, bare, Ray, bare. A turn of Ray goes on from the resume state of the one before."""
    length, found = steps // _TURNS + WARM_UP, {"ray": [], "bare": []}
    for turn in range(_TURNS):
        settings = [f"{STAGE}.steps={_TURNS * length}", f"{STAGE}.checkpoint_every=1000"]
        out = folder / "ray"
        train(STAGE, recipe, data, str(out), assignments=settings, threads=1, stop_after=length * (turn + 1))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        batch_size = get_recipe(recipe).stage(STAGE).batch_size
        found["ray"] += [batch_size / line["samples_per_s"] for line in lines[length * turn + WARM_UP :]]
        command = [sys.executable, __file__, "--bare", data, "--recipe", recipe, "--steps", str(length)]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        found["bare"] += json.loads(ended.stdout.splitlines()[-1])[WARM_UP:]
    ray, bare = (statistics.median(found[name]) for name in ("ray", "bare"))
    return {
        "ms_per_step": {"ray train and data path": round(1e3 * ray, 1), "bare deepspeed": round(1e3 * bare, 1)},
        "ray_over_bare": {"wall": round(ray / bare, 3)},
    }


def bare(data: str, recipe: str, steps: int) -> list[float]:
    """Seconds of each step over tensors in memory."""
    _alone()
    chosen = get_recipe(recipe)
    runner = Runner(TrainJob(STAGE, chosen.stage(STAGE), chosen.model, data, "unused", 0))
    batches = [runner.batch(step) for step in range(steps)]
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        runner.bare_step(batch)
        seconds.append(time.perf_counter() - started)
    return seconds


def padding(data: str, recipe: str) -> dict[str, Any]:
    """With the tokens of the recipe's own tokenizer, in stage dual."""
    chosen = get_recipe(recipe)
    config, rows = chosen.dual, TrainRows.load(data)
    counter = Runner(TrainJob(STAGE, chosen.stage(STAGE), chosen.model, data, "unused", 0))
    found = {}
    for bucket in (0, 4, 16, 64):
        lengths = rows.lengths(True) if bucket else {}
        sampler = Sampler(rows.counts, config.batch_size, config.multimodal_fraction, 0, bucket, lengths)
        real = positions = 0.0
        for step in range(64):
            samples = [rows.sample(d, r, chosen.model.horizon, True) for d, r in sampler.batch(step)]
            counts = counter.watch.counts(counter.processor.collate(samples, seed=0, step=step))
            real, positions = real + float(counts[3]), positions + float(counts[1])
        found[f"bucket_batches={bucket}"] = {
            "padding": round(1 - real / positions, 4),
            "positions_per_sample": round(positions / 64 / config.batch_size, 1),
        }
    return found


def _alone() -> None:
    """A group of this process only."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="distill,path,padding")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        print(json.dumps(bare(arguments.bare, arguments.recipe, arguments.steps)))
        return
    parts = arguments.only.split(",")
    folder = Path(tempfile.mkdtemp(prefix="dualvla-bench-"))
    try:
        data = str(folder / "data")
        make_data(data)
        result: dict[str, Any] = {}
        if "distill" in parts:
            make_checkpoints(data, folder, arguments.recipe)
        if "path" in parts:
            result["path"] = path(data, folder, arguments.recipe, arguments.steps)
        if {"distill", "padding"} & set(parts):
            _alone()
        if "distill" in parts:
            result["distill"] = distill(data, folder, arguments.recipe, arguments.steps)
        if "padding" in parts:
            result["padding"] = padding(data, arguments.recipe)
    finally:
        shutil.rmtree(folder)
    result["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": 1,
        "recipe": arguments.recipe,
        "load_average": round(os.getloadavg()[0], 1),
    }
    out = Path(arguments.out)
    held = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps(held | result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
