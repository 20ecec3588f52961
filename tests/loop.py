"""The training loop in processes of the test's own, without Ray: a group of workers that runs one job after another."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file

from dualvla.config import override
from dualvla.io import storage
from dualvla_pipelines.recipes import STAGES, get_recipe
from dualvla_pipelines.trainer import TrainJob

# The smallest model that goes the whole way, on 16 px images; four steps of eight samples, in fp32.
SMALL = [
    "model.image_size=16",
    *(
        f"{stage}.{key}"
        for stage in STAGES
        for key in ("steps=4", "batch_size=8", "multimodal_fraction=0.25", "checkpoint_every=2", "zero.dtype=fp32")
    ),
]
# What metrics.jsonl says of the machine, and of how workers share a batch.
OF_THE_MACHINE = ("samples_per_s", "tokens_per_s", "memory_gb", "mfu", "padding")


def make_job(stage: str, data: Any, out: Any, *settings: str, **changes: Any) -> TrainJob:
    recipe = override(get_recipe("debug"), [*SMALL, *settings])
    given = {"seed": 0, **{name: str(value) if isinstance(value, Path) else value for name, value in changes.items()}}
    return TrainJob(stage=stage, config=recipe.stage(stage), model=recipe.model, data=str(data), out=str(out), **given)


def train(*jobs: TrainJob, workers: int = 1, prepare: Callable[[], None] | None = None) -> list[int]:
    """Runs the jobs in turn in `workers` fresh processes. Returns the exit codes (negative: of which signal).

    prepare: called in each process first (a module's function; it may replace parts of the loop).
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        group = [
            context.Process(target=_worker, args=(rank, workers, f"{folder}/store", jobs, prepare))
            for rank in range(workers)
        ]
        try:
            for process in group:
                process.start()
            for process in group:
                process.join()
        finally:
            for process in group:
                process.kill()  # if the test was given up
    return [process.exitcode for process in group]


def _worker(rank: int, world: int, store: str, jobs: Sequence[TrainJob], prepare: Callable[[], None] | None) -> None:
    import torch.distributed as dist

    from dualvla_pipelines import trainer

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    if prepare is not None:
        prepare()
    for job in jobs:
        if "://" not in job.out:
            Path(job.out).mkdir(parents=True, exist_ok=True)
        trainer.train(job)
    dist.destroy_process_group()


def spoil_step_two() -> None:
    """Of the first worker: not a number among its actions."""
    import torch.distributed as dist

    from dualvla.models.processing import Processor

    collate = Processor.collate

    def spoilt(self: Processor, samples: Any, seed: int, step: Any, train: bool = True) -> Any:
        batch = collate(self, samples, seed, step, train)
        if step == 1 and dist.get_rank() == 0:
            batch["actions"][0] = torch.nan
        return batch

    Processor.collate = spoilt


def die_while_saving(moment: str) -> None:
    """SIGKILL of this worker, at a moment of the second save: with half a file written, or with all of them and no
    record."""
    from dualvla_pipelines import resume, trainer

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    saves = 0
    save = trainer._save

    def counted(*arguments: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 2:
            arm()
        save(*arguments)

    def arm() -> None:
        if moment == "half a file":

            def half(state: Any, path: Path) -> None:
                save_file(state, path)
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                die()

            trainer.save_file = half
        else:
            assert moment == "no record"
            resume.commit = lambda *_: die()

    trainer._save = counted


def lines(folder: Any, but: Sequence[str] = OF_THE_MACHINE) -> list[dict[str, float]]:
    """metrics.jsonl, without what is said `but`."""
    found = [json.loads(line) for line in storage.read_bytes(f"{folder}/metrics.jsonl").splitlines()]
    return [{name: value for name, value in line.items() if name not in but} for line in found]


def weights(folder: Any) -> dict[str, torch.Tensor]:
    return load(storage.read_bytes(f"{folder}/model.safetensors"))


def same_weights(ours: Any, theirs: Any) -> bool:
    """Bit by bit."""
    a, b = weights(ours), weights(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
