"""`dualvla prune`: the labels of dual-layer pruning, added to a data set of any size by Ray Data.

A part file is the unit of work: an episode lies within one part, parts keep their names and order, and a finished part
is never made again, so neither the number of workers nor an interruption changes a byte. Ray Data carries the *names*
of the parts to a pool of actors, each of which reads, labels and writes whole parts: nothing is shuffled, no image
enters the object store, and memory is bounded by one part a worker. Knows no simulator and no table (`labelling.py`
does), nor what a learned detector is made of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from dualvla import config as configs
from dualvla import console, errors
from dualvla.io import dataset, manifest, storage
from dualvla.pruning import MODES, FrameDifferences
from dualvla_pipelines import labelling, prune_report, ray_parts
from dualvla_pipelines.prune_report import ReportConfig
from dualvla_pipelines.ray_parts import Workers

log = logging.getLogger(__name__)

DETECTOR_KIND = "detector"
_SCENE_MODES = ("both", "scene", "random")


@dataclass(frozen=True)
class PruneConfig:
    """What decides the result (the number of workers does not).

    mode: see `dualvla.pruning.combine`. seed: of mode `random`. strict: an unfit row or file is an error, never
    quarantined or left out. camera: whose images the scene label sees (default: each step's first). detector: the
    scene label that needs no training, used where no learned one is given.
    """

    mode: str = "both"
    seed: int = 0
    strict: bool = False
    camera: str | None = None
    detector: FrameDifferences = field(default_factory=FrameDifferences)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise errors.UsageError(f"Unknown pruning mode '{self.mode}'.", errors.did_you_mean(self.mode, MODES))


def prune(
    source: str,
    out: str,
    config: PruneConfig,
    *,
    detector: str | None = None,
    workers: Workers | None = None,
    report: ReportConfig | None = None,
    execute: Execute | None = None,
) -> dict[str, Any]:
    """Writes the data set `source` with scene_label, action_label and keep_reasoning to the folder `out`.

    Rows, their order and their image bytes stay; what cannot be labelled goes to `out/quarantine` with a reason, and a
    part that cannot be read is left out and named in `files_lost`. detector: folder of a learned one. execute: runs the
    job over the parts (default: on Ray). What was kept is shown in `out/report` (see `prune_report`). Returns counts,
    in all and for each task.

    Raises: DataError if no part can be read, an episode is split between parts, or, with `config.strict`, naming the
    first unfit row or part; UsageError if `detector` is given to a mode without scene labels.
    """
    data = dataset.open_dataset(source)
    if detector is not None and config.mode not in _SCENE_MODES:
        raise errors.UsageError(f"Mode '{config.mode}' uses no detector.", f"leave out --detector {detector}")
    folders = {"data": source} if detector is None else {"data": source, "detector": detector}
    if detector is not None:
        manifest.require(detector, DETECTOR_KIND)
    settings, inputs = configs.to_dict(config), manifest.input_digests(folders)
    skipped = not manifest.begin(out, dataset.KIND, settings, inputs)
    if not skipped:
        names = [file.rsplit("/", 1)[-1] for file in data.files]
        job, tallies = PruneJob(source, out, config, detector), {}
        with console.progress("pruning (parts)", len(names)) as advance:
            for name, tally in (execute or on_ray)(job, names, workers or Workers()):
                tallies[name] = tally
                advance(1)
                for figure in ("rows_out", "rows_quarantined"):
                    console.tell("pruning", figure, tally.get(figure, 0))
        _finish(source, out, data.manifest["rows_out"], settings, inputs, {name: tallies[name] for name in names})
    found = manifest.require(out, dataset.KIND)
    shown = prune_report.ensure(out, report or ReportConfig())
    counts = (
        "mode", "episodes", "rows_in", "rows_out", "rows_quarantined", "quarantine_reasons", "rows_lost", "files_lost",
        "tasks",
    )  # fmt: skip
    return {"out": out, "skipped": skipped, "report": shown, **{name: found[name] for name in counts}}


@dataclass(frozen=True)
class PruneJob:
    """What a worker must know: small, and the same for all of them. detector: folder of a learned one, or None."""

    source: str
    out: str
    config: PruneConfig
    detector: str | None = None

    def scenes(self, device: str) -> labelling.SceneSource | None:
        """What labels the scenes, loaded onto a device (as PyTorch names it). None for a mode that needs none."""
        if self.config.mode not in _SCENE_MODES:
            return None
        if self.detector is None:
            return labelling.SceneSource(self.config.detector, self.config.camera)
        from dualvla.pruning.ddm import load_detector  # loads torch

        learned = load_detector(self.detector, device)
        return labelling.SceneSource(learned, self.config.camera, learned.net.config.image_size)


class PartPruner:
    """Prunes one part file: labelled rows to `out/data`, the rest to `out/quarantine`, under the part's own name."""

    def __init__(self, job: PruneJob, device: str = "cpu"):
        self.source, self.out, self.config = job.source, job.out, job.config
        self.scenes = job.scenes(device)

    def __call__(self, name: str) -> dict[str, Any]:
        """Returns the part's tally and `digest`, or why it is `lost`. A part that lies there already is only counted.

        Raises: DataError, with `config.strict`, for a part that cannot be read or has an unfit row.
        """
        done, quarantined = storage.join(self.out, "data", name), storage.join(self.out, "quarantine", name)
        if storage.exists(done):
            bad = dataset.read_table(quarantined, labelling.TALLIED_BAD) if storage.exists(quarantined) else None
            good = dataset.read_table(done, labelling.TALLIED)
            return {**labelling.tally(good, bad), "digest": manifest.file_digest(done)}

        source = storage.join(self.source, "data", name)
        try:
            table = dataset.read_table(source)
        except errors.DataError as error:
            if self.config.strict:
                raise
            return {"lost": error.message}
        config = self.config
        good, bad = labelling.label_table(table, config.mode, config.seed, self.scenes)
        if len(bad):
            if config.strict:
                row = bad.slice(0, 1).to_pylist()[0]
                raise errors.DataError(
                    f"'{source}', episode '{row['episode_id']}', step {row['step']}: {row['reason']}.",
                    "repair it, or leave out --strict",
                )
            dataset.write_table(quarantined, bad)
        digest = dataset.write_table(done, good)  # last: it is what marks the part as finished
        return {**labelling.tally(good, bad), "digest": digest}


Execute = Callable[[PruneJob, Sequence[str], Workers], Iterable[tuple[str, dict[str, Any]]]]


def on_ray(job: PruneJob, names: Sequence[str], workers: Workers) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part, tally) as the parts finish."""
    return ray_parts.run("prune", partial(PartPruner, job), names, workers, learned=job.detector is not None)


def _finish(
    source: str,
    out: str,
    rows_promised: int,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    by_name: Mapping[str, Mapping[str, Any]],
) -> None:
    """Adds up what the workers counted, and writes the manifest. by_name: part -> tally, in the order of the parts."""
    lost = {name: tally["lost"] for name, tally in by_name.items() if "lost" in tally}
    tallies = {name: tally for name, tally in by_name.items() if name not in lost}
    if by_name and not tallies:
        raise errors.DataError(f"No part of '{source}' can be read: {next(iter(lost.values()))}", "make it again")
    for name, why in lost.items():
        log.warning("part %s is left out: %s", name, why)
    _refuse_split_episodes(source, tallies)
    total = labelling.merge(list(tallies.values()))
    rows_in = total["rows_out"] + total["rows_quarantined"]
    if rows_in > rows_promised or (rows_in < rows_promised and not lost):
        raise errors.DataError(
            f"'{source}' holds {rows_in} rows where its manifest says {rows_promised}.",
            "it was changed after it was made: make it again",
        )
    manifest.finish(
        out, dataset.KIND, settings, inputs,
        files={name: tally["digest"] for name, tally in tallies.items()},
        episodes=total["episodes"], rows_in=rows_in, rows_out=total["rows_out"],
        rows_quarantined=total["rows_quarantined"], quarantine_reasons=total["reasons"],
        rows_lost=rows_promised - rows_in, files_lost=lost,
        mode=settings["mode"], tasks=total["tasks"],
        sampled_parts=prune_report.choose_parts({name: tally["tasks"] for name, tally in tallies.items()}),
    )  # fmt: skip


def _refuse_split_episodes(source: str, tallies: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises: DataError naming an episode with rows in two parts. By hash, so that a million episodes take 16 MB."""
    names = list(tallies)
    keys = [np.array(tallies[name]["robot_keys"], dtype=np.uint64) for name in names]
    if not keys:
        return
    part = np.repeat(np.arange(len(names)), [len(one) for one in keys])
    key = np.concatenate(keys)
    order = np.argsort(key, kind="stable")
    for at in np.flatnonzero(key[order][1:] == key[order][:-1]).tolist():
        one, two = (names[part[order[i]]] for i in (at, at + 1))
        ids = [dataset.read_table(storage.join(source, "data", n), ["episode_id"])["episode_id"] for n in (one, two)]
        shared = sorted({*ids[0].to_pylist()} & {*ids[1].to_pylist()})
        if shared:  # else two names of one hash
            raise errors.DataError(
                f"Episode '{shared[0]}' of '{source}' is split between {one} and {two}.",
                "make the data set again with whole episodes in each part",
            )
