"""What all tests share: isolation from the machine, one private Ray, data without a simulator, and honest skips."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualvla.io import dataset, manifest
from dualvla.schema import step_schema

_CHROMIUM_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(autouse=True, scope="session")
def _isolation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No cluster, cache, terminal or model hub of the person who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("NO_COLOR", "1")
        patch.setenv("COLUMNS", "120")
        beside = Path(__file__).parents[2] / "shared" / "simpler_assets"
        if "DUALVLA_ASSETS" not in os.environ and beside.is_dir():
            patch.setenv("DUALVLA_ASSETS", str(beside))
        yield


@pytest.fixture(autouse=True)
def _no_log_outlives_its_test() -> Iterator[None]:
    """A command called in this process logs to the stderr of its test, which is closed when the test ends."""
    yield
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A private Ray of four logical CPUs, whatever the machine has; commands called in this process join it."""
    import ray

    from dualvla_cluster.connect import connect

    connect(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium on the PATH")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=_CHROMIUM_ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def simpler_assets() -> Any:
    """SimplerEnv's assets: DUALVLA_ASSETS, or the folder that may lie beside the checkout."""
    from dualvla_eval.simpler.assets import Assets

    if not os.environ.get("DUALVLA_ASSETS"):
        pytest.skip("no SimplerEnv assets here: set DUALVLA_ASSETS, or run `dualvla assets fetch`")
    return Assets.find()


@pytest.hookimpl(trylast=True)  # after -m and -k have had their say: the probe takes seconds
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    simulated = [item for item in items if item.get_closest_marker("sim")]
    if not simulated:
        return
    from dualvla_cluster.doctor import render_probe

    check = render_probe().run()
    if not check.ok:
        skip = pytest.mark.skip(reason=f"no frame renders here ({check.detail}); `dualvla doctor` names the fix")
        for item in simulated:
            item.add_marker(skip)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-seeds", type=int, default=2, help="random seeds of every test with a `fault_seed`")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fault_seed" in metafunc.fixturenames:
        metafunc.parametrize("fault_seed", range(metafunc.config.getoption("--fault-seeds")))


MakeRows = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def make_rows() -> MakeRows:
    return _episode_rows


@pytest.fixture(scope="session")
def synthetic_dataset() -> Callable[..., None]:
    """synthetic_dataset(folder, parts=2, episodes=3, questions=2, steps=12) makes one anywhere, in any scope."""
    return write_dataset


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., str]:
    """make_dataset(name="data", parts=2, episodes=3, questions=2, steps=12) -> folder of a finished data set."""

    def make(name: str = "data", **sizes: int) -> str:
        folder = str(tmp_path / name)
        write_dataset(folder, **sizes)
        return folder

    return make


def write_dataset(folder: str, *, parts: int = 2, episodes: int = 3, questions: int = 2, steps: int = 12) -> None:
    """`episodes` demonstrations and `questions` in each of `parts` files."""
    manifest.begin(folder, dataset.KIND, {"synthetic": True}, {})
    total = 0
    for part in range(parts):
        rows = [row for i in range(episodes) for row in _episode_rows(f"synthetic/robot/{part}-{i}", steps)]
        rows += [_question_row(f"synthetic/qa/{part}-{i}") for i in range(questions)]
        dataset.write_table(dataset.part_url(folder, part), dataset.rows_to_table(rows))
        total += len(rows)
    dataset.finish_dataset(folder, {"synthetic": True}, {}, rows_in=total)


def _episode_rows(episode_id: str, steps: int = 12, size: int = 16) -> list[dict[str, Any]]:
    """A square that moves right, stops, and moves down while the arm does the same and the gripper closes half-way."""
    turn = steps // 2
    rows = []
    for step in range(steps):
        right, down = min(step, turn), max(0, step - turn - 1)
        image = np.zeros((size, size, 3), dtype=np.uint8)
        image[down % size : down % size + 4, right % size : right % size + 4] = (200, 40, 40)
        opening = 1.0 if step < turn else 0.0
        rows.append(
            {
                "episode_id": episode_id, "step": step, "timestamp_s": step / 5, "control_hz": 5.0, "split": "train",
                "domain": "robot", "task": "touch", "instruction": "touch the red square",
                "images": {"main": dataset.encode_png(image)},
                "ee_pose": [0.02 * right, 0.0, -0.02 * down, np.pi, 0.0, 0.0], "gripper": [opening],
                "proprio": [0.02 * right, 0.0, -0.02 * down, opening],
                "action": [0.02, 0.0, 0.0, 0.0, 0.0, 0.0, opening], "action_space": "ee_delta_pose+gripper",
                "motion_primitive": "move right", "reasoning": "go to the square; move right", "events": [],
                "target_pixel": [0.5, 0.5], "target_position": [0.1, 0.0, 0.0],
            }
        )  # fmt: skip
    return rows


def _question_row(episode_id: str) -> dict[str, Any]:
    image = np.full((16, 16, 3), 90, dtype=np.uint8)
    row = {
        "episode_id": episode_id, "step": 0, "split": "train", "domain": "multimodal", "task": "colour",
        "instruction": "what colour is the square?", "reasoning": "red", "images": {"main": dataset.encode_png(image)},
    }  # fmt: skip
    assert set(row) <= set(step_schema().names)
    return row
