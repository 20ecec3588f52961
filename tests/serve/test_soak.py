"""One minute of the soak (benchmarks/soak.py), run as `make soak` runs its ten: no reply lost or swapped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_a_minute_of_robots_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, str(SOAK), "--minutes", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert out.exists(), done.stderr
    result = json.loads(out.read_text())
    for name, load in result["requests"].items():
        assert not load["faults"], (name, load)
        assert load["answered"] == load["sent"] > 0
    assert result["requests"]["tiny"]["sent"] > 900  # 30 robots, one question in 1.6 s
    assert result["memory"]
    assert all(process["growth"] < 0.10 for process in result["memory"].values()), result["memory"]
