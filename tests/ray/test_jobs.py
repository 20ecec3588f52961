"""`dualvla submit` and `dualvla jobs` against a real Ray head with a token, driven as a user does: as processes."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_head import TOKEN, Head, dualvla, free_ports, running_head


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head() as found:
        yield found


def test_a_job_reports_its_output_and_its_exit_code(head: Head) -> None:
    argv = ("--", "prune", "/nowhere/data", "/nowhere/out", "--mode", "both")
    done = dualvla(head, "submit", "--json", "--address", head.address, "--python", sys.executable, *argv)
    assert done.returncode == 2, done.stderr  # what `dualvla prune` itself exits with
    assert "/nowhere/data" in done.stderr  # its output is followed
    result = json.loads(done.stdout)
    assert result["status"] == "FAILED"

    logs = dualvla(head, "jobs", "logs", result["id"], "--address", head.address)
    assert "/nowhere/data" in logs.stdout
    listed = dualvla(head, "jobs", "list", "--json", RAY_API_SERVER_ADDRESS=head.address)
    assert [job["id"] for job in json.loads(listed.stdout)["jobs"]].count(result["id"]) == 1


def test_a_detached_job_joins_the_cluster_and_can_be_stopped(head: Head, tmp_path: Path) -> None:
    # `jobs` itself needs no cluster; a command that connects must find this one through RAY_ADDRESS.
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import os, sys, time, runpy\n"
        "if sys.argv[1:3] != ['-m', 'dualvla_cluster.start']: sys.exit('unexpected entry point')\n"
        "from dualvla_cluster.connect import connect\n"
        "import ray\n"
        "connect()\n"
        f"open({str(tmp_path / 'joined')!r}, 'w').write(ray.get_runtime_context().gcs_address)\n"
        "time.sleep(600)\n"
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{probe}" "$@"\n')
    python.chmod(0o755)
    sent = dualvla(
        head, "submit", "--json", "--detach", "--address", head.address, "--python", str(python), "--", "jobs", "list"
    )
    assert sent.returncode == 0, sent.stderr
    job_id = json.loads(sent.stdout)["id"]
    deadline = time.monotonic() + 120
    while not (tmp_path / "joined").exists():
        status = json.loads(dualvla(head, "jobs", "status", job_id, "--json", "--address", head.address).stdout)
        assert status["jobs"][0]["status"] in ("PENDING", "RUNNING"), status
        assert time.monotonic() < deadline
    stopped = dualvla(head, "jobs", "stop", job_id, "--json", "--address", head.address)
    assert json.loads(stopped.stdout)["jobs"][0]["status"] == "STOPPED"


_PROBE = """
import json, os, sys
from dualvla_cluster import secrets, start
sys.argv = sys.argv[1:]
import dualvla
from dualvla import cli

def report(argv):
    import ray
    from dualvla_cluster.connect import connect
    connect()
    task = ray.remote(num_cpus=0.1)(lambda: (os.environ.get("PROBE_KEY"), dualvla.__file__, os.environ["PLAIN"]))
    found = ray.get(task.remote())
    print("FOUND", json.dumps([len(found[0] or ""), *found[1:]]))
    return 0

cli.main = report
sys.exit(start.main(sys.argv[2:]))
"""


def test_a_job_brings_our_packages_and_its_secrets_stay_on_the_node(head: Head, tmp_path: Path) -> None:
    """Driver and worker import the shipped copy, and see a secret that neither the job API nor a log has ever held."""
    secret = tmp_path / "key"
    secret.write_text("never-in-a-log-1234\n")
    probe = tmp_path / "probe.py"
    probe.write_text(_PROBE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{probe}" "$@"\n')
    python.chmod(0o755)
    argv = ("--python", str(python), "--secret", f"PROBE_KEY=file:{secret}", "--env", "PLAIN=seen", "--", "report", "x")
    done = dualvla(head, "submit", "--json", "--address", head.address, *argv)
    assert done.returncode == 0, done.stderr
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("FOUND ")]
    length, imported, plain = json.loads(line.removeprefix("FOUND "))
    assert (length, plain) == (len("never-in-a-log-1234"), "seen")
    assert "py_modules_files" in imported
    result = json.loads(done.stdout)
    assert len(result["code"]) == 64
    shown = dualvla(head, "jobs", "logs", result["id"], "--address", head.address).stdout + done.stderr + done.stdout
    request = urllib.request.Request(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request) as answer:
        shown += answer.read().decode()
    assert "never-in-a-log" not in shown


def test_the_same_command_again_follows_the_job_that_runs_it(head: Head, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o755)
    argv = ("--json", "--detach", "--address", head.address, "--python", str(python), "--", "jobs", "list")
    one, two = (json.loads(dualvla(head, "submit", *argv).stdout)["id"] for _ in range(2))
    assert one == two
    dualvla(head, "jobs", "stop", one, "--address", head.address)
    three = json.loads(dualvla(head, "submit", *argv).stdout)["id"]
    assert three != one
    dualvla(head, "jobs", "stop", three, "--address", head.address)


def test_a_wrong_token_is_refused_with_the_remedy(head: Head) -> None:
    done = dualvla(head, "jobs", "list", "--address", head.address, RAY_AUTH_TOKEN="f" * 32)
    assert done.returncode == 2
    assert "refused this token" in done.stderr
    assert "RAY_AUTH_TOKEN_PATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_job_is_a_usage_error(head: Head) -> None:
    done = dualvla(head, "jobs", "status", "raysubmit_nothing", "--address", head.address)
    assert done.returncode == 2
    assert "raysubmit_nothing" in done.stderr


def test_no_head_is_told_at_once_and_an_unknown_command_before_that() -> None:
    (port,) = free_ports(1)
    nobody = Head(f"http://127.0.0.1:{port}", dict(os.environ))
    done = dualvla(nobody, "submit", "--address", nobody.address, "--", "prune", "a", "b", "--mode", "both")
    assert (done.returncode, "ray start --head" in done.stderr) == (2, True), done.stderr
    done = dualvla(nobody, "submit", "--address", nobody.address, "--", "prunee")
    assert (done.returncode, "did you mean 'prune'" in done.stderr) == (2, True), done.stderr
