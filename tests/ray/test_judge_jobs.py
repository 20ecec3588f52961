"""Judging at length, as processes: as a Ray job, killed with force and resumed, and 32 calls at a time."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from judge_fakes import FakeEndpoint, Response, evaluation
from ray_head import dualvla, running_head

from dualvla_eval import results

pytestmark = pytest.mark.slow
PATIENCE_S = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return evaluation(tmp_path_factory.mktemp("jobs") / "eval", patch, episodes=12, videos=12)


def options(endpoint, *more):
    settings = [f"openai.base_url={endpoint.url}", "concurrency=3", "backoff_s=0.01", *more]
    return ["--judge", "openai:fake", *(word for setting in settings for word in ("--set", setting)), "--json"]


def verdicts(folder):
    return sorted(Path(folder, "verdicts").rglob("*.json"))


def clear(folder):
    for path in [*verdicts(folder), Path(folder, "vla_score.json")]:
        path.unlink(missing_ok=True)


def test_scoring_runs_as_a_ray_job(folder):
    clear(folder)
    with FakeEndpoint() as endpoint, running_head() as head:
        argv = ["submit", "--address", head.address, "--python", sys.executable, "--", "score", folder]
        done = dualvla(head, *argv, *options(endpoint))
    assert done.returncode == 0, done.stderr
    scored = results.read_json(f"{folder}/vla_score.json")
    assert (scored["judge"], scored["policies"]["p"]["unjudged"]) == ("openai:fake", 0)
    assert len(endpoint.requests) == 12


def test_killed_with_force_it_goes_on_and_asks_nothing_twice_that_was_kept(folder, fault_seed):
    clear(folder)
    rng = random.Random(fault_seed)
    with FakeEndpoint(lambda *_: Response(delay_s=0.2)) as endpoint:
        command = [sys.executable, "-m", "dualvla", "score", folder, *options(endpoint)]
        victim = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + PATIENCE_S
        enough = rng.randint(1, 8)
        while len(verdicts(folder)) < enough:
            assert time.monotonic() < deadline
            assert victim.poll() is None, victim.stderr.read()
            time.sleep(0.01)
        os.killpg(victim.pid, signal.SIGKILL)
        victim.communicate()
        kept = {path: path.read_bytes() for path in verdicts(folder)}
        asked = len(endpoint.requests)
        assert not Path(folder, "vla_score.json").exists()

        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    usage = json.loads(done.stdout)["usage"]
    assert (usage["cached"], usage["calls"]) == (len(kept), 12 - len(kept))
    assert len(endpoint.requests) == asked + 12 - len(kept)
    assert asked - len(kept) <= 3  # what was in flight
    assert len(verdicts(folder)) == 12
    assert all(path.read_bytes() == data for path, data in kept.items())


def test_many_calls_at_a_time_each_answered_once(tmp_path):
    """The small version of benchmarks/judge_http.py; its bound is loose, as CI machines are shared."""
    script = Path(__file__).parents[2] / "benchmarks" / "judge_http.py"
    size = ["--trajectories", "96", "--latency-s", "1", "--concurrency", "16", "--out", str(tmp_path / "out.json")]
    subprocess.run([sys.executable, str(script), *size], check=True, timeout=PATIENCE_S, capture_output=True)
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["judged"], found["verdicts_kept"], found["answered_once"]) == (96, 96, 96)
    assert (found["answered_more"], found["lost"]) == (0, 0)
    assert sum(found["calls"].values()) > 96  # failures were injected
    assert found["ratio"] < 4  # one call at a time would be 16
