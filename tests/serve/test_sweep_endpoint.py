"""A sweep whose policy is an endpoint that goes away and comes back."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import eval_fakes
import numpy as np
import pytest
from eval_fakes import FakePolicy, fake_suite
from ray import cloudpickle
from ray_head import free_ports
from serve.local_endpoint import endpoint

from dualvla.schema import Observation
from dualvla_eval import results
from dualvla_eval.policies import PolicyRef
from dualvla_eval.sweep import Machinery, SweepConfig, run_sweep
from dualvla_serve.batching import LoadedPolicy

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

for module in (eval_fakes, sys.modules[__name__]):
    cloudpickle.register_pickle_by_value(module)

TASKS = {"touch": 12, "tap": 12}


class ServedPolicy(FakePolicy):
    """Remembers nothing; tells when it has been asked a number of times."""

    def __init__(self, told: threading.Event, after: int):
        super().__init__()
        self._told, self._left = told, after

    def infer(self, observations: Any, sessions: Any) -> Any:
        self._left -= len(observations)
        if self._left <= 0:
            self._told.set()
        time.sleep(0.02)
        return super().infer(observations, sessions)

    def configure(self, session: str, reasoning: str) -> None:
        """It says what it says."""

    def state_of(self, session: str) -> dict[str, Any]:
        return {}

    def restore(self, session: str, state: Mapping[str, Any]) -> None:
        """There is nothing to."""


def serving(port: int, told: threading.Event, after: int = 10**9) -> Any:
    image = np.zeros((8, 8, 3), np.uint8)
    example = Observation({"main": image}, "touch the red cube", np.zeros(3, np.float32), np.zeros(6))
    return endpoint(lambda: LoadedPolicy(ServedPolicy(told, after), example), port=port)


def sweep_through_an_outage(folder: Path, down_s: float, patience_s: float) -> dict[tuple[str, int], dict[str, Any]]:
    """The endpoint goes after 30 questions, in the middle of the first episodes, for `down_s`."""
    (port,), gone, over = free_ports(1), threading.Event(), threading.Event()
    first = serving(port, gone, after=30)
    first.__enter__()

    def interrupt() -> None:
        assert gone.wait(60)
        first.ask(first.kill())
        first.__exit__()
        time.sleep(down_s)
        with serving(port, threading.Event()):
            assert over.wait(120)

    outage = threading.Thread(target=interrupt)
    outage.start()
    try:
        run_sweep(
            str(folder),
            fake_suite(),
            [PolicyRef("remote", f"ws://127.0.0.1:{port}")],
            SweepConfig(TASKS, videos_per_task=0),
            machinery=Machinery(workers=1, envs_per_worker=3, patience_s=patience_s),
        )
    finally:
        over.set()
        outage.join()
    return {(row["task"], row["episode_id"]): row for row in results.read_episodes(str(folder))}


def test_an_endpoint_that_comes_back_in_time_changes_no_outcome(tmp_path: Path) -> None:
    rows = sweep_through_an_outage(tmp_path / "interrupted", down_s=4.0, patience_s=30.0)
    undisturbed = SweepConfig(TASKS, videos_per_task=0)
    run_sweep(
        str(tmp_path / "whole"),
        fake_suite(),
        [PolicyRef("remote", "expert")],
        undisturbed,
        load_policy=lambda *_, **__: FakePolicy(),
    )
    told = ("stop_reason", "steps", "success", "reasoning_tokens")
    for row in results.read_episodes(str(tmp_path / "whole")):
        assert [rows[row["task"], row["episode_id"]][name] for name in told] == [row[name] for name in told]


def test_while_an_endpoint_is_away_episodes_end_and_the_sweep_goes_on(tmp_path: Path) -> None:
    rows = sweep_through_an_outage(tmp_path, down_s=2.0, patience_s=0.2)
    reasons = [row["stop_reason"] for row in rows.values()]
    assert len(rows) == sum(TASKS.values())
    assert set(reasons) == {"success", "policy_unreachable"}
    unreachable = next(row for row in rows.values() if row["stop_reason"] == "policy_unreachable")
    assert "127.0.0.1" in unreachable["failure"]
    assert rows["tap", 11]["stop_reason"] == "success"  # the last one, when the endpoint is back
