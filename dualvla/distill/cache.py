"""The teacher cache: what the teachers of Eq. 5 and 6 say, written once and read by every epoch.

It holds `views` of every sample: one (colour jitter, tau, noise) each, keyed by (seed, sample, view), so that training
on a view gives the loss that the teachers themselves would, up to the top-k error and the rounding of float16. Every
entry carries a fingerprint of the sample it was made from: an entry of another sample is refused, never used.

    actions/part-*.parquet    key, view, sample, values: float16 velocities [K, H, D] or bin logits [H, D, bins]
    reasoning/part-*.parquet  key, view, sample, and `topk.encode` of every token of the answer and its end

Knows no model and no Ray.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dualvla.config import from_dict, to_dict
from dualvla.distill import topk
from dualvla.distill.facts import TeacherFacts
from dualvla.errors import DataError, UsageError
from dualvla.io import dataset, manifest, storage
from dualvla.models.config import ModelConfig
from dualvla.models.processing import Batch, Processor, Sample

KIND = "teacher-cache"
Domain = Literal["robot", "multimodal"]
PARTS: dict[Domain, str] = {"robot": "actions", "multimodal": "reasoning"}
TEACHER_OF: dict[Domain, str] = {"robot": "action_teacher", "multimodal": "reasoning_teacher"}

_FORMAT = 2  # of the cells; others are refused
_DRAWS = 1  # keeps their random numbers apart from those of `Processor.collate`
_ENTRY = [("key", pa.int64()), ("view", pa.int32()), ("sample", pa.int64())]


@dataclass(frozen=True)
class CacheSettings:
    """What a cache holds of every sample. top_k: entries a token, of which `tail_draws` are drawn from all but the
    likeliest. temperature: of the softened probabilities; training must use the same."""

    top_k: int = 50
    temperature: float = 2.0
    views: int = 4
    seed: int = 0
    packed: bool = False
    tail_draws: int = 8

    @property
    def likeliest(self) -> int:
        return self.top_k - self.tail_draws

    def __post_init__(self) -> None:
        limits = (("top_k", 1, topk.MAX_K), ("views", 1, 1 << 15), ("tail_draws", 0, self.top_k - 1))
        for name, low, high in limits:
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} = {getattr(self, name)}.", f"pass a number from {low} to {high}")


@dataclass(frozen=True)
class Entries:
    """One part's rows, in order of (key, view). values: column name -> one bytes value a row."""

    keys: np.ndarray
    views: np.ndarray
    samples: np.ndarray
    values: Mapping[str, Sequence[bytes]]


def fingerprint(sample: Sample) -> int:
    """64 bits of all that a teacher sees of a sample: not the reasoning of a robot step, which pruning changes."""
    digest = hashlib.blake2b(digest_size=8)
    texts = [sample.domain, sample.instruction, sample.reasoning if sample.domain == "multimodal" else None]
    digest.update(repr(texts).encode())
    for name in sorted(sample.images):
        digest.update(name.encode() + np.ascontiguousarray(sample.images[name]).tobytes())
    for array in (sample.proprio, sample.actions, sample.action_mask):
        digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def collate(processor: Processor, samples: Sequence[Sample], views: Sequence[int], settings: CacheSettings) -> Batch:
    """`Processor.collate` of samples each in one of its views, with the keys that the cache is read by.

    Beside it: key, view and sample (the fingerprint), int64 [B].
    """
    return {
        **processor.collate(samples, seed=settings.seed, step=views),
        "key": torch.tensor([s.key for s in samples]),
        "view": torch.tensor(list(views)),
        "sample": torch.tensor([fingerprint(s) for s in samples]),
    }


def action_entries(batch: Batch, predicted: Tensor) -> Entries:
    """predicted: velocities [B, K, H, D] or bin logits [B, H, D, bins] of an action teacher."""
    values = [row.numpy().astype("<f2").tobytes() for row in predicted.float().cpu()]
    return _entries(batch, {"values": values})


