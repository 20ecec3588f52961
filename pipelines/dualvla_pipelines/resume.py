"""The trainer's resume states, on a disk or in an object store: whole or not there, and never loaded as a policy.

A state is a folder `step-00000200-...` of files from all workers. Its record, with the hash of every file, is written
last, in one atomic write: a folder without a record is unfinished, one whose files disagree with it is damaged, and
neither is ever used. They hold pickled optimiser state, so nothing is loaded but from the run's own folder. Knows
nothing of what is in the files, nor of how workers talk to each other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualvla.errors import DataError
from dualvla.io import storage

log = logging.getLogger(__name__)

_RECORD = "hashes.json"
_NAME = re.compile(r"step-(\d+)(-\w+)?")
_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Saved:
    """A state whose record is there. files: path within it -> sha256. facts: what the trainer wrote of it."""

    step: int
    url: str
    files: Mapping[str, str]
    facts: dict[str, Any]


def open_new(root: str, step: int) -> str:
    """The URL of a folder to fill, which is no state until `commit`. Called by one worker.

    Its name is new each time: workers of a driver that was killed live on for up to a minute, and must not meet ours.
    """
    url = storage.join(root, f"step-{step:08d}-{uuid.uuid4().hex[:8]}")
    if storage.is_local(url):
        with storage.writing(url):
            Path(url).mkdir(parents=True)
    return url


def put(folder: Path, url: str, mine: Callable[[str], bool]) -> dict[str, str]:
    """Brings the files below `folder` that are `mine` (by path within it) to `url`; path -> sha256 of each.

    On a disk they lie there already (`folder` is `url`). Raises: StorageError, OutputError.
    """
    names = [name for name in _below(folder) if mine(name)]
    if not storage.is_local(url):
        for name in names:
            storage.upload(folder / name, storage.join(url, name))
    return {name: _digest(folder / name) for name in names}


def commit(url: str, step: int, files: Mapping[str, str], facts: Mapping[str, Any], keep: int) -> None:
    """Makes a filled folder a state, and drops all but the last `keep`. Called by one worker, after all `put`."""
    record = {"step": step, "files": dict(files), "facts": dict(facts)}
    storage.write_bytes(storage.join(url, _RECORD), json.dumps(record, indent=2, sort_keys=True).encode())
    root = url.rsplit("/", 1)[0]
    finished = [folder for folder in _folders(root) if storage.exists(storage.join(folder, _RECORD))]
    for old in finished[:-keep]:
        _remove(old)


def discard_unfinished(root: str) -> None:
    """Removes what was never committed. Called by one worker, before it opens any."""
    for folder in _folders(root):
        if not storage.exists(storage.join(folder, _RECORD)):
            storage.remove_tree(folder)


def states(root: str) -> list[Saved]:
    """The committed states, newest first. Those whose record cannot be read are passed over with a warning."""
    found = []
    for url in reversed(_folders(root)):
        try:
            record = json.loads(storage.read_bytes(storage.join(url, _RECORD)))
            found.append(Saved(record["step"], url, record["files"], record["facts"]))
        except (DataError, ValueError, KeyError):
            log.warning("'%s' has no record of what it holds: passing it over", url)
    return found


def get(saved: Saved, wanted: Iterable[str], scratch: Path) -> Path | None:
    """A folder on this machine with the wanted files of a state (of `files`), each compared with its hash.

    None if one is damaged. In an object store they are copied into `scratch`; on a disk they are used where they lie.
    """
    local = storage.is_local(saved.url)
    folder = Path(saved.url) if local else scratch
    for name in wanted:
        try:
            if not local:
                _download(storage.join(saved.url, name), folder / name)
            whole = _digest(folder / name) == saved.files[name]
        except (DataError, OSError):
            whole = False
        if not whole:
            log.warning("'%s' is damaged: resuming from an earlier state", storage.join(saved.url, name))
            return None
    return folder


def _download(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.open_reader(url) as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target, _CHUNK_BYTES)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _remove(url: str) -> None:
    """Its record first: what is half removed is no state."""
    storage.remove(storage.join(url, _RECORD))
    storage.remove_tree(url)


def _folders(root: str) -> Sequence[str]:
    """Every folder named like a state, oldest first."""
    named = ((_NAME.fullmatch(url.rsplit("/", 1)[-1]), url) for url in storage.list_folders(root))
    return [url for _, url in sorted((int(match[1]), url) for match, url in named if match)]
