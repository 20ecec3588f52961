"""Where the Vulkan driver comes from, on the systems a user may have."""

import os
from pathlib import Path

import pytest

from dualvla.errors import PlatformError
from dualvla_cluster import driver

ONE_LINE = """\
# deb http://old.example/debian bookworm main
deb-src http://mirror.example/debian bookworm main
deb [arch=amd64 signed-by=/keys/debian.gpg] http://mirror.example/debian bookworm main contrib # the usual
deb http://other.example/apt stable main
"""
DEB822 = """\
Types: deb
URIs: https://tools.example/apt
Suites: nodistro
Components: main

# comment
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /keys/debian.gpg
"""
BACKPORTS = "\nTypes: deb\nURIs: http://mirror.example/debian\nSuites: bookworm-backports\nComponents: main\n"


def machine(folder: Path, codename: str, name: str, sources: str) -> tuple[Path, Path]:
    (folder / "os-release").write_text(f'NAME="Some Linux"\nVERSION_CODENAME={codename}\n')
    file = folder / "apt" / name
    file.parent.mkdir(parents=True)
    file.write_text(sources)
    return folder / "os-release", folder / "apt"


@pytest.mark.parametrize(
    ("name", "sources", "line"),
    [
        (
            "sources.list",
            ONE_LINE,
            "deb [arch=amd64 signed-by=/keys/debian.gpg] http://mirror.example/debian bookworm-backports main",
        ),
        (
            "sources.list.d/debian.sources",
            DEB822,
            "deb [signed-by=/keys/debian.gpg] http://mirror.example/debian bookworm-backports main",
        ),
    ],
)
def test_debian_12_gets_backports_from_its_own_mirror(tmp_path: Path, name: str, sources: str, line: str) -> None:
    plan = driver.plan(*machine(tmp_path, "bookworm", name, sources))
    assert plan is not None
    assert plan.added is not None
    assert plan.added.line() == line
    assert plan.commands[-1][-3:] == ("-t", "bookworm-backports", "mesa-vulkan-drivers")
    assert line in plan.shell()


@pytest.mark.parametrize("disabled", [False, True])
def test_backports_are_not_added_twice(tmp_path: Path, disabled: bool) -> None:
    sources = DEB822 + BACKPORTS + ("Enabled: no\n" if disabled else "")
    plan = driver.plan(*machine(tmp_path, "bookworm", "sources.list.d/debian.sources", sources))
    assert plan is not None
    assert (plan.added is not None) == disabled


def test_newer_systems_take_their_own_driver(tmp_path: Path) -> None:
    plan = driver.plan(*machine(tmp_path, "noble", "sources.list.d/ubuntu.sources", ""))
    assert plan is not None
    assert plan.added is None
    assert "-t" not in plan.commands[-1]
    assert "mesa-vulkan-drivers" in plan.commands[-1]


def test_no_plan_without_apt_or_without_a_source(tmp_path: Path) -> None:
    assert driver.plan(tmp_path / "os-release", tmp_path / "apt") is None
    assert driver.plan(*machine(tmp_path, "bookworm", "sources.list", "")) is None


def test_who_is_not_root_is_told_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = driver.plan(*machine(tmp_path, "bookworm", "sources.list", ONE_LINE))
    assert plan is not None
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PlatformError) as caught:
        driver.install(plan)
    assert caught.value.fix == plan.shell()
    assert plan.shell().startswith("sudo sh -c ")