def reasoning_entries(batch: Batch, logits_BTV: Tensor, settings: CacheSettings) -> Entries:
    """logits: of a reasoning teacher, at every position of `batch["labels"]`. Keyed by (seed, sample, view)."""
    lengths = (batch["text_mask"].sum(dim=1) + 1).tolist()
    rows = []
    for logits_TV, n, key, view in zip(logits_BTV, lengths, batch["key"].tolist(), batch["view"].tolist(), strict=True):
        uniform = _places([settings.seed, key, view], n, settings.tail_draws).to(logits_TV.device)
        known = topk.know(logits_TV[:n], settings.likeliest, settings.temperature, uniform)
        rows.append(topk.encode(known, logits_TV.shape[-1], settings.packed))
    return _entries(batch, {name: [row[name] for row in rows] for name in rows[0]})


def _places(key: list[int], number: int, draws: int) -> Tensor:
    """[number, draws] in [0, 1), rising and evenly apart from a random start: nearly no draw comes twice."""
    starts = np.random.default_rng([*key, _DRAWS]).random((number, 1))
    return torch.from_numpy((starts + np.arange(draws)) / max(1, draws))


def _entries(batch: Batch, values: Mapping[str, Sequence[bytes]]) -> Entries:
    return Entries(batch["key"].numpy(), batch["view"].numpy(), batch["sample"].numpy(), values)


def write_part(url: str, parts: Sequence[Entries]) -> None:
    """Atomic; rows in order of (key, view)."""
    columns = [np.concatenate([getattr(p, name) for p in parts]) for name in ("keys", "views", "samples")]
    names = list(parts[0].values)
    schema = pa.schema([*_ENTRY, *((name, pa.binary()) for name in names)])
    values = [[cell for part in parts for cell in part.values[name]] for name in names]
    table = pa.table([*columns, *values], schema=schema).sort_by([("key", "ascending"), ("view", "ascending")])
    sink = io.BytesIO()
    # Without statistics, which would hold whole cells, and dictionaries: no two cells are equal.
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_statistics=False)
    storage.write_bytes(url, sink.getvalue())


def part_url(folder: str, domain: Domain, start: int) -> str:
    return storage.join(folder, PARTS[domain], f"part-{start:09d}.parquet")


class TeacherCache:
    """A finished cache folder, as a `Teacher`: its targets for batches that its own `collate` made."""

    def __init__(self, folder: str, domains: Sequence[Domain] | None = None):
        """domains: which teachers' entries are wanted (default: all that there are). They are read when first used.

        Raises: DataError if the folder is missing or unfinished, or holds no such entries.
        """
        self.folder = folder
        found = manifest.require(folder, KIND)
        if found["config"].get("format") != _FORMAT:
            raise DataError(f"The teacher cache '{folder}' was written by another version.", "make it again")
        self.settings = from_dict(CacheSettings, found["config"]["settings"], "settings")
        self.facts = {d: from_dict(TeacherFacts, f, d) for d, f in found["config"]["teachers"].items()}
        self.domains = tuple(self.facts) if domains is None else tuple(domains)
        for domain in self.domains:
            if domain not in self.facts:
                raise DataError(
                    f"The teacher cache '{folder}' holds nothing of domain '{domain}'.",
                    f"make it with --{TEACHER_OF[domain].replace('_', '-')}",
                )
        self._digests = found["files"]
        self._read: dict[Domain, _Part] = {}

    def check(self, student: Mapping[Domain, TeacherFacts], temperature: float) -> None:
        """Whether this cache was made by these teachers, for a student like this one.

        student: what the cache would hold if it were made now. Raises: DataError naming what is stale.
        """
        for domain in self.domains:
            where = f"The teacher cache '{self.folder}' is stale for domain '{domain}'"
            self.facts[domain].check(student[domain], where)
        if "multimodal" in self.domains and self.settings.temperature != temperature:
            raise DataError(
                f"The teacher cache '{self.folder}' is softened by temperature {self.settings.temperature}, "
                f"training wants {temperature}.",
                "make it again with --temperature, or set losses.temperature",
            )

    def collate(self, processor: Processor, samples: Sequence[Sample], seed: int, step: int) -> Batch:
        """A batch in views that are keyed by (seed, sample, step)."""
        rngs = [np.random.default_rng([seed, s.key, step]) for s in samples]
        return collate(processor, samples, [int(r.integers(self.settings.views)) for r in rngs], self.settings)

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """velocity or bins (robot rows), else zero, and the `topk.Known.targets` of questions.

        Raises: DataError for a sample that the cache does not hold, or holds otherwise.
        """
        found: dict[str, Tensor] = {}
        keys, views, samples = (batch[name].cpu().numpy() for name in ("key", "view", "sample"))
        robot = batch["robot"].cpu().numpy()
        for domain in self.domains:
            rows = np.flatnonzero(robot == (domain == "robot"))
            if len(rows):
                cells = self._part(domain).read(keys[rows], views[rows], samples[rows])
                decode = self._velocities if domain == "robot" else self._tokens
                found |= decode(batch, rows, cells)
        return {name: tensor.to(batch["robot"].device) for name, tensor in found.items()}

    def _part(self, domain: Domain) -> _Part:
        if domain not in self._read:
            self._read[domain] = _Part(self.folder, domain, self._digests)
        return self._read[domain]

    def _velocities(self, batch: Batch, rows: np.ndarray, cells: Mapping[str, list[bytes]]) -> dict[str, Tensor]:
        facts = self.facts["robot"]
        values = np.stack([np.frombuffer(cell, "<f2").reshape(facts.shape) for cell in cells["values"]])
        target = np.zeros((len(batch["robot"]), *facts.shape), np.float32)
        target[rows] = values
        return {facts.target: torch.from_numpy(target)}

    def _tokens(self, batch: Batch, rows: np.ndarray, cells: Mapping[str, list[bytes]]) -> dict[str, Tensor]:
        settings, (vocab_size,) = self.settings, self.facts["multimodal"].shape
        found = topk.unknown(tuple(batch["labels"].shape), settings.likeliest, settings.tail_draws)
        for i, row in enumerate(rows):
            fields = {name: values[i] for name, values in cells.items()}
            known = topk.decode(fields, settings.top_k, settings.tail_draws, vocab_size, settings.packed)
            for whole, part in zip(found.targets().values(), known.targets().values(), strict=True):
                whole[row, : len(part)] = part
        return found.targets()


