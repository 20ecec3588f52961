"""`dualvla teach`: the teachers of a data set's training rows, asked once by Ray Data, into a teacher cache.

Work is cut into parts of rows; every part is a file that appears whole, so an interrupted run goes on with the parts
that lack. What an entry says depends on its sample, its teacher and the settings alone, never on its part or worker.
Ray Data carries the names of parts to a pool of actors, each of which holds a teacher and writes whole parts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from dualvla import console
from dualvla.distill import cache, topk
from dualvla.distill.cache import KIND, PARTS, TEACHER_OF, CacheSettings, Domain
from dualvla.distill.facts import TeacherFacts, check_teacher
from dualvla.errors import UsageError
from dualvla.io import dataset, manifest, storage
from dualvla.models.checkpoint import load_config, load_model
from dualvla.models.config import ModelConfig
from dualvla.models.processing import Processor
from dualvla_pipelines import ray_parts
from dualvla_pipelines.fit import check_fit
from dualvla_pipelines.ray_parts import Workers
from dualvla_pipelines.samples import TrainRows

log = logging.getLogger(__name__)

_SAMPLES_PER_PART = 512
_SAMPLES_AT_ONCE = 32
_MUCH_TAIL = 0.005


@dataclass(frozen=True)
class TeachJob:
    """What a worker needs to know. teachers: domain -> checkpoint folder. samples_per_part: rows of a part."""

    data: str
    out: str
    teachers: Mapping[Domain, str]
    settings: CacheSettings
    samples_per_part: int


class PartTeacher:
    """Holds the rows, and one teacher at a time."""

    def __init__(self, job: TeachJob, device: str = "cpu"):
        self._job, self._device, self._rows = job, device, TrainRows.load(job.data)
        self._teacher: tuple[Domain, Any, Processor, ModelConfig] | None = None

    def __call__(self, name: str) -> int:
        """Writes the part "domain/first row"; returns how many samples are in it."""
        domain, start = _read(name)
        if self._teacher is None or self._teacher[0] != domain:
            self._teacher = None  # frees the old one before the new one is loaded
            model, processor, config = load_model(self._job.teachers[domain])
            self._teacher = (domain, model.to(self._device), processor, config)
        rows = range(start, min(start + self._job.samples_per_part, self._rows.counts[domain]))
        entries = [
            self._entries(domain, list(rows[i : i + _SAMPLES_AT_ONCE]), view)
            for view in range(self._job.settings.views)
            for i in range(0, len(rows), _SAMPLES_AT_ONCE)
        ]
        cache.write_part(cache.part_url(self._job.out, domain, start), entries)
        return len(rows)

    @torch.inference_mode()
    def _entries(self, domain: Domain, rows: list[int], view: int) -> cache.Entries:
        assert self._teacher is not None
        _, model, processor, config = self._teacher
        samples = [self._rows.sample(domain, row, config.horizon, with_reasoning=False) for row in rows]
        batch = cache.collate(processor, samples, [view] * len(rows), self._job.settings)
        on_device = {name: tensor.to(self._device) for name, tensor in batch.items()}
        if domain == "robot":
            (predicted,) = model(on_device, mode="action").values()
            return cache.action_entries(batch, predicted)
        return cache.reasoning_entries(batch, model(on_device, mode="logits")["logits"], self._job.settings)


def teach(
    data: str,
    out: str,
    *,
    action_teacher: str | None = None,
    reasoning_teacher: str | None = None,
    settings: CacheSettings | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Fills the cache folder `out`, going on where an earlier call was interrupted. Returns its facts.

    At least one teacher. Raises: UsageError, DataError, CheckpointError, OutputError for what the user can mend.
    """
    settings = settings or CacheSettings()
    given: dict[Domain, str | None] = {"robot": action_teacher, "multimodal": reasoning_teacher}
    teachers = {domain: folder for domain, folder in given.items() if folder is not None}
    if not teachers:
        raise UsageError("No teacher was given.", "pass --action-teacher, --reasoning-teacher, or both")
    facts = check_teachers(teachers, data, settings)
    inputs = manifest.input_digests({"data": data, **{TEACHER_OF[d]: folder for d, folder in teachers.items()}})
    config = cache.settings_of(settings, facts)
    if not manifest.begin(out, KIND, config, inputs):
        return {**manifest.require(out, KIND)["facts"], "out": out, "skipped": True}

    counts, size = TrainRows.load(data).counts, _SAMPLES_PER_PART
    parts = {f"{d}/{i}": min(size, counts[d] - i) for d in teachers for i in range(0, counts[d], size)}
    _fill(TeachJob(data, out, teachers, settings, size), parts, Workers(workers))
    urls = {name: cache.part_url(out, *_read(name)) for name in parts}
    files = {f"{PARTS[_read(name)[0]]}/{u.rsplit('/', 1)[-1]}": manifest.file_digest(u) for name, u in urls.items()}
    found = {domain: _measure(out, domain, files, settings, facts[domain]) for domain in teachers}
    manifest.finish(out, KIND, config, inputs, files=files, facts=found)
    return {**manifest.require(out, KIND)["facts"], "out": out, "skipped": False}


