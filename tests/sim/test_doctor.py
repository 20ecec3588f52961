"""`dualvla doctor` on this machine: what works is said to work, and what is broken on purpose names its fix."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dualvla import cli
from dualvla_cluster import doctor


@pytest.mark.sim
def test_a_frame_renders() -> None:
    check = doctor.render_probe().run()
    assert check.ok, check.detail
    assert check.fix is None


def test_no_vulkan_device_names_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):
        monkeypatch.setenv(name, os.devnull)
    check = doctor.render_probe().run()
    assert not check.ok
    assert "mesa-vulkan-drivers" in (check.fix or "") or "Vulkan driver" in (check.fix or "")


def test_a_probe_that_crashes_is_a_failed_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.Probe("video", "video", "sim", "repair it").run()
    assert (check.ok, check.fix) == (False, "repair it")
    assert "crashed (signal 11)" in check.detail


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "av.py").write_text("raise ModuleNotFoundError(\"No module named 'av'\", name='av')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.Probe("video", "video", "sim", "repair it").run()
    assert (check.ok, check.fix) == (False, 'pip install "dualvla[sim]"')


@pytest.mark.slow
@pytest.mark.sim
def test_everything_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "everything works" in out
    assert "took a ZeRO-3 step" in out