class _Part:
    """All entries of one domain, in memory."""

    def __init__(self, folder: str, domain: Domain, digests: Mapping[str, str]):
        tables = []
        for name in sorted(n for n in digests if n.startswith(PARTS[domain])):
            url = storage.join(folder, name)
            if manifest.file_digest(url) != digests[name]:
                raise DataError(f"'{url}' is not what its manifest says.", "make the teacher cache again")
            tables.append(dataset.read_table(url))
        self._folder, self._domain = folder, domain
        table = pa.concat_tables(tables).combine_chunks()
        self._key, self._view, self._sample = (table[name].to_numpy() for name in ("key", "view", "sample"))
        self._cells = {name: table[name] for name in table.column_names if name not in ("key", "view", "sample")}
        self._order = self._key * (1 << 16) + self._view

    def read(self, keys: np.ndarray, views: np.ndarray, samples: np.ndarray) -> dict[str, list[bytes]]:
        wanted = keys * (1 << 16) + views
        rows = np.searchsorted(self._order, wanted)
        held = self._order[np.minimum(rows, len(self._order) - 1)] == wanted
        if not held.all():
            raise DataError(
                f"The teacher cache '{self._folder}' lacks sample {keys[~held][0]} of domain '{self._domain}'.",
                "make it again from this data set",
            )
        other = self._sample[rows] != samples
        if other.any():
            raise DataError(
                f"The teacher cache '{self._folder}' is stale: sample {keys[other][0]} of domain '{self._domain}' is "
                "another than the teacher saw.",
                "make it again from this data set",
            )
        return {name: [column[int(row)].as_py() for row in rows] for name, column in self._cells.items()}


def load_cache(
    folder: str, *, teachers: Mapping[Domain, str], student: Processor, config: ModelConfig, temperature: float
) -> TeacherCache:
    """The cache for a student, of those domains whose teachers are given.

    teachers: domain -> the checkpoint that it must have been made by. Raises: DataError if it is stale or lacks one.
    """
    found = TeacherCache(folder, tuple(teachers))
    made_by = {domain: manifest.input_digests({"": teacher})[""] for domain, teacher in teachers.items()}
    found.check({d: TeacherFacts.of(config, student, made_by[d], d) for d in teachers}, temperature)
    return found


def settings_of(settings: CacheSettings, teachers: Mapping[Domain, TeacherFacts]) -> dict[str, Any]:
    """What a cache folder is claimed and finished with."""
    return {"format": _FORMAT, "settings": to_dict(settings), "teachers": {d: to_dict(f) for d, f in teachers.items()}}
