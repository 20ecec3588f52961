"""What ran and where it lies: finished and unfinished folders below some roots, and which was made from which.

An input is named by the sha256 of its folder's manifest, which in turn names its inputs and its files; so a chain of
equal hashes from a policy to the first data set says what the policy has seen. Knows manifests only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dualvla.errors import DataError
from dualvla.io import manifest, storage

_DEEPEST = 6
_NOT_FOLDERS_OF_RUNS = ("parts", "videos", "trajectories", "data", "quarantine", "resume", "failed")
_SHA256 = 64
_RAW = ("source", "annotations")  # what `ingest` was given: other people's files, known by a fingerprint alone


@dataclass(frozen=True)
class Record:
    """A folder that a command made or is making. digest: of its manifest, by which others name it; "" unfinished.
    at: when it was finished, or begun, in seconds since the epoch. facts: the rest of the manifest."""

    folder: str
    kind: str
    digest: str
    at: float
    code_version: str
    inputs: dict[str, str]
    facts: dict[str, Any]

    @property
    def finished(self) -> bool:
        return bool(self.digest)


@dataclass(frozen=True)
class Node:
    """One link of a lineage: how it is called as an input, its record (None: in no root), and what it was made from."""

    role: str
    digest: str
    record: Record | None
    inputs: list[Node] = field(default_factory=list)

    @property
    def raw(self) -> bool:
        """Files from outside, where every lineage ends."""
        return self.record is None and self.role in _RAW


def find(roots: Sequence[str]) -> list[Record]:
    """All records below the roots, in order of folder. Raises: DataError for a root that is not there."""
    found: dict[str, Record] = {}
    for root in roots:
        if not storage.exists(root):
            raise DataError(f"'{root}' does not exist.", "name the folder or URL that runs lie below")
        for folder in _folders(root, _DEEPEST):
            record = read(folder)
            if record is not None:
                found[folder] = record
    return [found[folder] for folder in sorted(found)]


def _folders(root: str, depth: int) -> Iterator[str]:
    yield root.rstrip("/")
    if depth:
        for folder in storage.list_folders(root):
            inside = folder.rsplit("/", 1)[-1]
            # A data set's parts lie in data/, but a run calls its data set so, too.
            if inside not in _NOT_FOLDERS_OF_RUNS or storage.exists(storage.join(folder, manifest.NAME)):
                yield from _folders(folder, depth - 1)


def read(folder: str) -> Record | None:
    """None if no command has claimed the folder."""
    for name in (manifest.NAME, manifest.STARTED):
        url = storage.join(folder, name)
        if storage.exists(url):
            content = json.loads(storage.read_bytes(url))
            known = ("kind", "code_version", "inputs")
            return Record(
                folder=folder,
                kind=content["kind"],
                digest=manifest.file_digest(url) if name == manifest.NAME else "",
                at=storage.modified_s(url),
                code_version=content.get("code_version", "-"),
                inputs=content["inputs"],
                facts={key: value for key, value in content.items() if key not in known},
            )
    return None


def lineage(record: Record, records: Sequence[Record]) -> Node:
    """The record and all it was made from, back to what was made from nothing of ours."""
    by_digest = {r.digest: r for r in records if r.finished}

    def node(role: str, digest: str) -> Node:
        found = by_digest.get(digest)
        return Node(role, digest, found, inputs(found))

    def inputs(of: Record | None) -> list[Node]:
        if of is None:
            return []
        # Built-in policies are inputs by name, not by digest.
        return [node(role, digest) for role, digest in sorted(of.inputs.items()) if len(digest) == _SHA256]

    return Node(record.kind, record.digest, record, inputs(record))


def served(version: str, records: Sequence[Record]) -> Record:
    """The checkpoint whose weights an endpoint calls `version`. Raises: DataError if no root holds it."""
    for record in records:
        files = record.facts.get("files", {})
        weights = sorted(name for name in files if name.endswith(".safetensors"))
        if record.kind == "checkpoint" and weights and "config.json" in files:
            digests = [files[name] for name in ("config.json", *weights)]
            if manifest.digest(digests)[:12] == version:
                return record
    raise DataError(f"No checkpoint of version '{version}' lies below the roots.", "name more roots with --root")


def damaged(record: Record) -> list[str]:
    """Files of a finished folder that are missing, or are not what its manifest says."""
    wrong = []
    for name, digest in record.facts.get("files", {}).items():
        urls = [storage.join(record.folder, *parts) for parts in ((name,), ("data", name))]
        there = [url for url in urls if storage.exists(url)]
        if not there or manifest.file_digest(there[0]) != digest:
            wrong.append(name)
    return wrong


def walk(node: Node, depth: int = 0) -> Iterator[tuple[int, Node]]:
    yield depth, node
    for child in node.inputs:
        yield from walk(child, depth + 1)


def what(node: Node) -> str:
    if node.record is not None:
        return describe(node.record)
    return "raw files" if node.raw else "in none of the roots"


def describe(record: Record) -> str:
    """What a person wants to know of it in a few words."""
    facts = record.facts
    said = [
        f"{facts[name]} {text}"
        for name, text in (
            ("rows_out", "rows"), ("rows_quarantined", "quarantined"), ("episodes", "episodes"), ("steps", "steps"),
            ("suite", "suite"), ("mode", "pruning"),
        )
        if facts.get(name)
    ]  # fmt: skip
    config: Mapping[str, Any] = facts.get("config", {})
    said += [f"{name} {config[name]}" for name in ("stage", "seed") if isinstance(config.get(name), (str, int))]
    return ", ".join(said)
