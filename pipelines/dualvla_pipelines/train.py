"""`dualvla train`: checks its inputs, claims the output folder, has the loop run, and finishes the folder.

Workers write straight into the output folder (an object store, a shared disk, or a local one for one machine), so a
dead driver, a dead worker and Ctrl-C all leave the same thing behind: the last resume state, from which the same
command goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualvla.config import override, to_dict
from dualvla.errors import UsageError
from dualvla.io import manifest, storage
from dualvla.io.tracking import check_tracker
from dualvla.models.config import ModelConfig
from dualvla.wire.teacher import SCHEMES
from dualvla_pipelines.recipes import STAGES, Domain, Stage, TrainConfig, get_recipe
from dualvla_pipelines.record import METRICS, tracker_settings

KIND = "checkpoint"


def train(
    stage: Stage,
    recipe: str,
    data: str,
    out: str,
    *,
    init: str | None = None,
    action_teacher: str | None = None,
    reasoning_teacher: str | None = None,
    teacher_cache: str | None = None,
    teacher_actors: int = 0,
    workers: int = 1,
    threads: int | None = None,
    gpus: float | None = None,
    seed: int = 0,
    assignments: Sequence[str] = (),
    stop_after: int | None = None,
    track: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Trains one stage of a recipe into the checkpoint folder `out`; goes on where an earlier call was interrupted.

    workers: ZeRO shards, each a process with `threads` PyTorch threads (default: this machine's cores shared out) and
    `gpus` GPUs (default: one where the cluster has one for each, else none). teacher_actors: Ray actors of
    each teacher that is a checkpoint, which all workers ask (0: every worker holds its own).
    stop_after: end after this step, resumable. track: trackers (`dualvla.io.tracking`) that get the figures too;
    default: TensorBoard's files in `out`/tensorboard; "none": no tracker.
    Raises: UsageError, DataError, CheckpointError, OutputError, PlatformError for what the user can mend; StorageError;
    TrainingError.
    """
    chosen = override(get_recipe(recipe), assignments)
    config = chosen.stage(stage)
    config.micro_batches(workers)
    _check_inputs(stage, init, action_teacher, reasoning_teacher, teacher_cache)
    if teacher_actors and (stage != "dual" or teacher_cache is not None):
        raise UsageError(
            "--teacher-actors without online teachers.", "leave it to stage 'dual', and out beside --teacher-cache"
        )
    out = _absolute(out)
    trackers = tracker_settings(track, out)
    for setting in trackers:
        check_tracker(setting)
    teachers = {"action_teacher": action_teacher, "reasoning_teacher": reasoning_teacher}
    folders = {"data": data, "init": init, **teachers, "teacher_cache": teacher_cache}
    everything = {name: _absolute(folder) for name, folder in folders.items() if folder is not None}
    remote = {name: url for name, url in everything.items() if name in teachers and url.startswith(SCHEMES)}
    given = {name: folder for name, folder in everything.items() if name not in remote}
    for name in given.keys() & {"init", *teachers}:
        manifest.require(given[name], KIND)
    if manifest.read(out) is None:
        _check_fit(stage, chosen.model, given)
        _check_cache(config, given)
    key = {"stage": stage, "train": to_dict(config), "model": to_dict(chosen.model), "seed": seed}
    inputs = manifest.input_digests(given) | _served(given, remote)
    result = {"stage": stage, "out": out, "steps": config.steps}
    if not manifest.begin(out, KIND, key, inputs):
        return {**result, "skipped": True, "last": _last_metrics(out)}

    from dualvla_pipelines import launch
    from dualvla_pipelines.trainer import TrainJob

    job = TrainJob(
        stage=stage,
        config=config,
        model=chosen.model,
        out=out,
        seed=seed,
        stop_after=stop_after,
        threads=threads or max(1, (os.cpu_count() or 1) // workers),
        trackers=trackers,
        data=given["data"],
        init=given.get("init"),
        action_teacher=everything.get("action_teacher"),
        reasoning_teacher=everything.get("reasoning_teacher"),
        teacher_cache=given.get("teacher_cache"),
    )
    launch.run(job, workers, gpus, teacher_actors)
    if stop_after is not None and stop_after < config.steps:
        return {**result, "skipped": False, "finished": False, "last": _last_metrics(out)}
    storage.remove_tree(storage.join(out, "resume"))
    files = {Path(url).name: manifest.file_digest(url) for url in storage.list_files(out) if _is_output(url)}
    manifest.finish(out, KIND, key, inputs, files=files, steps=config.steps)
    return {**result, "skipped": False, "finished": True, "last": _last_metrics(out)}


def render(result: dict[str, Any]) -> str:
    """For a person: where the checkpoint is, and the last losses."""
    state = "already there" if result["skipped"] else "finished" if result["finished"] else "stopped, resumable"
    losses = ", ".join(f"{k} {v:.4g}" for k, v in (result["last"] or {}).items())
    return f"{result['stage']}: {state}: {result['out']}\n{losses}"


def _check_inputs(
    stage: Stage,
    init: str | None,
    action_teacher: str | None,
    reasoning_teacher: str | None,
    teacher_cache: str | None,
) -> None:
    if stage != "specialist" and init is None:
        previous = STAGES[STAGES.index(stage) - 1]
        raise UsageError(f"Stage '{stage}' needs --init.", f"pass the checkpoint of stage '{previous}'")
    if (stage == "dual") != (action_teacher is not None):
        raise UsageError(
            "Stage 'dual' needs --action-teacher." if stage == "dual" else f"Stage '{stage}' has no action teacher.",
            "pass the specialist's checkpoint to stage 'dual', and to no other",
        )
    if stage != "dual" and (teacher_cache is not None or reasoning_teacher is not None):
        raise UsageError(
            f"Stage '{stage}' has no teachers.", "leave --teacher-cache and --reasoning-teacher to stage 'dual'"
        )
    for teacher in (action_teacher, reasoning_teacher):
        if teacher_cache is not None and teacher is not None and teacher.startswith(SCHEMES):
            raise UsageError(
                f"A teacher cache beside the served teacher {teacher}.", "pass the checkpoint that the cache is of"
            )


def _served(folders: Mapping[str, str], remote: Mapping[str, str]) -> dict[str, str]:
    """Input name -> digest of the checkpoint that is served there, after looking whether it can teach."""
    if not remote:
        return {}
    from dualvla.distill.remote import RemoteTeacher
    from dualvla.models.checkpoint import load_config
    from dualvla.models.processing import Processor

    student = Processor.load(folders["init"], load_config(folders["init"]))
    found = {}
    for name, url in remote.items():
        teacher = RemoteTeacher(url, "robot" if name == "action_teacher" else "multimodal", student)
        teacher.close()
        found[name] = teacher.checkpoint
    return found


def _check_fit(stage: Stage, model: ModelConfig, folders: Mapping[str, str]) -> None:
    """What workers would find out later, before anything is claimed or started."""
    from dualvla.models.checkpoint import load_config
    from dualvla.models.stages import prepare
    from dualvla_pipelines.fit import check_architecture, check_fit
    from dualvla_pipelines.samples import TrainRows

    check_fit(model, TrainRows.load(folders["data"], sample=True).facts, folders["data"])
    for name in folders.keys() & {"init", "action_teacher", "reasoning_teacher"}:
        check_architecture(prepare(load_config(folders[name]), stage), prepare(model, stage), folders[name])


def _check_cache(config: TrainConfig, folders: Mapping[str, str]) -> None:
    if "teacher_cache" not in folders:
        return
    from dualvla.distill.cache import load_cache
    from dualvla.models.checkpoint import load_config
    from dualvla.models.processing import Processor

    reasoning = folders["reasoning_teacher" if "reasoning_teacher" in folders else "init"]
    both: dict[Domain, str] = {"robot": folders["action_teacher"], "multimodal": reasoning}
    model = load_config(folders["init"])
    load_cache(
        folders["teacher_cache"],
        teachers={domain: both[domain] for domain in config.taught},
        student=Processor.load(folders["init"], model),
        config=model,
        temperature=config.losses.temperature,
    )


def _is_output(url: str) -> bool:
    return Path(url).name not in (manifest.NAME, manifest.STARTED)


def _absolute(folder: str) -> str:
    return os.path.abspath(folder) if storage.is_local(folder) else folder.rstrip("/")


def _last_metrics(out: str) -> dict[str, float] | None:
    url = storage.join(out, METRICS)
    lines = storage.read_bytes(url).splitlines() if storage.exists(url) else []
    return json.loads(lines[-1]) if lines else None
