"""The trainer's resume state: folders `step-00000200` that appear whole, are read only if their hashes agree, and are
never loaded as a policy. Knows nothing of what is in them.

They hold pickled optimiser state, so nothing is ever loaded from anywhere but the run's own folder.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualvla.io import manifest, storage

log = logging.getLogger(__name__)

_HASHES = "hashes.json"
_HIDDEN = ".unfinished-"
_KEEP = 2


@dataclass(frozen=True)
class Saved:
    step: int
    folder: Path
    facts: dict[str, Any]


def open_new(root: Path, step: int) -> Path:
    """An empty folder to fill, which no reader sees until `commit`. Called by one worker.

    Its name is new each time: workers of a driver that was killed live on for up to a minute, and must not meet ours.
    """
    with storage.writing(str(root)):
        root.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{_HIDDEN}{step:08d}-", dir=root))


def discard_unfinished(root: Path) -> None:
    """Removes what was never committed. Called by one worker, before it opens any."""
    for folder in root.glob(f"{_HIDDEN}*"):
        shutil.rmtree(folder, ignore_errors=True)


def commit(folder: Path, step: int, facts: dict[str, Any]) -> None:
    """Makes a filled folder of `open_new` the newest state, and drops all but the last two. Called by one worker."""
    root = folder.parent
    hashes = {str(p.relative_to(folder)): manifest.file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    record = {"step": step, "files": hashes, "facts": facts}
    storage.write_bytes(folder / _HASHES, json.dumps(record, indent=2, sort_keys=True).encode())
    final = _visible(root, step)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(folder, final)
    for old in _steps(root)[:-_KEEP]:
        shutil.rmtree(_visible(root, old))


def newest(root: Path) -> Saved | None:
    """The last state whose hashes agree; damaged ones are passed over with a warning."""
    for step in reversed(_steps(root)):
        saved = _read(_visible(root, step))
        if saved is not None:
            return saved
        log.warning("'%s' is damaged: resuming from an earlier state", _visible(root, step))
    return None


def _read(folder: Path) -> Saved | None:
    try:
        record = json.loads((folder / _HASHES).read_text())
        agree = all(manifest.file_digest(folder / name) == digest for name, digest in record["files"].items())
    except (OSError, json.JSONDecodeError, manifest.DataError):
        return None
    return Saved(record["step"], folder, record["facts"]) if agree else None


def _steps(root: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in root.glob("step-*") if p.is_dir())


def _visible(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"
