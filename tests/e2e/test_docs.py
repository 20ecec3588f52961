"""Commands shown to readers work: every `dualvla` line of README and docs parses, and README's walk-through runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dualvla import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WALK_THROUGH = "Step by step"


def shell_blocks(text: str) -> list[str]:
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for block in blocks]


def commands() -> list[tuple[str, str]]:
    lines = [(page.name, line) for page in PAGES for b in shell_blocks(page.read_text()) for line in b.splitlines()]
    return [(page, line) for page, line in lines if line.startswith("dualvla ")]


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_shown_in_the_docs_parses(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    if words and not words[0].startswith("-") and "--help" not in words and words[0] != "COMMAND":
        cli.parse(words[0], words[1:])


def test_make_targets_shown_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {t for page in PAGES for t in re.findall(r"\bmake ([a-z-]+)`", page.read_text())}
    shown |= {
        t for page in PAGES for b in shell_blocks(page.read_text()) for t in re.findall(r"^make ([a-z-]+)", b, re.M)
    }
    assert shown <= targets


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.timeout(1200)
def test_the_walk_through_of_the_readme_runs(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split(f"## {WALK_THROUGH}", 1)[1].split("\n## ", 1)[0]
    script = "set -e\n" + "\n".join(shell_blocks(section))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PATH": path}, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "report" / "index.html").exists()


_NEED_AN_ENDPOINT = {"robot_loop.py", "sim_robot.py"}  # run in tests/serve/test_examples.py


@pytest.mark.parametrize("example", sorted({p.name for p in (ROOT / "examples").glob("*.py")} - _NEED_AN_ENDPOINT))
def test_examples_run(example: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example)], cwd=tmp_path, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
