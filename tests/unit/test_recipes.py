"""Recipes, and the plan that `run` makes of one; no stage is really run here."""

import dataclasses
import itertools
import json

import pytest

from dualvla import cli
from dualvla.config import from_dict, override, to_dict
from dualvla.errors import OutputError, UsageError
from dualvla_pipelines import run
from dualvla_pipelines.recipes import RECIPES, STAGES, VARIANTS, Recipe, get_recipe

RATE = {"n": 4, "successes": 2, "rate": 0.5, "low": 0.15, "high": 0.85}
SCORE = {"score": 30.0, "R": None, "A": 50.0, "I": 60.0, "RA": None}


class FakeCommands:
    """Answers like the real commands; `fails` names the command that ends like Ctrl-C, once."""

    def __init__(self, fails=None):
        self.fails, self.calls = fails, []

    def __call__(self, command, argv):
        self.calls.append((command, list(argv)))
        if command == self.fails:
            self.fails = None
            raise KeyboardInterrupt
        names = [a.split("=")[0] for flag, a in itertools.pairwise(argv) if flag == "--policy"]
        policy = {"tasks": {"touch": RATE, "all": RATE}, "reasoning_tokens_per_step": 1.5, "infer_ms": None}
        if command == "score":
            return {"policies": dict.fromkeys(("random", "expert", *STAGES), SCORE)}
        if ablations := [a for flag, a in itertools.pairwise(argv) if flag == "--ablation"]:
            names = [f"{name}+{ablation}" for name in names for ablation in ablations]
        return {"policies": dict.fromkeys(names, policy), "index": "report/index.html", "skipped": False}


def test_unknown_recipe_and_key_name_the_nearest(capsys):
    assert cli.main(["run", "--recipe", "tinny", "--out", "x"]) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err
    assert cli.main(["run", "--recipe", "tiny", "--out", "x", "--set", "specialist.step=3"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_survives_its_file_and_cuts_evenly_for_one_and_two_workers(name):
    recipe = get_recipe(name)
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert all(recipe.stage(s).micro_batches(w) == 1 for s in STAGES for w in (1, 2))
    with pytest.raises(UsageError, match="evenly"):
        recipe.specialist.micro_batches(7)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_an_ablation_changes_one_thing_that_reaches_its_command(variant):
    base, changed = get_recipe("debug"), get_recipe(f"debug+{variant}")
    pruning, teachers = changed.prune != base.prune, changed.dual.teachers != base.dual.teachers
    assert pruning != teachers
    assert dataclasses.replace(changed, name="debug", prune=base.prune, dual=base.dual) == base
    assert dataclasses.replace(changed.dual, teachers="both") == base.dual
    plan = {stage.name: stage.argv for stage in run.stages(changed, "out", seed=0, workers=1)}
    assert plan["prune"][plan["prune"].index("--mode") + 1] == changed.prune.mode
    name = plan["dual"][plan["dual"].index("--recipe") + 1]
    assert get_recipe(name).dual == changed.dual


def test_an_unknown_variant_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'scene-only'"):
        get_recipe("tiny+scene_only")


def test_train_stages_get_the_recipe_that_the_run_was_given():
    """A changed key reaches `dualvla train`, which knows recipes by name only."""
    changes = ["specialist.losses.heat=0.7", 'model.cameras=["wrist"]', 'collect.episodes={"pick": 3}', "dual.steps=5"]
    recipe = override(get_recipe("debug"), changes)
    for stage in run.stages(recipe, "out", seed=3, workers=1):
        if stage.command == "train":
            given = [value for flag, value in itertools.pairwise(stage.argv) if flag == "--set"]
            assert override(get_recipe("debug"), given) == recipe


def test_trackers_reach_every_training_stage_and_a_wrong_one_stops_before_anything(tmp_path):
    where = ["tensorboard:tb", "none"]
    for stage in run.stages(get_recipe("debug"), "out", seed=0, workers=1, track=where):
        given = [value for flag, value in itertools.pairwise(stage.argv) if flag == "--track"]
        assert given == (where if stage.command == "train" else [])
    commands = FakeCommands()
    with pytest.raises(UsageError, match="did you mean 'tensorboard'"):
        run.run("debug", str(tmp_path / "out"), track=["tensorbord:x"], call=commands)
    assert not commands.calls
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_goes_on_and_keeps_its_times(tmp_path):
    commands = FakeCommands(fails="score")
    with pytest.raises(KeyboardInterrupt):
        run.run("debug", str(tmp_path / "out"), call=commands)
    before = json.loads((tmp_path / "out" / "run.json").read_text())["stages"]
    assert "qa" in before
    assert "report" not in before
    result = run.run("debug", str(tmp_path / "out"), call=commands)
    assert before.keys() < result["stages"].keys()
    assert result["peak_pss_mb"] > 10
    assert run.run("debug", str(tmp_path / "out"), call=commands)["skipped"]
    with pytest.raises(OutputError, match="another run"):
        run.run("debug", str(tmp_path / "out"), seed=1, call=commands)


def test_the_table_shows_every_policy_control_and_where_the_report_is(tmp_path):
    text = run.render(run.run("debug", str(tmp_path / "out"), call=FakeCommands()))
    for name in (
        "random", "expert", *STAGES, "expert-random-object",
        "specialist+blank-images", "specialist+other-instruction", "report/index.html",
    ):  # fmt: skip
        assert name in text
    assert "50 [15, 85] 4" in text


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_command_of_the_plan_understands_its_options(name):
    for stage in run.stages(get_recipe(name), "/run", seed=0, workers=2):
        _, arguments = cli.parse(stage.command, stage.argv)
        assert getattr(arguments, "out", "/run").startswith("/run")
