"""`dualvla run --dry-run` and `--profile`: what is printed is what stages are then told, and nothing starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dualvla import cli
from dualvla.config import to_dict
from dualvla.errors import UsageError
from dualvla_cluster.resources import get_profile
from dualvla_pipelines import run as pipeline
from dualvla_pipelines.recipes import get_recipe


def dry(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = cli.main(["run", "--dry-run", *argv])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_the_plan_names_actors_bundles_time_and_cost_and_makes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, said = dry(capsys, "--recipe", "tiny", "--profile", "node8", "--out", str(out))
    assert code == 0, said
    assert "8 CPU, 1 GPU, 80 GB" in said
    assert "1 x gpu" in said
    assert "$" in said
    assert not out.exists()


def test_tiny_on_two_cores_is_estimated_within_a_third_of_what_it_took() -> None:
    """16.1 minutes of work, 13 of them in the stages of the plan (README)."""
    found = pipeline.dry_run("tiny", (), "laptop")
    assert 60 * found["hours"] == pytest.approx(15.5, rel=0.33)


def test_a_plan_without_room_is_refused_before_the_folder_is_claimed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mine = to_dict(get_profile("node8"))
    mine["stages"]["train"]["cpus"] = 12.0  # 8 workers: all 96 CPUs
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(mine))
    for options in (["--dry-run"], []):
        code = cli.main(["run", "--recipe", "debug", "--profile", str(file), "--out", str(tmp_path / "run"), *options])
        assert code == 2
        assert "hang without an error" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_profile_cannot_cut_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be cut evenly for 64 workers"):
        pipeline.dry_run("tiny", (), "nodes:8")


def test_every_stage_that_takes_workers_is_told_the_profile() -> None:
    for stage in pipeline.stages(get_recipe("debug"), "out", 0, None, "laptop"):
        if stage.command in ("collect", "prune", "train", "eval"):
            _, arguments = cli.parse(stage.command, stage.argv)
            assert arguments.profile == "laptop"
            assert "--workers" not in stage.argv
