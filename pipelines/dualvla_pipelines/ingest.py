"""`dualvla ingest`: other people's robot data as a data set folder, of any size, on Ray.

A unit of the source is one piece of work: its parts are written one by one, then a record of what they hold, which is
what marks the unit as finished. So neither the number of workers nor an interruption changes a byte. Knows no format
(`sources` do) and no rule of what is fit (`checks`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa

from dualvla import config as configs
from dualvla import console
from dualvla.errors import DataError, UsageError
from dualvla.io import dataset, manifest, storage
from dualvla_pipelines import checks
from dualvla_pipelines.parallel import run_each
from dualvla_pipelines.sources import vla_it
from dualvla_pipelines.sources.base import Episode, Rejected, Source, Unit
from dualvla_pipelines.sources.lerobot import LeRobotSource
from dualvla_pipelines.sources.rlds import RldsSource
from dualvla_pipelines.sources.video import FrameEncoding

_PROGRESS = "progress"  # records of finished units, and the annotations' shards; removed at the end
_PART_BYTES = 64 << 20
_ANNOTATIONS = "annotations.json"


@dataclass(frozen=True)
class IngestConfig:
    """What decides the result (the number of workers does not).

    convention: a name, a JSON file, or auto; overrides: `key=value` settings of it. annotation_steps: whether the steps
    of VLA-IT count those of the source, or those the convention keeps. strict: an unfit row is an error.
    """

    format: Literal["lerobot", "rlds"]
    convention: str = "auto"
    overrides: tuple[str, ...] = ()
    frames: Literal["jpeg", "png"] = "jpeg"
    jpeg_quality: int = 95
    annotation_steps: Literal["source", "kept"] = "source"
    strict: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.jpeg_quality <= 100:
            raise UsageError(f"jpeg_quality {self.jpeg_quality} is not in 1 to 100.", "95 is good")

    def open(self, source: str) -> Source:
        if self.format == "rlds":
            return RldsSource.open(source, self.convention, self.overrides)
        encoding = FrameEncoding(self.frames, self.jpeg_quality)
        return LeRobotSource.open(source, self.convention, self.overrides, encoding)


def ingest(
    source: str, out: str, config: IngestConfig, annotations: str | None = None, workers: int | None = None
) -> dict[str, Any]:
    """Writes what lies at `source` as a data set to the folder `out`; unfit rows go to `out/quarantine` with a reason.

    annotations: a VLA-IT JSON file. workers: processes (default: one a CPU). Returns counts.
    Raises: DataError if the source's metadata cannot be read or, with `config.strict`, at the first unfit row;
    UsageError if nothing says what its numbers mean.
    """
    opened = config.open(source)
    settings = {**configs.to_dict(config), "convention": configs.to_dict(opened.convention)}
    inputs = {"source": opened.fingerprint()}
    if annotations:
        inputs["annotations"] = manifest.file_digest(annotations)
    skipped = not manifest.begin(out, dataset.KIND, settings, inputs)
    if not skipped:
        _ingest(opened, out, config, annotations, workers, settings, inputs)
    _clear_progress(out)
    found = manifest.require(out, dataset.KIND)
    facts = ("episodes", "rows_in", "rows_out", "rows_quarantined", "quarantine_reasons", "damaged_files")
    return {
        "out": out,
        "skipped": skipped,
        **{name: found[name] for name in (*facts, "columns_left_out", "annotations")},
    }


def _ingest(
    source: Source,
    out: str,
    config: IngestConfig,
    annotations: str | None,
    workers: int | None,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> None:
    units = source.units()
    index = vla_it.build_index(annotations, _shards(out)) if annotations else None
    work = UnitIngest(source, out, config, annotated=index is not None)
    jobs = [Job(unit) for unit in units]
    tallies = {job.unit.index: tally for job, tally in run_each(work, jobs, workers, "ingesting", work.give_up)}
    doubled = _doubled(tallies.values())
    # A key that fits several episodes is known only now; the units that used it are made again without it.
    again = [Job(unit, doubled) for unit in units if tallies[unit.index].refused != doubled & tallies[unit.index].keys]
    if again:
        tallies |= {job.unit.index: tally for job, tally in run_each(work, again, workers, "again", work.give_up)}

    ordered = [tallies[unit.index] for unit in units]
    total = _sum(ordered)
    _remove_strays(out, ordered)
    summary = _list_annotations(out, index, ordered, doubled) if index is not None else {}
    console.tell("ingesting", "rows_out", total["rows_in"] - total["rows_quarantined"])
    console.tell("ingesting", "rows_quarantined", total["rows_quarantined"])
    dataset.finish_dataset(
        out, settings, inputs,
        rows_in=total["rows_in"], rows_quarantined=total["rows_quarantined"],
        parts={name: part for tally in ordered for name, part in tally.parts.items()},
        quarantine_files={name: digest for tally in ordered for name, digest in tally.quarantine.items()},
        quarantine_reasons=total["reasons"], damaged_files=total["damaged"],
        columns_left_out=list(source.columns_left_out), annotations=summary,
    )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """refused: episode keys whose annotation fits several episodes, and so none."""

    unit: Unit
    refused: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Tally:
    """What one unit gave. keys: episode keys that had an annotation; refused: those of them it was not used for.

    steps_matched, steps_beyond: keys of steps that fit a step of the source, and that lie after its last.
    steps_without: rows that no key fits.
    """

    rows_in: int = 0
    rows_quarantined: int = 0
    parts: Mapping[str, dataset.Part] = field(default_factory=dict)
    quarantine: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
    damaged: Mapping[str, str] = field(default_factory=dict)
    key_counts: Mapping[str, int] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()
    steps_matched: int = 0
    steps_beyond: Mapping[str, int] = field(default_factory=dict)
    steps_without: int = 0

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self.key_counts)

    def to_json(self) -> bytes:
        return json.dumps({**asdict(self), "refused": sorted(self.refused)}, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Tally:
        values = json.loads(data)
        values["parts"] = {name: dataset.Part(**part) for name, part in values["parts"].items()}
        return cls(**{**values, "refused": frozenset(values["refused"])})


@dataclass(frozen=True)
class UnitIngest:
    """Ingests one unit: parts to `out/data` and `out/quarantine`, then the unit's record to `out/progress`."""

    source: Source
    out: str
    config: IngestConfig
    annotated: bool

    def __call__(self, job: Job) -> Tally:
        """A unit whose record lies there already is not made again, unless it used a key it must not."""
        if storage.exists(self._record(job.unit)):
            tally = Tally.from_json(storage.read_bytes(self._record(job.unit)))
            if not job.refused or tally.refused == job.refused & tally.keys:
                return tally
        return self._write(job, self.source.episodes(job.unit))

    def give_up(self, job: Job, reason: str) -> Tally:
        """What is recorded of a unit that no worker survives."""
        return self._write(job, self.source.lost(job.unit, reason))

    def _write(self, job: Job, episodes: Iterable[Episode]) -> Tally:
        data = _PartWriter(storage.join(self.out, "data"), job.unit.index)
        quarantine = _PartWriter(storage.join(self.out, "quarantine"), job.unit.index)
        rows_in = steps_matched = steps_without = 0
        reasons: Counter[str] = Counter()
        key_counts: Counter[str] = Counter()
        beyond: dict[str, int] = {}
        damaged: dict[str, str] = {}
        for episode in episodes:
            joined = self._join(episode, job.refused)
            good, bad = _sort_out(joined.rows, episode, self.source.passes_images, self.source.labelled)
            self._refuse_if_strict(episode, bad)
            rows_in += len(good) + len(bad)
            reasons.update(rejected.check for rejected in bad)
            damaged.update(episode.damaged)
            steps_matched += joined.matched
            steps_without += joined.without
            if joined.key is not None:
                key_counts[joined.key] += 1
                if joined.beyond:
                    beyond[joined.key] = joined.beyond
            if good:
                data.add(dataset.rows_to_table(good, self.source.labelled))
            if bad:
                quarantine.add(_quarantine_table(bad, self.source.labelled))
        tally = Tally(
            rows_in=rows_in,
            rows_quarantined=sum(part.rows for part in quarantine.close().values()),
            parts=data.close(),
            quarantine={name: part.sha256 for name, part in quarantine.close().items()},
            reasons=dict(sorted(reasons.items())),
            damaged=damaged,
            key_counts=dict(sorted(key_counts.items())),
            refused=job.refused & frozenset(key_counts),
            steps_matched=steps_matched,
            steps_beyond=beyond,
            steps_without=steps_without,
        )
        storage.write_bytes(self._record(job.unit), tally.to_json())
        return tally

    def _join(self, episode: Episode, refused: frozenset[str]) -> _Joined:
        rows = list(episode.rows)
        if not self.annotated:
            return _Joined(rows)
        key = vla_it.episode_key(episode.file_path, episode.number)
        annotation = vla_it.lookup(_shards(self.out), key)
        if annotation is None:
            return _Joined(rows, without=len(rows))
        if key in refused:
            return _Joined(rows, key=key, without=len(rows))
        return annotate(episode, annotation, self.config.annotation_steps)

    def _refuse_if_strict(self, episode: Episode, bad: Sequence[Rejected]) -> None:
        faults = [rejected for rejected in bad if rejected.check not in ("convention", _NEIGHBOUR)]
        if self.config.strict and faults:
            step = faults[0].row.get("step")
            raise DataError(
                f"Episode '{episode.episode_id}', step {step}: {faults[0].reason}.", "repair it, or leave out --strict"
            )

    def _record(self, unit: Unit) -> str:
        return storage.join(self.out, _PROGRESS, f"unit-{unit.index:05d}.json")


