"""`dualvla prune`: the labels of dual-layer pruning, added to a data set of any size by Ray Data.

A part file is the unit of work: an episode lies within one part, parts keep their names and order, and a finished part
is never made again, so neither the number of workers nor an interruption changes a byte. Knows no simulator, no model
and no table (`labelling.py` does).
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dualvla import config as configs
from dualvla import console, errors
from dualvla.io import dataset, manifest, storage
from dualvla.pruning import MODES, FrameDifferences
from dualvla_pipelines import labelling

# Actors that hold every CPU starve Ray Data's own tasks, and it waits for ever without an error.
_CPUS_PER_WORKER = 0.5


@dataclass(frozen=True)
class PruneConfig:
    """What decides the result (the number of workers does not).

    mode: see `dualvla.pruning.combine`. seed: of mode `random`. strict: an unfit row is an error, never quarantined.
    """

    mode: str = "both"
    seed: int = 0
    strict: bool = False
    detector: FrameDifferences = field(default_factory=FrameDifferences)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise errors.UsageError(f"Unknown pruning mode '{self.mode}'.", errors.did_you_mean(self.mode, MODES))


def prune(source: str, out: str, config: PruneConfig, workers: int | None = None) -> dict[str, Any]:
    """Writes the data set `source` with scene_label, action_label and keep_reasoning to the folder `out`.

    Rows, their order and their image bytes stay; what cannot be labelled goes to `out/quarantine` with a reason.
    workers: processes (default: one a CPU). Returns counts, in all and for each task.
    Raises: DataError naming a part that cannot be read or, with `config.strict`, that holds an unfit row.
    """
    data = dataset.open_dataset(source)
    settings, inputs = configs.to_dict(config), manifest.input_digests({"data": source})
    skipped = not manifest.begin(out, dataset.KIND, settings, inputs)
    if not skipped:
        names = [file.rsplit("/", 1)[-1] for file in data.files]
        by_name = {}
        with console.progress("pruning (parts)", len(names)) as advance:
            for name, tally in _run(PartPruner(source, out, config), names, workers):
                by_name[name] = tally
                advance(1)
        tallies = [by_name[name] for name in names]
        _refuse_split_episodes(source, names, tallies)
        total = labelling.merge(tallies)
        dataset.finish_dataset(
            out, settings, inputs,
            rows_in=data.manifest["rows_out"], rows_quarantined=total["rows_quarantined"],
            mode=config.mode, tasks=total["tasks"], quarantine_reasons=total["reasons"],
        )  # fmt: skip
    found = manifest.require(out, dataset.KIND)
    counts = ("mode", "episodes", "rows_in", "rows_out", "rows_quarantined", "quarantine_reasons", "tasks")
    return {"out": out, "skipped": skipped, **{name: found[name] for name in counts}}


@dataclass(frozen=True)
class PartPruner:
    """Prunes one part file: labelled rows to `out/data`, the rest to `out/quarantine`, under the part's own name."""

    source: str
    out: str
    config: PruneConfig

    def __call__(self, name: str) -> dict[str, Any]:
        """Returns the part's tally. A part that lies there already is only counted."""
        done, quarantined = storage.join(self.out, "data", name), storage.join(self.out, "quarantine", name)
        if storage.exists(done):
            bad = dataset.read_table(quarantined, ["reason"]) if storage.exists(quarantined) else None
            return labelling.tally(dataset.read_table(done, labelling.TALLIED), bad)

        source = storage.join(self.source, "data", name)
        detector = self.config.detector if self.config.mode in ("both", "scene", "random") else None
        good, bad = labelling.label_table(dataset.read_table(source), self.config.mode, self.config.seed, detector)
        if len(bad):
            if self.config.strict:
                row = bad.slice(0, 1).to_pylist()[0]
                raise errors.DataError(
                    f"'{source}', episode '{row['episode_id']}', step {row['step']}: {row['reason']}.",
                    "repair it, or leave out --strict",
                )
            dataset.write_table(quarantined, bad)
        dataset.write_table(done, good)  # last: it is what marks the part as finished
        return labelling.tally(good, bad)


class _Worker:
    """A `PartPruner` as Ray Data calls it: a row with a part's name in, a row with its tally or its error out."""

    def __init__(self, pruner: PartPruner):
        import pyarrow as pa

        pa.set_cpu_count(1)  # one process a CPU: threads beside it only get in each other's way
        self._pruner = pruner

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        try:
            return {"name": row["name"], "tally": json.dumps(self._pruner(row["name"])), "error": ""}
        except errors.DualVLAError as error:
            return {"name": row["name"], "tally": "", "error": json.dumps([type(error).__name__, *error.args])}


def _run(pruner: PartPruner, names: Sequence[str], workers: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part, tally) as the parts finish. One part is one block: no shuffle, and no image crosses a process."""
    import ray

    from dualvla_cluster.connect import connect

    connect()
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts parts
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it announces every plan, and that its bars are off
    actors = min(len(names), workers or int(ray.cluster_resources()["CPU"]))
    parts = ray.data.from_items([{"name": name} for name in names], override_num_blocks=len(names)).map(
        _Worker,
        fn_constructor_args=(pruner,),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=_CPUS_PER_WORKER,
    )
    for row in parts.iter_rows():
        if row["error"]:
            kind, *arguments = json.loads(row["error"])
            raise getattr(errors, kind)(*arguments)
        yield row["name"], json.loads(row["tally"])


def _refuse_split_episodes(source: str, names: Sequence[str], tallies: Sequence[Mapping[str, Any]]) -> None:
    for (name, one), (next_name, two) in itertools.pairwise(zip(names, tallies, strict=True)):
        if one["last_episode"] is not None and one["last_episode"] == two["first_episode"]:
            raise errors.DataError(
                f"Episode '{one['last_episode']}' of '{source}' is split between {name} and {next_name}.",
                "make the data set again with whole episodes in each part",
            )
