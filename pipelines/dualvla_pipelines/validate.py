"""`dualvla validate`: what is wrong with a data set folder, and where. Changes nothing; the rules are in `checks`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dualvla.io import dataset, storage
from dualvla_pipelines import checks
from dualvla_pipelines.parallel import run_each


def validate(data: str, images: bool = True, listed: int = 20, workers: int | None = None) -> dict[str, Any]:
    """Checks every row of the data set folder `data`; `images`: decodes every image.

    Returns ok (no errors), counts of findings by check, and the first `listed` of each check with their places.
    Raises: DataError if there is no finished data set.
    """
    opened = dataset.open_dataset(data)
    names = [file.rsplit("/", 1)[-1] for file in opened.files]
    work = PartCheck(data, opened.manifest["files"], images, listed)
    reports = dict(run_each(work, names, workers, "validating (parts)", work.give_up))
    ordered = [reports[name] for name in names]
    found = [finding for report in ordered for finding in report.findings]
    counts = sum((Counter(report.counts) for report in ordered), Counter[str]())
    severities = sum((Counter(report.severities) for report in ordered), Counter[str]())
    for finding in [*_split_episodes(names, ordered), *_gripper_spread(ordered), *_counted(opened, ordered)]:
        found.append(finding)
        counts[finding["check"]] += 1
        severities[finding["severity"]] += 1
    shown: Counter[str] = Counter()
    first = []
    for finding in found:
        shown[finding["check"]] += 1
        if shown[finding["check"]] <= listed:
            first.append(finding)
    return {
        "data": data,
        "ok": severities["error"] == 0,
        "rows": sum(report.rows for report in ordered),
        "episodes": len({name for report in ordered for name in report.edge_episodes})
        + sum(report.inner_episodes for report in ordered),
        "errors": severities["error"],
        "warnings": severities["warning"],
        "counts": dict(sorted(counts.items())),
        "findings": first,
    }


@dataclass(frozen=True)
class PartReport:
    """What one part file holds. findings: the first of each check; counts, severities: of all of them.

    edge_episodes: the first and the last episode; inner_episodes: how many lie between. openings: smallest and largest
    gripper opening and command, None if there is none.
    """

    rows: int = 0
    edge_episodes: Sequence[str] = ()
    inner_episodes: int = 0
    openings: tuple[float, float] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    severities: Mapping[str, int] = field(default_factory=dict)
    findings: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class PartCheck:
    """Checks one part file. digests: file name -> sha256 that the manifest promises."""

    data: str
    digests: Mapping[str, str]
    images: bool
    listed: int

    def __call__(self, name: str) -> PartReport:
        content = storage.read_bytes(storage.join(self.data, "data", name))
        findings: list[checks.Finding] = []
        promised = self.digests.get(name)
        if promised is None:
            findings.append(checks.Finding("file", "the manifest does not name this file"))
        elif hashlib.sha256(content).hexdigest() != promised:
            findings.append(checks.Finding("file", "its content is not what the manifest promises"))
        try:
            table = pq.ParquetFile(pa.BufferReader(content)).read()
        except (pa.ArrowInvalid, OSError) as error:
            return self._report(name, None, [checks.Finding("file", f"not a readable parquet file: {error}")])
        findings += checks.check_schema(table.schema)
        if any(finding.check == "schema" for finding in findings):
            return self._report(name, None, findings)
        return self._report(name, table, findings + checks.check_rows(table, self.images))

    def give_up(self, name: str, reason: str) -> PartReport:
        return self._report(name, None, [checks.Finding("file", f"no worker survives reading it: {reason}")])

    def _report(self, name: str, table: pa.Table | None, findings: Sequence[checks.Finding]) -> PartReport:
        shown: Counter[str] = Counter()
        places = []
        for finding in findings:
            shown[finding.check] += 1
            if shown[finding.check] <= self.listed:
                places.append(_place(name, table, finding))
        severities: Counter[str] = Counter(finding.severity for finding in findings)
        if table is None:
            return PartReport(counts=dict(shown), severities=dict(severities), findings=places)
        ids = [value or "" for value in table["episode_id"].unique().to_pylist()]
        edges = list(dict.fromkeys([*ids[:1], *ids[-1:]]))
        return PartReport(
            len(table), edges, len(ids) - len(edges), _openings(table), dict(shown), dict(severities), places
        )


def _place(name: str, table: pa.Table | None, finding: checks.Finding) -> dict[str, Any]:
    episode = step = None
    if table is not None and finding.row is not None:
        episode, step = table["episode_id"][finding.row].as_py(), table["step"][finding.row].as_py()
    return {
        "file": f"data/{name}",
        "episode_id": episode,
        "step": step,
        "check": finding.check,
        "severity": finding.severity,
        "message": finding.message,
    }


def _openings(table: pa.Table) -> tuple[float, float] | None:
    values = pc.list_flatten(table["gripper"]).to_numpy()
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else None


def _split_episodes(names: Sequence[str], reports: Sequence[PartReport]) -> list[dict[str, Any]]:
    found, owner = [], dict[str, str]()
    for name, report in zip(names, reports, strict=True):
        for episode in report.edge_episodes:
            if owner.setdefault(episode, name) != name:
                message = f"episode '{episode}' is split between {owner[episode]} and {name}"
                found.append(_whole("order", "error", message, f"data/{name}"))
    return found


def _gripper_spread(reports: Sequence[PartReport]) -> list[dict[str, Any]]:
    openings = [report.openings for report in reports if report.openings is not None]
    if not openings:
        return []
    low, high = min(low for low, _ in openings), max(high for _, high in openings)
    if high - low >= checks.LIMITS.gripper_spread:
        return []
    message = f"every gripper opening lies in [{low:.4g}, {high:.4g}]: metres, or a gripper that never moves?"
    return [_whole("gripper", "warning", message)]


def _counted(opened: dataset.Dataset, reports: Sequence[PartReport]) -> list[dict[str, Any]]:
    rows, promised = sum(report.rows for report in reports), opened.manifest.get("rows_out")
    if rows == promised:
        return []
    return [_whole("file", "error", f"there are {rows} readable rows, the manifest says {promised}", "manifest.json")]


def _whole(check: str, severity: str, message: str, file: str = "data") -> dict[str, Any]:
    return {
        "file": file,
        "episode_id": None,
        "step": None,
        "check": check,
        "severity": severity,
        "message": message,
    }
