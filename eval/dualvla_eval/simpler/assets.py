"""Where SimplerEnv's meshes, robots and photographs lie on this machine, and which of them are not upstream's.

Knows folders and file names; nothing of simulators. The files are upstream's `data` folder; `dualvla assets fetch`
brings them (`fetch.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from dualvla.errors import DataError
from dualvla.io.assets import VARIABLE, assets_folder, has_assets

_VISUALS = ("textured.obj", "textured.dae", "textured.glb")  # the original's order
_FIX = f"run `dualvla assets fetch`, or name a folder that has it with --assets or {VARIABLE}"


@dataclass(frozen=True)
class Assets:
    """One folder with `robots`, `custom`, `real_inpainting` and `stages`."""

    root: Path

    @classmethod
    def find(cls, folder: str | None = None) -> Assets:
        """folder, else DUALVLA_ASSETS, else the user's cache. Raises: DataError if there are no assets there."""
        root = assets_folder(folder)
        if not has_assets(root):
            raise DataError(f"SimplerEnv's assets are not in '{root}'.", _FIX)
        return cls(root)

    def path(self, name: str) -> str:
        """The file or folder of that name. Raises: DataError if it is missing."""
        path = self.root / name
        if not path.exists():
            raise DataError(f"SimplerEnv's assets in '{self.root}' lack '{name}'.", _FIX)
        return str(path)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` (`EpisodeSetup.assets`) that are not there."""
        return [name for name in dict.fromkeys(names) if not (self.root / name).exists()]

    def substituted(self, names: Iterable[str]) -> list[str]:
        """Files under `names` that are not upstream's at the pinned commit, and models with nothing to draw, sorted.

        Results computed with any of them are not comparable to published numbers.
        """
        known = upstream().sha256
        files = {str(p.relative_to(self.root)) for name in names for p in _files(self.root / name)}
        invisible = [n for n in names if n.startswith("custom/models/") and self.visual(n.rsplit("/", 1)[-1]) is None]
        return sorted([*invisible, *(f for f in files if known.get(f) != _sha256(str(self.root / f)))])

    def models(self, table: str) -> dict[str, Any]:
        """A table of `custom`: model -> {"bbox": {"min", "max"}, "density", ...}."""
        return _read_json(self.path(f"custom/{table}"))

    def visual(self, model: str) -> str | None:
        """The mesh to draw; None for a model without one, which is then invisible (as in the original)."""
        folder = Path(self.path(f"custom/models/{model}"))
        return next((str(folder / name) for name in _VISUALS if (folder / name).exists()), None)


@cache
def _read_json(path: str) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


@dataclass(frozen=True)
class Upstream:
    """The original's data at the pinned commit. sha256: our name of a file -> its hash."""

    repository: str
    commit: str
    license: str
    sha256: Mapping[str, str]


@cache
def upstream() -> Upstream:
    return Upstream(**json.loads((resources.files("dualvla_eval.simpler") / "upstream_assets.json").read_text()))


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]


@cache
def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
