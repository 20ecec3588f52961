"""The page of docs/scaling.md is what its script makes, and the arithmetic behind it holds at its edges."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_benchmark", ROOT / "benchmarks" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_makes_of_its_results(scaling: ModuleType) -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())
    assert scaling.page(found) == (ROOT / "docs" / "scaling.md").read_text()
    assert found["tasks"] == 10_000


def test_a_stage_is_as_fast_as_its_tightest_limit(scaling: ModuleType) -> None:
    def stage(items: float, workers: int, overhead_s: float, gigabytes: float = 0.0) -> object:
        return scaling.Stage("x", items, 10.0, workers, overhead_s, 1.0, gigabytes)

    few, many = stage(100, 10, 1e-3), stage(100, 100, 1e-3)
    assert few.seconds - many.seconds == pytest.approx(90)
    assert stage(100, 1000, 1e-3).seconds == many.seconds  # more workers than items bring nothing
    assert stage(100, 100, 2.0).bound == "driver"
    assert stage(100, 100, 1e-3, gigabytes=1e5).bound == "store"
    assert stage(100, 100, 0.5).most_workers == 20