@dataclass(frozen=True)
class _Joined:
    """An episode's rows after the join, and what came of its step keys."""

    rows: Sequence[dict[str, Any]]
    key: str | None = None
    matched: int = 0
    beyond: int = 0
    without: int = 0


def annotate(episode: Episode, annotation: vla_it.Annotation, count: Literal["source", "kept"]) -> _Joined:
    """The episode's rows with their motion primitives, and its questions and captions as rows of domain multimodal.

    A step's motion primitive is its reasoning too where it has none. The texts stand as they are written, each with the
    episode's first images: prompt templates belong to training.
    """
    rows = []
    without = 0
    for position, (row, step) in enumerate(zip(episode.rows, episode.source_steps, strict=True)):
        at = step if count == "source" else position
        if at >= len(annotation.primitives):
            without += 1
            rows.append(row)
            continue
        text = annotation.primitives[at]
        rows.append({**row, "motion_primitive": text, "reasoning": row.get("reasoning") or text})
    steps = episode.length if count == "source" else len(episode.rows)
    numbers: Counter[str] = Counter()
    for kind, question, answer in annotation.texts if rows else ():
        number = numbers[kind]
        numbers[kind] += 1
        rows.append(
            {
                "episode_id": f"{episode.episode_id}/vla-it/{kind}/{number:03d}", "step": 0,
                "split": rows[0]["split"], "domain": "multimodal", "task": f"vla-it/{kind}",
                "instruction": question, "images": rows[0]["images"], "reasoning": answer,
            }
        )  # fmt: skip
    matched = min(len(annotation.primitives), steps)
    return _Joined(rows, annotation.key, matched, len(annotation.primitives) - matched, without)


