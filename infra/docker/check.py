"""Runs the steps of a Dockerfile without an engine: each RUN line as it stands, in a folder of its own.

    python infra/docker/check.py train --folder /tmp/image [--resolve]

COPY copies, ARG and ENV are set as an engine would (with paths below the folder); what only root may do (apt-get,
useradd) is asked of the tool without doing it, where it is there. --resolve asks pip for the whole set of packages
without installing them. Prints every line with its seconds; stops at the first that fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# `apt-get -s` resolves against this machine's lists; another Debian, or none, cannot answer and is only told so.
_STAND_INS = {
    "apt-get": '#!/bin/sh\necho "(not run) apt-get $*"\n',
    "useradd": '#!/bin/sh\necho "(not run) useradd $*"\n',
}
_RESOLVE = """#!/bin/sh
case "$1" in
  install) shift; exec "{pip}" install --dry-run --quiet "$@";;
  *) exec "{pip}" "$@";;
esac
"""
_SYSTEM = ("/etc/apt", "/var/lib/apt/lists")


@dataclass(frozen=True)
class Step:
    """One instruction of a Dockerfile, with its stage's number."""

    stage: int
    word: str
    rest: str


def parse(text: str) -> list[Step]:
    """Raises: ValueError for an instruction that this script does not know."""
    steps, stage = [], -1
    for line in re.sub(r"\\\n", "", text).splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        if word not in (
            "ARG", "FROM", "COPY", "RUN", "ENV", "USER", "WORKDIR", "ENTRYPOINT", "CMD", "EXPOSE",
        ):  # fmt: skip
            raise ValueError(f"'{word}' is no instruction this check knows: {line}")
        stage += word == "FROM"
        steps.append(Step(stage, word, rest.strip()))
    return steps


def expand(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda found: values.get(found[1], found[0]), text)


def run(steps: list[Step], folder: Path, resolve: bool) -> None:
    """Raises: subprocess.CalledProcessError at the first step that fails."""
    tools = folder / "stand-ins"
    tools.mkdir(parents=True)
    for name, script in _STAND_INS.items():
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    values: dict[str, str] = {}
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    for step in steps:
        if step.word == "ARG":
            name, _, default = step.rest.partition("=")
            values[name] = str(folder / default.lstrip("/")) if default.startswith("/") else default
            if default == "/etc/apt":
                Path(values[name], "sources.list.d").mkdir(parents=True, exist_ok=True)
        elif step.word == "COPY" and not step.rest.startswith("--from"):
            _copy(ROOT, Path(expand(step.rest.split()[1], values)))
        elif step.word == "RUN":
            line = expand(step.rest, values)
            for path in _SYSTEM:
                line = line.replace(f"rm -rf {path}", f"echo '(not run) rm -rf' {path}")
            started = time.monotonic()
            if not (resolve and line.endswith("dualvla --version")):
                subprocess.run(["sh", "-ec", line], check=True, env=environment, cwd=folder)
            if resolve and line.startswith("python3 -m venv"):
                _only_resolve(Path(line.split()[-1]) / "bin" / "pip")
            print(f"{time.monotonic() - started:7.1f} s  {step.rest}", flush=True)


def _only_resolve(pip: Path) -> None:
    real = pip.with_name("pip-of-this-folder")
    pip.rename(real)
    pip.write_text(_RESOLVE.format(pip=real))
    pip.chmod(0o755)


def _copy(source: Path, target: Path) -> None:
    """What .dockerignore lets through."""
    wanted = [line[1:] for line in (source / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in wanted:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", choices=sorted(p.stem for p in Path(__file__).parent.glob("*.Dockerfile")))
    parser.add_argument("--folder", type=Path, required=True, help="made, and left behind")
    parser.add_argument("--resolve", action="store_true", help="ask pip for the packages, install none")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists: name a new folder")
    run(
        parse((Path(__file__).parent / f"{arguments.image}.Dockerfile").read_text()),
        arguments.folder,
        arguments.resolve,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
