"""Writes constraints.txt: the version of every package that `dualvla[all]` brings, as installed here.

    python infra/docker/lock.py

Local parts (+cpu) are left out: which build of torch is taken is the machine's affair. Knows installed packages only.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

_EXTRAS = ("data", "train", "sim", "serve", "judge", "track")


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def closure() -> dict[str, str]:
    """Package -> version, of all that the extras need on this platform, and of what those need."""
    found: dict[str, str] = {}
    waiting = [("dualvla", frozenset(_EXTRAS))]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
                continue
            needed = name_of(requirement.name)
            try:
                version = metadata.version(needed)
            except metadata.PackageNotFoundError:
                continue  # of another platform, or of an extra of an extra
            if needed != "dualvla":
                found[needed] = version.split("+")[0]
            waiting.append((needed, frozenset(requirement.extras)))
    return found


def text() -> str:
    lines = [f"{name}=={version}" for name, version in sorted(closure().items())]
    return "\n".join(["# Made by infra/docker/lock.py from a set whose tests pass.", *lines]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("constraints.txt").write_text(text())