_NEIGHBOUR = "same episode"


def _sort_out(
    rows: Sequence[dict[str, Any]], episode: Episode, decode_images: bool, labelled: bool
) -> tuple[list[dict[str, Any]], list[Rejected]]:
    """(fit rows, rejected rows with those the source rejected), in order.

    An episode with an unfit robot row goes whole: its motion has a hole. What a convention drops is no such fault.
    """
    faults: dict[int, checks.Finding] = {}
    if rows:
        for finding in checks.check_rows(dataset.rows_to_table(rows, labelled), decode_images):
            if finding.severity == "error" and finding.row is not None:
                faults.setdefault(finding.row, finding)
    lost = [rejected for rejected in episode.rejected if rejected.check != "convention"]
    spoiled = next((f"step {rejected.row['step']}: {rejected.reason}" for rejected in lost), None)
    for number, finding in faults.items():
        if spoiled is None and rows[number]["domain"] == "robot":
            spoiled = f"step {rows[number]['step']}: {finding.message}"
    good: list[dict[str, Any]] = []
    bad = list(episode.rejected)
    for number, row in enumerate(rows):
        if number in faults:
            bad.append(Rejected(row, faults[number].check, faults[number].message))
        elif spoiled is not None:
            bad.append(Rejected(row, _NEIGHBOUR, f"of the same episode, {spoiled}"))
        else:
            good.append(row)
    bad.sort(key=lambda rejected: (str(rejected.row.get("episode_id")), rejected.row.get("step") or 0))
    return good, bad


