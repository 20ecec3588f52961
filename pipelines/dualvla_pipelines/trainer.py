"""The training loop, as every worker of a torch.distributed group runs it. Knows nothing of Ray.

What is computed depends on (job, data) alone: the global batch of a step is keyed by (seed, step), every worker takes a
slice of it, and the denominators of all loss terms are summed over workers first, so that the mean of their losses is
the loss of the global batch exactly.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from dualvla.distill.cache import TeacherCache, load_cache
from dualvla.distill.facts import align_teacher
from dualvla.distill.remote import RemoteTeacher
from dualvla.distill.step import training_loss
from dualvla.distill.teachers import ActionTeacher, Aligned, Forward, ReasoningTeacher, Teacher, Teachers
from dualvla.errors import CheckpointError, TrainingError
from dualvla.io import storage
from dualvla.models.checkpoint import load_config, load_model, save_checkpoint
from dualvla.models.config import ModelConfig, thinking_as_often
from dualvla.models.processing import Processor, Sample
from dualvla.models.stages import apply_stage, prepare
from dualvla.models.vla import LOSS_TERMS, VLA, loss_counts
from dualvla.wire import teacher as wire
from dualvla_pipelines import resume, zero
from dualvla_pipelines.conflict import gradient_conflict
from dualvla_pipelines.fit import check_architecture, check_fit
from dualvla_pipelines.flops import elements
from dualvla_pipelines.recipes import Domain, Stage, TrainConfig
from dualvla_pipelines.record import Record
from dualvla_pipelines.samples import Sampler, TrainRows
from dualvla_pipelines.watch import Watch, by_domain

log = logging.getLogger(__name__)

T = TypeVar("T")

_STATE = "state"  # DeepSpeed's folder inside a resume state
_RESHAPED = ".reshaped"  # a resume state of another number of workers, on its way in
_NEARLY_FULL_BYTES = 1 << 20


@dataclass(frozen=True)
class TrainJob:
    """One run of `dualvla train`, as every worker gets it. Folders are absolute.

    init: the checkpoint that training starts from. action_teacher, reasoning_teacher (None: init): of the dual stage,
    checkpoints or the addresses of served ones. teacher_cache: what both have said, read instead of asking them at
    every step. teacher_actors: domain -> names of the Ray actors that hold its teacher, for all workers to ask; a
    teacher without any is held by every worker. stop_after: leave the run resumable after this step. threads: of
    PyTorch, a worker. trackers: settings of `dualvla.io.tracking`.
    """

    stage: Stage
    config: TrainConfig
    model: ModelConfig
    data: str
    out: str
    seed: int
    init: str | None = None
    action_teacher: str | None = None
    reasoning_teacher: str | None = None
    teacher_cache: str | None = None
    teacher_actors: Mapping[Domain, Sequence[str]] = field(default_factory=dict)
    stop_after: int | None = None
    threads: int = 1
    trackers: tuple[str, ...] = ()

    @property
    def teachers(self) -> dict[Domain, str]:
        """Of the dual stage: where those lie or are served that its losses ask."""
        assert self.action_teacher is not None
        assert self.init is not None
        both: dict[Domain, str] = {"robot": self.action_teacher, "multimodal": self.reasoning_teacher or self.init}
        return {domain: both[domain] for domain in self.config.taught}

    @property
    def last_step(self) -> int:
        return min(self.config.steps, self.stop_after or self.config.steps)


def train(job: TrainJob) -> None:
    """Trains `job` to its end, or to `stop_after`, going on from the newest resume state. Collective.

    Raises: CheckpointError if the model does not fit the data, TrainingError if a loss or its gradient is not finite,
    StorageError or OutputError if what was trained cannot be kept.
    """
    torch.set_num_threads(job.threads)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's own calls
    rank, world = dist.get_rank(), dist.get_world_size()
    if dist.get_backend() == "nccl":  # as DeepSpeed does, but workers talk before it starts
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rows = TrainRows.load(job.data)
    model, processor, model_config = build(job, rows)
    apply_stage(model, job.stage, model_config)
    micro_batches = job.config.micro_batches(world)
    with tempfile.TemporaryDirectory(prefix="dualvla-") as scratch:
        found = _newest_state(job, Path(scratch))
        reshaped = found is not None and found.saved.facts["workers"] != world
        engine = zero.initialize(model, job.config, micro_batches, universal=reshaped)
        engine.train()  # a model that was loaded is in eval mode
        averages = zero.Averages(engine, job.config.ema_decay)
        if found is not None:
            _restore(job, engine, averages, found, Path(scratch))
    teachers = load_teachers(job, engine.device)
    sampler = make_sampler(job, rows)

    first, skipped = (found.saved.step, found.saved.facts.get("skipped", 0)) if found is not None else (0, 0)
    watch = Watch(engine.module, job.config, engine.device)

    def make(step: int) -> tuple[dict[str, Tensor], list[int]]:
        samples = [
            rows.sample(domain, row, model_config.horizon, job.config.use_reasoning)
            for domain, row in sampler.batch(step)[rank::world]
        ]
        return _collate(processor, samples, teachers, job.seed, step), [sample.key for sample in samples]

    with _record(job, first) or contextlib.nullcontext() as record:
        started = time.perf_counter()
        for step, (batch, keys) in _batches(make, first, job.last_step, engine.device):
            batch = _on(engine.device, batch)
            metrics, counts = _step(engine, batch, micro_batches, teachers, job, step, watch)
            if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
                averages.update(step)
            elif job.config.on_bad_loss == "stop":
                _give_up(job, step, metrics, batch, keys)
            else:
                skipped += 1
                log.warning("step %d: a loss or gradient is not finite: skipped, %d so far", step + 1, skipped)
            if job.config.on_bad_loss == "skip":
                metrics["skipped"] = skipped
            if record is not None:
                figures = watch.figures(counts, time.perf_counter() - started)
                record.add({"step": step + 1, **metrics, **by_domain(metrics, job.config.losses), **figures})
            if (step + 1) % job.config.checkpoint_every == 0 or step + 1 == job.last_step:
                if record is not None:
                    record.settle()
                _save(job, engine, averages, step + 1, skipped)
            started = time.perf_counter()
    if job.last_step == job.config.steps:
        _export(job, engine, averages, processor, model_config, rows)
    engine.destroy()


def _batches(make: Callable[[int], T], first: int, last: int, device: torch.device) -> Iterator[tuple[int, T]]:
    """(step, make(step)) of steps [first, last). Beside an accelerator each is made in a thread while the one before is
    used; where processors compute, a thread takes twice its own time from the step that it shares the interpreter with.
    """
    if device.type == "cpu":
        yield from ((step, make(step)) for step in range(first, last))
        return
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        following = pool.submit(make, first) if first < last else None
        for step in range(first, last):
            assert following is not None
            made = following.result()
            following = pool.submit(make, step + 1) if step + 1 < last else None
            yield step, made


def make_sampler(job: TrainJob, rows: TrainRows) -> Sampler:
    config = job.config
    lengths = rows.lengths(config.use_reasoning) if config.bucket_batches > 1 else {}
    return Sampler(rows.counts, config.batch_size, config.multimodal_fraction, job.seed, config.bucket_batches, lengths)


def build(job: TrainJob, rows: TrainRows) -> tuple[VLA, Processor, ModelConfig]:
    """The model of the stage: from `job.init`, or new, with a processor fitted on the data. Equal on all workers."""
    if job.init is not None:
        model, processor, config = load_model(job.init, stage=job.stage, seed=job.seed, like=job.model)
        check_architecture(config, prepare(job.model, job.stage), job.init)
        check_fit(config, rows.facts, job.data)
        return model, processor, config
    config = prepare(job.model, job.stage)
    check_fit(config, rows.facts, job.data)
    processor = Processor.fit(
        config, texts=rows.texts(), actions=rows.actions, proprios=rows.proprio, positions=rows.target_positions()
    )
    model = VLA.create(config, processor, seed=job.seed)
    return model, processor, model.config


def load_teachers(job: TrainJob, device: torch.device) -> Teacher | None:
    """The specialist, and a copy of what the student starts from: frozen models outside ZeRO, or what a cache holds.

    None but in "dual". Raises: CheckpointError for a teacher that cannot teach, DataError for a stale cache.
    """
    if job.stage != "dual":
        return None
    assert job.action_teacher is not None
    assert job.init is not None
    config = load_config(job.init)
    student = Processor.load(job.init, config)
    sources, temperature = job.teachers, job.config.losses.temperature
    if job.teacher_cache is not None:
        return load_cache(job.teacher_cache, teachers=sources, student=student, config=config, temperature=temperature)
    found = {domain: _teacher(job, domain, source, student, device) for domain, source in sources.items()}
    return Teachers(action=found.get("robot"), reasoning=found.get("multimodal"))


def _teacher(job: TrainJob, domain: Domain, source: str, student: Processor, device: torch.device) -> Teacher:
    """source: a checkpoint folder, or the address of one that is served elsewhere."""
    if source.startswith(wire.SCHEMES):
        return RemoteTeacher(source, domain, student, temperature=job.config.losses.temperature)
    config = load_config(source)
    mapping = align_teacher(config, Processor.load(source, config), student, source)
    model = _frozen(job, domain, source, device)
    asked = model if mapping is None else Aligned(model, mapping)
    return ActionTeacher(asked) if domain == "robot" else ReasoningTeacher(asked)


def _frozen(job: TrainJob, domain: Domain, source: str, device: torch.device) -> Forward:
    """The teacher's model: in this process, or behind actors."""
    if domain in job.teacher_actors:
        from dualvla_pipelines.teacher_actors import ActorForward  # loads Ray

        return ActorForward(job.teacher_actors[domain], first=dist.get_rank())
    model, _, _ = load_model(source)
    return model.eval().requires_grad_(False).to(device)


