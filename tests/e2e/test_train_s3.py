"""Training into an object store, with no disk that workers share: a store that errs costs time, never a state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loop
import pytest
import s3fs
from s3_faults import FaultPlan, Request, fault_proxy, moto_server

from dualvla.io import storage
from dualvla_pipelines import resume

pytestmark = pytest.mark.slow
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    with moto_server() as port:
        yield port


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3_port: int) -> Iterator[FaultPlan]:
    """A store without faults yet, for this process and those it starts."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    made = FaultPlan()
    with fault_proxy(s3_port, made) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, synthetic_dataset: Any) -> Path:
    folder = tmp_path_factory.mktemp("s3") / "data"
    synthetic_dataset(str(folder), parts=2, episodes=2, questions=4, steps=8)
    return folder


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same six steps on a disk."""
    out = tmp_path_factory.mktemp("s3-straight") / "specialist"
    assert loop.train(six_steps(data, out), workers=2) == [0, 0]
    return out


def six_steps(data: Path, out: Any, **changes: Any) -> Any:
    return loop.make_job("specialist", data, out, "specialist.steps=6", **changes)


def new_run() -> str:
    name = f"b-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).mkdir(name)
    return f"s3://{name}/run"


def states(out: str) -> list[int]:
    return [saved.step for saved in resume.states(f"{out}/resume")]


def test_a_store_that_errs_changes_no_weight_and_any_machine_goes_on_from_it(
    plan: FaultPlan, data: Path, straight: Path, fault_seed: int
) -> None:
    out = new_run()
    plan.seed, plan.rate = fault_seed, 0.25
    plan.__post_init__()
    trackers = (f"tensorboard:{out}/tensorboard",)
    halves = [six_steps(data, out, stop_after=steps, trackers=trackers) for steps in (4, None)]
    assert loop.train(*halves, workers=2) == [0, 0]  # the second has what the store holds, and nothing else
    plan.rate = 0.0
    assert plan.faults()
    assert states(out) == [6, 4]
    assert loop.same_weights(out, straight)
    assert loop.lines(out) == loop.lines(straight)
    assert len(storage.list_files(f"{out}/tensorboard/run")) == 2  # one of each call


class Outage(list[Request]):
    """The list of a plan's requests; after the one that `begins` it, the store is down."""

    def __init__(self, plan: FaultPlan, begins: str):
        super().__init__()
        self._plan, self._begins = plan, begins

    def append(self, request: Request) -> None:
        super().append(request)
        if request.method == "PUT" and self._begins in request.path and request.status == 200:
            self._plan.down = True


def test_an_outage_while_saving_leaves_no_half_state_and_another_number_of_workers_goes_on(
    plan: FaultPlan, data: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = new_run()
    monkeypatch.setenv("DUALVLA_STORAGE_ATTEMPTS", "3")
    plan.requests = Outage(plan, "step-00000004")
    codes = loop.train(six_steps(data, out), workers=2)
    assert all(codes)
    assert "StorageError" in (shown := capfd.readouterr().err)
    assert "the store failed 3 times" in shown
    plan.down, plan.requests = False, []
    assert states(out) == [2]
    assert len(storage.list_folders(f"{out}/resume")) == 2  # the half is there, and is no state
    assert loop.train(six_steps(data, out)) == [0]  # of the two workers, one is left
    for ours, theirs in zip(loop.lines(out), loop.lines(straight), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert states(out) == [6, 4]


def test_the_command_trains_on_ray_into_the_store(plan: FaultPlan, data: Path, straight: Path) -> None:
    out = new_run()
    settings = [option for setting in (*loop.SMALL, "specialist.steps=6") for option in ("--set", setting)]
    command = [
        "train",
        "--stage",
        "specialist",
        "--recipe",
        "debug",
        "--data",
        str(data),
        "--out",
        out,
        "--threads",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "dualvla", *command, "--workers", "2", "--threads", "1", "--json", *settings],
        capture_output=True, text=True, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["finished"]
    assert "test-secret" not in done.stdout + done.stderr
    assert loop.same_weights(out, straight)
    assert storage.list_folders(out) == [f"{out}/tensorboard"]  # the resume states are gone
    assert json.loads(storage.read_bytes(f"{out}/manifest.json"))["steps"] == 6
