"""Where downloaded assets of simulators lie on this machine. Knows folders only."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "DUALVLA_ASSETS"


def assets_folder(chosen: str | None = None) -> Path:
    """chosen, else DUALVLA_ASSETS, else a folder of the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualvla" / "simplerenv"
    return Path(chosen or os.environ.get(VARIABLE) or cache).expanduser()


def has_assets(folder: Path) -> bool:
    return (folder / "custom").is_dir()