def _collate(
    processor: Processor, samples: list[Sample], teachers: Teacher | None, seed: int, step: int
) -> dict[str, Tensor]:
    """The batch of a step, in views that the cache holds if there is one."""
    if isinstance(teachers, TeacherCache):
        return teachers.collate(processor, samples, seed, step)
    return processor.collate(samples, seed=seed, step=step)


def _on(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _step(
    engine: Any,
    batch: dict[str, Tensor],
    micro_batches: int,
    teachers: Teacher | None,
    job: TrainJob,
    step: int,
    watch: Watch,
) -> tuple[dict[str, float], Tensor]:
    """One optimiser step on this worker's samples. Returns the global batch's metrics, and its counts of `watch`."""
    parts = _split(batch, micro_batches)
    summed = torch.cat([loss_counts(batch), watch.counts(batch)])
    dist.all_reduce(summed)
    counts, watched = summed[: len(LOSS_TERMS)], summed[len(LOSS_TERMS) :]
    counts /= dist.get_world_size() * micro_batches
    conflict: dict[str, float] = {}
    if job.config.conflict_every and step % job.config.conflict_every == 0:
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=job.config.zero.dtype == "bf16"):
            targets = teachers.targets(parts[0]) if teachers is not None else {}
            conflict = gradient_conflict(engine.module, parts[0], counts, job.config.losses, targets)
    torch.manual_seed(hash((job.seed, step, dist.get_rank())))  # dropout: a resumed step repeats the one that was lost
    lr = zero.learning_rate(step, job.config)
    zero.set_learning_rate(engine, lr)
    totals: dict[str, Tensor] = {}
    for part in parts:
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=job.config.zero.dtype == "bf16"):
            out = training_loss(engine, part, counts=counts, weights=job.config.losses, teachers=teachers)
        engine.backward(out["loss"])
        engine.step()
        for name, value in out.items():
            totals[name] = totals.get(name, 0.0) + value.detach().float() / micro_batches
    names = sorted(totals)
    values = torch.stack([totals[name] for name in names])
    dist.all_reduce(values)
    metrics = dict(zip(names, (values / dist.get_world_size()).tolist(), strict=True))
    return metrics | conflict | {"lr": lr, "grad_norm": float(engine.get_global_grad_norm() or 0.0)}, watched


