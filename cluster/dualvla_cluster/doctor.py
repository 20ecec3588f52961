"""`dualvla doctor`: every prerequisite checked by using it, each failure with its fix.

Knows how to run the probes apart from each other and what remedies them; what a probe does is `probes.py`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from dualvla import console
from dualvla.errors import PlatformError
from dualvla.io.assets import assets_folder, has_assets
from dualvla_cluster import driver

_PYTHONS = ((3, 11), (3, 12))
_FREE_DISK_GB = 5.0
_PROBE_LIMIT_S = 300.0
_NO_DRIVER_PLAN = "install a Vulkan driver (Mesa 23 or newer has one for CPUs)"


@dataclass(frozen=True)
class Check:
    """One line of the table. fix: what to do, None if nothing."""

    name: str
    ok: bool
    detail: str
    fix: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Probe:
    """A probe of `probes.PROBES`, the extra that brings what it needs, and the fix if that is there and fails."""

    key: str
    name: str
    extra: str
    fix: str

    def run(self) -> Check:
        started = time.monotonic()
        command = [sys.executable, "-m", "dualvla_cluster.probes", self.key]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            detail = f"no answer after {_PROBE_LIMIT_S:.0f} s"
            return Check(self.name, False, detail, "run it again when this machine is less busy", _PROBE_LIMIT_S)
        seconds = round(time.monotonic() - started, 1)
        if done.returncode == 0:
            return Check(self.name, True, done.stdout.strip().splitlines()[-1], seconds=seconds)
        last = (done.stderr.strip().splitlines() or [""])[-1].strip()
        if done.returncode < 0:
            return Check(self.name, False, f"crashed (signal {-done.returncode}) {last}".rstrip(), self.fix, seconds)
        missing = last.startswith("ModuleNotFoundError")
        return Check(self.name, False, last, f'pip install "dualvla[{self.extra}]"' if missing else self.fix, seconds)


def render_probe() -> Probe:
    found = driver.plan()
    return Probe("render", "rendering", "sim", found.shell() if found else _NO_DRIVER_PLAN)


def probes() -> tuple[Probe, ...]:
    return (
        Probe("torch", "torch", "train", 'pip install --force-reinstall "dualvla[train]"'),
        render_probe(),
        Probe("ray", "Ray", "data", "unset RAY_ADDRESS for a private Ray, or start that head with `ray start --head`"),
        Probe("zero3", "DeepSpeed", "train", 'pip install --force-reinstall --no-deps "deepspeed==0.19.8"'),
        Probe("video", "video", "sim", 'pip install --force-reinstall "av>=14"'),
    )


def examine(install_driver: bool = False) -> dict[str, Any]:
    """Runs all checks. install_driver: where no frame renders, installs the Vulkan driver first if this user may.

    Returns `{"ok", "checks": [{"name", "ok", "detail", "fix", "seconds"}]}`.
    """
    driver_check = [_install_driver()] if install_driver else []
    found = probes()
    with console.progress("doctor", len(found)) as advance, ThreadPoolExecutor(max_workers=2) as pool:
        futures = [pool.submit(probe.run) for probe in found]
        checks = []
        for future in futures:
            checks.append(future.result())
            advance(1)
    checks = [_python(), *driver_check, *checks, _disk(), _assets()]
    return {"ok": all(check.ok for check in checks), "checks": [asdict(check) for check in checks]}


def _install_driver() -> Check:
    name = "Vulkan driver"
    if render_probe().run().ok:
        return Check(name, True, "works already, nothing installed")
    found = driver.plan()
    if found is None:
        return Check(name, False, "cannot be installed from here: no apt source to take it from", _NO_DRIVER_PLAN)
    try:
        driver.install(found)
    except PlatformError as error:
        return Check(name, False, error.message, error.fix)
    return Check(name, True, "installed")


def _python() -> Check:
    ok = sys.version_info[:2] in _PYTHONS
    fix = None if ok else f"use Python {' or '.join(f'{major}.{minor}' for major, minor in _PYTHONS)}"
    return Check("Python", ok, f"{platform.python_version()} on {platform.platform()}", fix)


def _disk() -> Check:
    """Ray spills to the temporary folder, results go to the current one."""
    free = {folder: shutil.disk_usage(folder).free / 1e9 for folder in (os.getcwd(), tempfile.gettempdir())}
    ok = all(gigabytes >= _FREE_DISK_GB for gigabytes in free.values())
    detail = ", ".join(f"{gigabytes:.0f} GB free in {folder}" for folder, gigabytes in free.items())
    return Check("disk", ok, detail, None if ok else f"free {_FREE_DISK_GB:.0f} GB in each, or set TMPDIR")


def _assets() -> Check:
    """Suite `blocks` uses what the mani_skill package carries; only the suites `simpler-*` need files of their own."""
    folder = assets_folder()
    if has_assets(folder):
        return Check("assets", True, f"SimplerEnv's are in {folder}; `blocks` needs none")
    return Check("assets", True, f"suite `blocks` needs none; SimplerEnv's are not in {folder}: `dualvla assets fetch`")
