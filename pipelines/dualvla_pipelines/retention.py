"""What may be deleted of old runs, and deleting it: by rules, shown first, and never what something kept was made from.

A folder goes with its manifest first: whatever interrupts it, what is left is an unfinished folder, never a finished
one that lacks files. Knows records (`lineage`) and nothing of what is in a folder.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dualvla.errors import UsageError
from dualvla.io import manifest, storage
from dualvla_pipelines.lineage import Record

_DAY_S = 86400.0
_CHECKPOINT, _CACHE = "checkpoint", "teacher-cache"


@dataclass(frozen=True)
class Retention:
    """keep: newest checkpoints of a stage and parent folder that stay. cache_days, unfinished_days: so long untouched,
    a teacher cache (it can be made again) or a folder that no command has finished goes."""

    keep: int = 3
    cache_days: float = 14.0
    unfinished_days: float = 7.0

    def __post_init__(self) -> None:
        if self.keep < 1 or self.cache_days < 0 or self.unfinished_days < 0:
            raise UsageError("A retention that keeps no checkpoint, or of negative days.", "pass --keep 1 or more")


@dataclass(frozen=True)
class Doomed:
    """A folder that may go, why, and how large it is."""

    record: Record
    reason: str
    size_bytes: int


def choose(records: Sequence[Record], rules: Retention, now: float | None = None) -> list[Doomed]:
    """What the rules let go. What a folder that stays was made from stays, whatever its age; not so caches, which can
    be made again."""
    now = time.time() if now is None else now
    found: dict[str, tuple[Record, str]] = {}
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        age_days = (now - record.at) / _DAY_S
        if not record.finished:
            if age_days > rules.unfinished_days and not _holds_finished(record, records):
                found[record.folder] = record, f"unfinished for {age_days:.0f} days"
        elif record.kind == _CACHE:
            if age_days > rules.cache_days:
                found[record.folder] = record, f"cache untouched for {age_days:.0f} days"
        elif record.kind == _CHECKPOINT:
            stage = str(record.facts.get("config", {}).get("stage", ""))
            groups[record.folder.rsplit("/", 1)[0], stage].append(record)
    for group in groups.values():
        for record in sorted(group, key=lambda r: r.at, reverse=True)[rules.keep :]:
            found[record.folder] = record, f"older than the newest {rules.keep} of its stage"
    while True:  # a checkpoint that goes frees what it was made from
        needed = {d for r in records if r.folder not in found and r.finished for d in r.inputs.values()}
        kept = [f for f, (r, _) in found.items() if r.digest in needed and r.kind != _CACHE]
        if not kept:
            break
        for folder in kept:
            del found[folder]
    return [Doomed(record, reason, size(record.folder)) for record, reason in found.values()]


def _holds_finished(record: Record, records: Iterable[Record]) -> bool:
    return any(r.finished and r.folder.startswith(f"{record.folder}/") for r in records)


def size(folder: str) -> int:
    """Bytes below it."""
    below = sum(size(inner) for inner in storage.list_folders(folder))
    return below + sum(storage.file_sizes(folder).values())


def delete(doomed: Iterable[Doomed]) -> None:
    for item in doomed:
        storage.remove(storage.join(item.record.folder, manifest.NAME))
        storage.remove_tree(item.record.folder)