def _give_up(job: TrainJob, step: int, metrics: dict[str, float], batch: dict[str, Tensor], keys: list[int]) -> None:
    """Keeps this worker's share of the batch for whoever looks into it, and stops. Raises: TrainingError."""
    folder = storage.join(job.out, "failed")
    kept = save({n: t.contiguous() for n, t in batch.items()}, metadata={"rows": json.dumps(keys)})
    storage.write_bytes(storage.join(folder, f"step-{step + 1:08d}-rank-{dist.get_rank()}.safetensors"), kept)
    dist.barrier()
    terms = ", ".join(f"{name} {value}" for name, value in metrics.items())
    raise TrainingError(
        f"The loss of step {step + 1}, or its gradient, is not finite ({terms}).",
        f"lower lr, look at the batch and its row numbers in '{folder}', or set on_bad_loss=skip",
    )


def _split(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """`parts` slices of every tensor, taken crosswise so that each holds robot samples and questions alike."""
    return [{name: tensor[i::parts] for name, tensor in batch.items()} for i in range(parts)]


def _record(job: TrainJob, first: int) -> Record | None:
    """The first worker's; the others write nothing down."""
    if dist.get_rank() != 0:
        return None
    return Record(job.out, first, job.trackers, run=os.path.basename(job.out.rstrip("/")))


def _resume_root(job: TrainJob) -> str:
    return storage.join(job.out, "resume")


def _worker_of(name: str) -> int | None:
    """The worker that a file of a resume state belongs to; None: it is written by the first, and read by all."""
    match = re.search(r"(?:zero_pp_rank_|averages-)(\d+)", name)
    return int(match[1]) if match else None


def _save(job: TrainJob, engine: Any, averages: zero.Averages, step: int, skipped: int) -> None:
    """Every worker brings its own files; the state exists once all of them have."""
    root, rank, world = _resume_root(job), dist.get_rank(), dist.get_world_size()
    url = [resume.open_new(root, step) if rank == 0 else ""]
    dist.broadcast_object_list(url)
    with _folder_for(url[0]) as folder:
        with storage.writing(root):
            _save_engine(engine, folder)
            save_file(averages.state(), folder / f"averages-{rank}.safetensors")
        dist.barrier()  # on a shared disk, what another worker is writing would be seen half done
        own = resume.put(folder, url[0], lambda name: (_worker_of(name) or 0) == rank)
    written: list[Any] = [None] * world
    dist.all_gather_object(written, own)
    if rank == 0:
        files = {name: digest for part in written for name, digest in part.items()}
        resume.commit(url[0], step, files, {"workers": world, "skipped": skipped}, job.config.keep_checkpoints)
    dist.barrier()


@contextlib.contextmanager
def _folder_for(url: str) -> Iterator[Path]:
    """Where a worker writes what goes to `url`: there, or on its own disk first."""
    if storage.is_local(url):
        yield Path(url)
        return
    with tempfile.TemporaryDirectory(prefix="dualvla-") as folder:
        yield Path(folder)


def _save_engine(engine: Any, folder: Path) -> None:
    try:
        engine.save_checkpoint(str(folder), tag=_STATE)
    except RuntimeError as error:  # what torch.save makes of a full disk
        if shutil.disk_usage(folder).free < _NEARLY_FULL_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


@dataclass(frozen=True)
class _Found:
    """A resume state, and the folder on this machine that holds what this worker needs of it."""

    saved: resume.Saved
    folder: Path


def _newest_state(job: TrainJob, scratch: Path) -> _Found | None:
    """The newest state that is whole for every worker, or None. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    listed: list[Any] = [None]
    if rank == 0:
        resume.discard_unfinished(_resume_root(job))
        listed = [resume.states(_resume_root(job))]
    dist.broadcast_object_list(listed)
    for saved in listed[0]:
        others = set() if saved.facts["workers"] == world else set(range(saved.facts["workers"]))
        wanted = [name for name in saved.files if _worker_of(name) in {rank, None} | others]
        folder = resume.get(saved, wanted, scratch / f"step-{saved.step}")
        whole: list[Any] = [None] * world
        dist.all_gather_object(whole, folder is not None)
        if folder is not None and all(whole):
            return _Found(saved, folder)
    return None


def _restore(job: TrainJob, engine: Any, averages: zero.Averages, found: _Found, scratch: Path) -> None:
    """Loads a resume state, whatever number of workers wrote it."""
    writers, world, rank = found.saved.facts["workers"], dist.get_world_size(), dist.get_rank()
    if writers == world:
        engine.load_checkpoint(str(found.folder), tag=_STATE)
        averages.load([load_file(found.folder / f"averages-{rank}.safetensors")], 0)
    else:
        if job.config.zero.stage != 3:
            raise CheckpointError(
                f"'{found.saved.url}' was written by {writers} workers, not {world}.",
                f"go on with --workers {writers}; with zero.stage=3 any number could",
            )
        _load_reshaped(engine, found, scratch)
        averages.load([load_file(found.folder / f"averages-{writer}.safetensors") for writer in range(writers)], rank)
    log.info("resuming after step %d", found.saved.step)


def _load_reshaped(engine: Any, found: _Found, scratch: Path) -> None:
    """Rewritten once where all workers see the state's folder, else by each for itself."""
    shared = storage.is_local(found.saved.url)
    folder = (found.folder.parent if shared else scratch) / _RESHAPED
    first = dist.get_rank() == 0
    if first or not shared:
        shutil.rmtree(folder, ignore_errors=True)
        zero.universal_state(str(found.folder / _STATE), str(folder / _STATE))
    dist.barrier()
    zero.load_universal_state(engine, str(folder), _STATE)
    dist.barrier()
    if first and shared:
        shutil.rmtree(folder)


def _export(
    job: TrainJob,
    engine: Any,
    averages: zero.Averages,
    processor: Processor,
    model_config: ModelConfig,
    rows: TrainRows,
) -> None:
    """The policy: averaged weights, configuration, processor and model card, straight in `job.out`."""
    with averages.in_place() if job.config.ema_decay else contextlib.nullcontext():
        state = zero.whole_weights(engine)
    if dist.get_rank() == 0:
        trained = sum(elements(p) for p in engine.module.parameters() if p.requires_grad)
        config = job.config
        facts = {
            "stage": job.stage,
            "trained parameters": f"{trained / 1e6:.2f} M",
            "training": f"{config.steps} steps of {config.batch_size} samples, lr {config.lr:g}, seed {job.seed}",
            "data": f"{rows.counts['robot']} robot steps, {rows.counts['multimodal']} questions",
        }
        if config.use_reasoning:
            model_config = thinking_as_often(model_config, rows.keep_ratio)
        save_checkpoint(job.out, state, model_config, processor, facts)
    dist.barrier()
