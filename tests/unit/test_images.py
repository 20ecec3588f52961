"""The images: their Dockerfiles' steps run as they stand, pinned to what is tested, and nobody in them is root."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dualvla_cluster import manifests, shipping

DOCKER = Path(__file__).parents[2] / "infra" / "docker"
IMAGES = ("train", "sim", "serve")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_two_stages_a_pinned_base_and_a_user_of_its_own(image: str) -> None:
    steps = script("check").parse((DOCKER / f"{image}.Dockerfile").read_text())
    assert [s.rest for s in steps if s.word == "FROM"] == ["${BASE} AS build", "${BASE}"]
    (base,) = [s.rest for s in steps if s.word == "ARG" and s.rest.startswith("BASE=")]
    assert re.fullmatch(r"BASE=python:\d+\.\d+\.\d+-slim-\w+", base)
    (user,) = [s.rest for s in steps if s.word == "USER"]
    assert user == f"{manifests.USER}:{manifests.USER}"
    assert f"--uid {manifests.USER}" in str(steps)
    last = [s for s in steps if s.stage == 1]
    assert not [s for s in last if "g++" in s.rest]  # compilers stay in the first stage
    assert all("--constraint" in s.rest for s in steps if "pip install" in s.rest)


def test_the_pins_are_those_of_the_project() -> None:
    lines = (DOCKER / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for name, version in shipping.pinned().items():
        if name != "python":
            assert pins[name.replace("_", "-")] == version, "run `python infra/docker/lock.py` after a change of pins"


def test_a_dockerfile_that_the_check_cannot_follow_is_refused() -> None:
    with pytest.raises(ValueError, match="ADD"):
        script("check").parse("FROM x\nADD https://a b")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("image", IMAGES)
def test_every_step_of_an_image_runs_in_a_clean_folder(image: str, tmp_path: Path) -> None:
    """The packages are resolved and not installed: five gigabytes belong into an image, not into a test."""
    command = [sys.executable, str(DOCKER / "check.py"), image, "--folder", str(tmp_path / image), "--resolve"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = script("check").parse((DOCKER / f"{image}.Dockerfile").read_text())
    for step in steps:
        if step.word == "RUN":
            assert step.rest in done.stdout
