"""A folder's `manifest.json`: what made it, from what, and that it is finished.

A folder without a manifest is unfinished. Two runs of the same command on the same inputs have the same `key`; that is
how a re-run knows what to skip, and how an output folder of another run is recognised. Knows storage only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import dualvla
from dualvla.errors import DataError, OutputError
from dualvla.io import storage

NAME = "manifest.json"
STARTED = "started.json"  # what an unfinished folder is being made from


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(url: str | os.PathLike[str]) -> str:
    return hashlib.sha256(storage.read_bytes(url)).hexdigest()


def read(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest, or None if the folder is missing or unfinished."""
    url = storage.join(folder, NAME)
    return _load(url) if storage.exists(url) else None


def require(folder: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The manifest of a finished folder of this kind.

    Raises: DataError if it is missing, unfinished or of another kind.
    """
    if not storage.exists(folder):
        raise DataError(f"'{folder}' does not exist.", f"pass a finished {kind} folder")
    found = read(folder)
    if found is None:
        raise DataError(
            f"'{folder}' is not a finished {kind}: it has no {NAME}.",
            "run the command that makes it again: it resumes",
        )
    if found.get("kind") != kind:
        raise DataError(f"'{folder}' holds a {found.get('kind')}, not a {kind}.", f"pass a {kind} folder")
    return found


def input_digests(folders: Mapping[str, str]) -> dict[str, str]:
    """Name -> sha256 of the input folder's manifest (which in turn names its files' hashes)."""
    return {name: file_digest(storage.join(folder, NAME)) for name, folder in folders.items()}


def begin(folder: str, kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
    """Claims `folder` for one run. True: there is work to do (fresh, or to resume). False: finished with this very key.

    inputs: name -> digest. Raises: OutputError if the folder belongs to another run.
    """
    key = digest({"kind": kind, "config": config, "inputs": inputs})
    for name in (NAME, STARTED):
        url = storage.join(folder, name)
        if not storage.exists(url):
            continue
        found = _load(url)
        if found.get("key") != key:
            raise OutputError(
                f"'{folder}' belongs to another run ({_difference(found, kind, config, inputs)}).",
                "pass another --out, or delete that folder",
            )
        return name != NAME
    _dump(
        storage.join(folder, STARTED),
        {"kind": kind, "key": key, "config": dict(config), "inputs": dict(inputs)},
    )
    return True


def finish(
    folder: str, kind: str, config: Mapping[str, Any], inputs: Mapping[str, str], **facts: Any
) -> dict[str, Any]:
    """Writes the manifest: from now on the folder is finished. `facts` are counts, hashes of files and the like."""
    manifest = {
        "schema_version": 1,
        "kind": kind,
        "key": digest({"kind": kind, "config": config, "inputs": inputs}),
        "code_version": dualvla.__version__,
        "config": dict(config),
        "inputs": dict(inputs),
        **facts,
    }
    storage.remove_leftovers(folder)
    _dump(storage.join(folder, NAME), manifest)
    return manifest


def _difference(found: Mapping[str, Any], kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    if found.get("kind") != kind:
        return f"a {found.get('kind')}, not a {kind}"
    for label, theirs, ours in (
        ("config", found.get("config", {}), config),
        ("input", found.get("inputs", {}), inputs),
    ):
        for name in sorted({*theirs, *ours}):
            if theirs.get(name) != ours.get(name):
                return f"{label} '{name}' is {theirs.get(name)!r} there and {ours.get(name)!r} here"
    return "made by another version"


def _load(url: str) -> dict[str, Any]:
    try:
        return json.loads(storage.read_bytes(url))
    except json.JSONDecodeError as error:
        raise DataError(
            f"'{url}' is not valid JSON: {error}.", "delete that folder and run the command again"
        ) from error


def _dump(url: str, value: Mapping[str, Any]) -> None:
    storage.write_bytes(url, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