def _quarantine_table(bad: Sequence[Rejected], labelled: bool) -> pa.Table:
    table = dataset.rows_to_table([rejected.row for rejected in bad], labelled)
    reasons = [f"{rejected.check}: {rejected.reason}" for rejected in bad]
    return table.append_column("reason", pa.array(reasons, type=pa.string()))


class _PartWriter:
    """Writes tables, each of whole episodes, as parts of about `_PART_BYTES`: what is held does not grow."""

    def __init__(self, folder: str, unit: int):
        self._folder, self._unit = folder, unit
        self._tables: list[pa.Table] = []
        self._bytes = 0
        self._parts: dict[str, dataset.Part] = {}

    def add(self, table: pa.Table) -> None:
        self._tables.append(table)
        self._bytes += table.nbytes
        if self._bytes >= _PART_BYTES:
            self._flush()

    def close(self) -> dict[str, dataset.Part]:
        """File name -> what it holds."""
        if self._tables:
            self._flush()
        return self._parts

    def _flush(self) -> None:
        table = pa.concat_tables(self._tables)
        table = table.sort_by([("episode_id", "ascending"), ("step", "ascending")])
        name = f"part-{self._unit:05d}-{len(self._parts):03d}.parquet"
        digest = dataset.write_table(storage.join(self._folder, name), table)
        self._parts[name] = dataset.Part(digest, len(table), len(table["episode_id"].unique()))
        self._tables, self._bytes = [], 0


def _doubled(tallies: Iterable[Tally]) -> frozenset[str]:
    """Episode keys that fit more than one episode."""
    counts: Counter[str] = Counter()
    for tally in tallies:
        counts.update(tally.key_counts)
    return frozenset(key for key, count in counts.items() if count > 1)


def _sum(tallies: Sequence[Tally]) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    damaged: dict[str, str] = {}
    for tally in tallies:
        reasons.update(tally.reasons)
        damaged.update(tally.damaged)
    return {
        "rows_in": sum(tally.rows_in for tally in tallies),
        "rows_quarantined": sum(tally.rows_quarantined for tally in tallies),
        "reasons": dict(sorted(reasons.items())),
        "damaged": dict(sorted(damaged.items())),
    }


def _list_annotations(
    out: str, index: Mapping[str, Any], tallies: Sequence[Tally], doubled: frozenset[str]
) -> dict[str, int]:
    """Writes which keys found no step, or several, to `annotations.json`; returns how many keys of steps did what."""
    seen = {key for tally in tallies for key in tally.key_counts}
    twice = {**index["doubled"], **{key: index["keys"][key] for key in doubled}}
    beyond = {key: count for tally in tallies for key, count in tally.steps_beyond.items()}
    unmatched = {key: steps for key, steps in index["keys"].items() if key not in seen and key not in twice}
    summary = {
        "in_the_file": sum(index["keys"].values()),
        "matched": sum(tally.steps_matched for tally in tallies),
        "unmatched": sum(unmatched.values()) + sum(beyond.values()),
        "doubly_matched": sum(twice.values()),
        "steps_without": sum(tally.steps_without for tally in tallies),
    }
    listing = {
        "summary": summary,
        "unmatched_episodes": dict(sorted(unmatched.items())),
        "unmatched_after_the_last_step": dict(sorted(beyond.items())),
        "doubly_matched_episodes": dict(sorted(twice.items())),
    }
    storage.write_bytes(storage.join(out, _ANNOTATIONS), (json.dumps(listing, indent=2) + "\n").encode())
    return summary


def _shards(out: str) -> str:
    return storage.join(out, _PROGRESS, "annotations")


def _remove_strays(out: str, tallies: Sequence[Tally]) -> None:
    """Parts that a unit wrote before it was made again, and not since."""
    for name, kept in (("data", "parts"), ("quarantine", "quarantine")):
        wanted = {part for tally in tallies for part in getattr(tally, kept)}
        for file in storage.list_files(storage.join(out, name), ".parquet"):
            if file.rsplit("/", 1)[-1] not in wanted:
                storage.remove(file)


def _clear_progress(out: str) -> None:
    for folder in (_shards(out), storage.join(out, _PROGRESS)):
        for file in storage.list_files(folder):
            storage.remove(file)