def check_teachers(teachers: Mapping[Domain, str], data: str, settings: CacheSettings) -> dict[Domain, TeacherFacts]:
    """What each teacher's targets are, after looking whether all fit the data and each other."""
    found: dict[Domain, TeacherFacts] = {}
    rows = TrainRows.load(data, sample=True)
    first: Processor | None = None
    for domain, folder in teachers.items():
        manifest.require(folder, "checkpoint")
        config = load_config(folder)
        processor = Processor.load(folder, config)
        check_fit(config, rows.facts, data)
        first = first or processor
        check_teacher(config, processor, first, folder)
        found[domain] = TeacherFacts.of(config, processor, manifest.input_digests({"": folder})[""], domain)
    if "multimodal" in found and settings.top_k >= found["multimodal"].shape[0]:
        raise UsageError(
            f"--top-k {settings.top_k} of a vocabulary of {found['multimodal'].shape[0]}.", "pass a smaller number"
        )
    return found


def _fill(job: TeachJob, parts: Mapping[str, int], workers: Workers) -> None:
    """Writes those of the parts that lack. parts: name -> samples."""
    pending = [name for name in parts if not storage.exists(cache.part_url(job.out, *_read(name)))]
    if not pending:
        return
    total, left = sum(parts.values()), sum(parts[name] for name in pending)
    with console.progress("teach", total, total - left) as advance:
        for _, written in ray_parts.run("teach", partial(PartTeacher, job), pending, workers, learned=True):
            advance(written)


def _read(name: str) -> tuple[Domain, int]:
    domain, start = name.split("/")
    return cast(Domain, domain), int(start)


def _measure(
    out: str, domain: Domain, files: Mapping[str, str], settings: CacheSettings, facts: TeacherFacts
) -> dict[str, Any]:
    """Entries and bytes; of reasoning also the mass that lies outside the likeliest tokens."""
    names = [name for name in files if name.startswith(PARTS[domain])]
    urls = [storage.join(out, name) for name in names]
    stored = sum(storage.size_bytes(url) for url in urls)
    entries, tails = 0, []
    for url in urls:
        table = dataset.read_table(url)
        entries += len(table)
        if domain == "multimodal":
            tails += [topk.tail_of(cell, settings.packed) for cell in table["tail"].to_pylist()]
    found = {"entries": entries, "bytes": stored}
    if not tails:
        return found
    tail = np.concatenate(tails)
    if settings.tail_draws == 0 and tail.mean() > _MUCH_TAIL:
        log.warning(
            "%.1f %% of the reasoning teacher's mass lies outside its %d likeliest tokens at temperature %g: a cached "
            "divergence leaves that out. --tail-draws 8 estimates it.",
            100 * tail.mean(), settings.top_k, settings.temperature,
        )  # fmt: skip
    return {
        **found,
        "tokens": len(tail),
        "bytes_per_token": topk.bytes_per_token(settings.top_k, settings.tail_draws, facts.shape[0], settings.packed),
        "stored_bytes_per_token": round(stored / len(tail), 1),
        "tail_mass": float(tail.mean()),
    }


def render(result: Mapping[str, Any]) -> str:
    """For a person: what the cache holds, and how large it is."""
    lines = [f"teacher cache {'already there' if result['skipped'] else 'finished'}: {result['out']}"]
    for domain in PARTS:
        if domain in result:
            found = result[domain]
            line = f"{PARTS[domain]}: {found['entries']} entries, {found['bytes'] / 2**20:.1f} MiB"
            if "tokens" in found:
                line += (
                    f", {found['tokens']} tokens of {found['bytes_per_token']} bytes "
                    f"({found['stored_bytes_per_token']} stored), {found['tail_mass']:.2%} of the mass in the tail"
                )
            lines.append(line)
    return "\n".join(lines)
