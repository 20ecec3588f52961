"""Exactly the installed DualVLA as folders that a job brings along, and the versions of what it was tested with here.

What is shipped is what `import dualvla` finds, by the list of the installed packages: never the folder a person happens
to stand in. Knows no cluster.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from dualvla.cli import GROUP
from dualvla.errors import PlatformError

DISTRIBUTION = "dualvla"
_LEFT_OUT = ("__pycache__", "*.pyc", ".*")
_METADATA = ("METADATA", "entry_points.txt", "WHEEL", "top_level.txt")
_DEPENDENCY = re.compile(r"^(?P<name>[\w.-]+)(?!.*extra == .dev.)")
_OURS = (DISTRIBUTION, "ray")  # one is shipped; the other cannot be another than the cluster's
_EXACT = re.compile(r"^(?P<name>[\w.-]+)(?:\[[^]]*\])?==(?P<version>[^ ;,]+)")


def unpack(folder: Path) -> list[Path]:
    """Copies the installed packages and their metadata (which names the commands) into `folder`, one folder each.

    Raises: PlatformError if DualVLA runs from somewhere without being installed.
    """
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError as error:
        raise PlatformError("DualVLA is not installed here.", "pip install it, then submit") from error
    parts = []
    for name in packages():
        spec = find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise PlatformError(f"Package '{name}' is not installed here.", 'pip install "dualvla[all]"')
        parts.append(folder / name)
        shutil.copytree(spec.submodule_search_locations[0], parts[-1], ignore=shutil.ignore_patterns(*_LEFT_OUT))
    parts.append(folder / f"{DISTRIBUTION}-{distribution.version}.dist-info")
    parts[-1].mkdir()
    for file in _METADATA:
        text = distribution.read_text(file)
        if text is not None:
            (parts[-1] / file).write_text(text)
    return parts


def packages() -> list[str]:
    """Of this distribution, by the commands it registers."""
    return sorted({DISTRIBUTION, *(e.module.split(".")[0] for e in metadata.entry_points(group=GROUP))})


def digest(parts: list[Path]) -> str:
    """sha256 of all shipped files and their names: which code a job ran."""
    found = hashlib.sha256()
    for part in parts:
        for file in sorted(p for p in part.rglob("*") if p.is_file()):
            found.update(f"{file.relative_to(part.parent)}\0{file.stat().st_size}\0".encode())
            found.update(file.read_bytes())
    return found.hexdigest()


def pinned() -> dict[str, str]:
    """Package -> version here, of every dependency that the project pins exactly, and Python's."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for requirement in metadata.requires(DISTRIBUTION) or []:
        match = _EXACT.match(requirement)
        version = match and installed(match["name"])
        if match and version:
            found[match["name"].lower()] = version
    return found


def requirements() -> list[str]:
    """`name==version` of every direct dependency that is installed here, for pip: the environment of this machine."""
    matches = [_DEPENDENCY.match(requirement) for requirement in metadata.requires(DISTRIBUTION) or []]
    names = {match["name"].lower() for match in matches if match}
    found = {name: installed(name) for name in names if name not in _OURS}
    return sorted(f"{name}=={version}" for name, version in found.items() if version)


def installed(name: str) -> str | None:
    """The version without its local part: 2.13.0+cpu and 2.13.0+cu130 are one version of torch."""
    try:
        return metadata.version(name).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


def check(expected: Mapping[str, str]) -> None:
    """Compares what is installed here, on the cluster, with `pinned()` of who submitted.

    Raises: PlatformError naming every package that differs or is missing.
    """
    here = {name: pinned()["python"] if name == "python" else installed(name) for name in expected}
    wrong = [f"{n} {here[n] or 'is missing'} (expected {v})" for n, v in expected.items() if here[n] != v]
    if wrong:
        raise PlatformError(
            f"This cluster's environment is not the one that the job was submitted from: {', '.join(wrong)}.",
            "use the image of that version, or submit with --environment pinned",
        )
