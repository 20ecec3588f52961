"""The runbook's commands, as they stand on the page, against a head of the test's own.

Two tools are stand-ins: `ray start` must not start a head on Ray's default ports beside others of this machine (the
test's own head is there instead; everything else goes to the real `ray`), and `kubectl` has no cluster to talk to: it
checks that what it is to apply is a kustomize folder, or a secret from a file that exists.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray_head import TOKEN, running_head

from dualvla import cli

PAGE = (Path(__file__).parents[2] / "docs" / "operate.md").read_text()
_RAY = '#!/bin/sh\n[ "$1" = start ] && exit 0\nexec "{ray}" "$@"\n'
_KUBECTL = """#!/bin/sh
case "$1 $2" in
  "apply -f") exec test -f "$3";;
  "apply -k") exec test -f "$3/kustomization.yaml";;
  "create secret") for last; do :; done; exec test -f "${last#--from-file=token=}";;
esac
exit 1
"""


def blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_runbook_runs(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    real = Path(sys.executable).parent
    for name, script in (("ray", _RAY.format(ray=real / "ray")), ("kubectl", _KUBECTL)):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    token = tmp_path / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text(TOKEN)  # which the page's first line then finds
    (tmp_path / "work").mkdir()
    path = f"{tools}{os.pathsep}{real}{os.pathsep}{os.environ['PATH']}"
    with running_head(PATH=path) as head:  # whose `python` is the one with DualVLA, as in an image
        env = {name: value for name, value in head.env.items() if name != "RAY_AUTH_TOKEN"} | {
            "PATH": path,
            "HOME": str(tmp_path / "home"),
            "RAY_API_SERVER_ADDRESS": head.address,
        }
        script = "set -ex\n" + "\n".join(blocks())
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path / "work", env=env, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "in all about" in done.stdout  # the dry run
    assert (tmp_path / "work" / "manifests" / "raycluster.yaml").is_file()


def test_every_command_named_in_the_text_is_one() -> None:
    named = set(re.findall(r"`dualvla ([a-z]+)", PAGE))
    assert named <= set(cli.commands())
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "sign" not in line]
    assert len(rows) == 10
