"""The interpreter that has the original simulators: found by name, made with pip, looked into before anything runs.

Knows processes and packages; no Ray, no task. `ray` there must be ours, as it runs an actor of ours, and so must the
minor version of Python; numpy is another one: SAPIEN 2 crashes with numpy 2.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Literal

from dualvla.errors import PlatformError
from dualvla_eval.maniskill2 import original

log = logging.getLogger(__name__)

Package = Literal["mani_skill2", "simpler_env"]

VARIABLE = "DUALVLA_MANISKILL2_PYTHON"
PINS = {"mani_skill2": "0.5.3", "sapien": "2.2.2"}
_LAYER = "VK_LAYER_DUALVLA_no_semaphore_fd"
_PROBE = f"import json, sys\n{inspect.getsource(original.versions)}\nprint(json.dumps(versions()))"
_TOLD_LINES = 12


@dataclass(frozen=True)
class Interpreter:
    """python: the program. packages: name -> version, of what simulates."""

    python: str
    packages: Mapping[str, str]

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of a process that renders: no window, and a CPU driver that lacks one extension."""
        layer = Path(self.python).parent.parent / "vulkan"
        found = {"DISPLAY": ""}
        if (layer / f"{_LAYER}.json").is_file():
            found |= {"VK_LAYER_PATH": str(layer), "VK_INSTANCE_LAYERS": _LAYER}
        return found


def folder(chosen: str | None = None) -> Path:
    """Of the environment that `dualvla maniskill2` makes: chosen, else in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualvla" / "maniskill2"
    return Path(chosen or cache).expanduser().absolute()


def find(package: Package, python: str | None = None) -> Interpreter:
    """`python`, else what DUALVLA_MANISKILL2_PYTHON names, else that of `folder()`: with the package and its pins.

    Raises: PlatformError naming what is missing.
    """
    python = python or os.environ.get(VARIABLE) or str(folder() / "bin" / "python")
    fix = f"run `dualvla maniskill2`, or let {VARIABLE} name a Python that has it"
    if shutil.which(python) is None:
        raise PlatformError(f"The original simulators have no interpreter here: '{python}' does not exist.", fix)
    done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=False, cwd="/")
    if done.returncode:
        raise PlatformError(f"'{python}' does not run: {done.stderr.strip()[-400:]}", fix)
    packages: dict[str, str] = json.loads(done.stdout)
    needed = {"ray": metadata.version("ray"), "sapien": PINS["sapien"]}
    needed |= {"mani_skill2": PINS["mani_skill2"]} if package == "mani_skill2" else {}
    lacking = [
        f"{name} {v} (it has {packages.get(name, 'none')})" for name, v in needed.items() if packages.get(name) != v
    ]
    ours = "{}.{}".format(*sys.version_info)
    if packages["python"].rsplit(".", 1)[0] != ours:
        lacking.insert(0, f"Python {ours} (it is {packages['python']})")
    if package == "simpler_env" and package not in packages:
        lacking.append(package)
        fix = "install SimplerEnv there: docs/evaluation.md has the commands"
    if lacking:
        raise PlatformError(f"'{python}' lacks {', '.join(lacking)}.", fix)
    return Interpreter(python, packages)


def make(into: Path, python: str) -> Interpreter:
    """Makes the environment in the folder `into`, from scratch. python: of a version that SAPIEN 2 has a wheel for.

    mani-skill2 and SAPIEN go in without their dependencies, as mani-skill2 asks for a numpy that has no place beside
    ours; what they use of them stands in requirements.txt. Raises: PlatformError with what pip said.
    """
    shutil.rmtree(into, ignore_errors=True)
    pip = [str(into / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    needed = resources.files(original.__package__).joinpath("requirements.txt")
    simulators = [f"{name.replace('_', '-')}=={version}" for name, version in PINS.items()]
    with resources.as_file(needed) as requirements:
        _run([python, "-m", "venv", str(into)])
        _run([*pip, f"ray=={metadata.version('ray')}", "-r", str(requirements)])
        _run([*pip, "--no-deps", *simulators])
    _make_layer(into / "vulkan")
    return find("mani_skill2", str(into / "bin" / "python"))


def _make_layer(into: Path) -> None:
    """SAPIEN 2 asks every Vulkan driver for an extension that Mesa's CPU driver lacks, and uses it with CUDA only.

    The layer takes it off the list where the driver lacks it. Without a C compiler SAPIEN 2 needs a GPU.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        log.warning("there is no C compiler (cc), so the original simulators will render on a GPU only")
        return
    into.mkdir(parents=True)
    with resources.as_file(resources.files(original.__package__).joinpath("vulkan_layer.c")) as source:
        _run([compiler, "-O1", "-shared", "-fPIC", "-o", str(into / "layer.so"), str(source)])
    layer = {
        "name": _LAYER,
        "type": "GLOBAL",
        "library_path": "./layer.so",
        "api_version": "1.3.0",
        "implementation_version": "1",
        "description": "Lets SAPIEN 2 render on drivers without VK_KHR_external_semaphore_fd",
        "device_extensions": [{"name": "VK_KHR_external_semaphore_fd", "spec_version": "1"}],
    }
    described = {"file_format_version": "1.1.0", "layer": layer}
    (into / f"{_LAYER}.json").write_text(json.dumps(described), "utf-8")


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        told = "\n".join(done.stdout.strip().splitlines()[-_TOLD_LINES:])
        raise PlatformError(
            f"`{' '.join(command)}` failed:\n{told}",
            "SAPIEN 2.2.2 has wheels for Python 3.7 to 3.11; pip needs a registry that has mani-skill2",
        )
