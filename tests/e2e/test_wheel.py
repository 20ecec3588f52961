"""The wheel on its own: installed away from the checkout, it holds everything that a whole evaluation reads."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_our_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    packages = {"dualvla", "dualvla_cluster", "dualvla_pipelines", "dualvla_eval", "dualvla_serve"}
    assert {root for root in roots if not root.endswith(".dist-info")} == packages
    assert {f"{package}/py.typed" for package in packages} <= set(names)


@pytest.mark.slow
@pytest.mark.sim
def test_installed_wheel_evaluates_scores_and_reports(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    # The heavy packages come from this environment; its editable install does not, because a path added by a .pth file
    # has its own .pth files ignored.
    site = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (site / "heavy.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*install, "--ignore-installed", str(wheel)], check=True, capture_output=True)

    def dualvla(*argv: str) -> dict[str, object]:
        command = [environment / "bin" / "dualvla", *argv, "--json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    where = "import dualvla, dualvla_eval; print(dualvla.__file__, dualvla_eval.__file__)"
    found = subprocess.run([python, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert all(path.startswith(str(site)) for path in found.split())

    dualvla(
        "eval", "--policy", "expert", "--suite", "blocks", "--tasks", "touch", "--episodes", "2", "--out", "rollouts"
    )
    summary = json.loads((tmp_path / "rollouts" / "summary.json").read_text())
    assert summary["policies"]["expert"]["tasks"]["touch"]["n"] == 2
    dualvla("score", "rollouts", "--judge", "rubric")
    dualvla("report", "rollouts", "--out", "page")
    assert "<html" in (tmp_path / "page" / "index.html").read_text()
