"""What a sweep ran on: versions of what computes, and the driver that renders. Knows the installed packages only."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

_PACKAGES = ("dualvla", "numpy", "ray", "torch", "transformers", "sapien", "mani_skill", "mani_skill2")


@dataclass(frozen=True)
class Machine:
    """renderer: the devices as the simulator names them, None if it is not loaded in this process. simulator:
    package -> version in another interpreter, where that one simulates."""

    python: str
    system: str
    packages: dict[str, str]
    renderer: str | None
    simulator: dict[str, str]


def machine(simulator: Mapping[str, str] | None = None) -> Machine:
    """Of this process: call it where the simulator runs."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Machine(platform.python_version(), platform.platform(), packages, _renderer(), dict(simulator or {}))


def _renderer() -> str | None:
    sapien = sys.modules.get("sapien")
    if sapien is None:
        return None
    summary = sapien.render.get_device_summary()
    names = [line.partition(":")[2].strip() for line in summary.splitlines() if line.startswith("GPU:")]
    return ", ".join(names) or None
