"""The whole pipeline at its smallest, all real: killed in every stage, interrupted, and given bad input."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from dualvla_pipelines import run as pipeline
from dualvla_pipelines.recipes import STAGES, get_recipe

pytestmark = [pytest.mark.slow, pytest.mark.sim]

STAGE_NAMES = [stage.name for stage in pipeline.stages(get_recipe("debug"), "out", 0, 1)]
WHOLE_RUN_S = 900


@pytest.fixture(scope="module")
def start():
    """start(out) -> (process of `dualvla run`, its log); none outlives the tests."""
    started = []

    def start_run(out):
        command = [sys.executable, "-m", "dualvla", "run", "--recipe", "debug", "--out", str(out)]
        log = Path(f"{out}.log")
        with log.open("ab") as sink:
            started.append(subprocess.Popen(command, stdout=sink, stderr=sink, preexec_fn=heed_ctrl_c))
        return started[-1], log

    yield start_run
    for process in started:
        process.kill()


def heed_ctrl_c():
    """A shell starts what runs in its background with SIGINT ignored, and so would be all that the tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_stage(process, log, offset, name):
    """Returns once this process has logged that the stage began; False if it ended first."""
    begun = re.compile(rb"\[\d+/\d+\] " + name.encode() + rb"\r?\n")
    deadline = time.monotonic() + WHOLE_RUN_S
    while time.monotonic() < deadline:
        if begun.search(log.read_bytes()[offset:]):
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.05)
    raise AssertionError(f"stage {name} did not begin in {WHOLE_RUN_S} s")


def end(process, how):
    """Sends the signal to the command alone, as a shell or an out-of-memory killer would; nothing of it may stay."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(how)
    code = process.wait(timeout=120)
    _, alive = psutil.wait_procs(family, timeout=120)
    assert not alive, f"still there after {how!r}: {alive}"
    return code


def pull_the_plug(process):
    """SIGKILL to the command and all under it at once, as when a machine or a container goes down."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


def outcome(out):
    """All that must not depend on how often a run was interrupted: data bytes, weights, verdicts, answers, scores."""
    out = Path(out)
    files = [*out.glob("data/data/*.parquet"), *out.glob("pruned/data/*.parquet")]
    files += [out / stage / name for stage in STAGES for name in ("model.safetensors", "config.json")]
    found = {str(file.relative_to(out)): file.read_bytes() for file in files}
    for file in [*out.glob("eval/*/episodes.parquet"), *out.glob("qa/episodes.parquet")]:
        table = pq.read_table(file)
        timed = [name for name in table.column_names if name.endswith(("_ms", "_s"))]
        found[str(file.relative_to(out))] = sorted(map(str, table.drop_columns(timed).to_pylist()))
    for file in out.glob("eval/*/vla_score.json"):
        found[str(file.relative_to(out))] = json.loads(file.read_text())["policies"]
    return found


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    process, log = start(out)
    assert process.wait(timeout=WHOLE_RUN_S) == 0, log.read_text()
    return out


def test_the_run_ends_with_its_table_and_report(uninterrupted):
    record = json.loads((uninterrupted / "run.json").read_text())
    assert Path(record["report"]).is_file()
    assert set(record["policies"]) == {"random", "expert", *STAGES}
    assert record["policies"]["expert"]["tasks"]["touch"]["rate"] == 1.0
    assert set(record["stages"]) == set(STAGE_NAMES)
    assert 0 < record["peak_pss_mb"] < 8 * 1024
    printed = Path(f"{uninterrupted}.log").read_text()
    assert "VLA Score" in printed
    assert record["report"] in printed


@pytest.mark.timeout(3600)
def test_a_run_killed_in_every_stage_ends_as_if_it_had_not_been(start, uninterrupted, tmp_path, fault_seed):
    """SIGKILL in the midst of each stage in turn, at a moment drawn from how long that stage takes."""
    rng = random.Random(fault_seed)
    took = json.loads((uninterrupted / "run.json").read_text())["stages"]
    out = tmp_path / "run"
    for name in STAGE_NAMES:
        offset = Path(f"{out}.log").stat().st_size if Path(f"{out}.log").exists() else 0
        process, log = start(out)
        assert wait_for_stage(process, log, offset, name), log.read_text()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a stage that ended sooner this time is as good
            process.wait(timeout=rng.uniform(0, took[name]["wall_s"]))
        if process.poll() is None:
            pull_the_plug(process)
    process, log = start(out)
    assert process.wait(timeout=WHOLE_RUN_S) == 0, log.read_text()
    found, expected = outcome(out), outcome(uninterrupted)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def test_ctrl_c_while_training_exits_130_and_the_same_command_goes_on(start, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process, log = start(out)
    assert wait_for_stage(process, log, 0, "specialist"), log.read_text()
    metrics = out / "specialist" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    assert end(process, signal.SIGINT) == 130, log.read_text()
    process, log = start(out)
    offset = log.stat().st_size
    assert wait_for_stage(process, log, offset, "reasoning"), log.read_text()
    end(process, signal.SIGKILL)
    name = "specialist/model.safetensors"
    assert (out / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_truncated_data_are_named(uninterrupted, tmp_path):
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", str(uninterrupted / "data"), str(data)], check=True)
    part = max(data.glob("data/*.parquet"))
    part.write_bytes(part.read_bytes()[:-100])
    command = [sys.executable, "-m", "dualvla", "train", "--stage", "specialist", "--recipe", "debug"]
    done = subprocess.run(
        [*command, "--data", str(data), "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert part.name in done.stderr


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 3 MB: less than a checkpoint."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a small file system here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_so(uninterrupted, full_disk):
    command = [sys.executable, "-m", "dualvla", "train", "--stage", "specialist", "--recipe", "debug"]
    done = subprocess.run(
        [*command, "--data", str(uninterrupted / "data"), "--out", str(full_disk / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert "No space left" in done.stderr
