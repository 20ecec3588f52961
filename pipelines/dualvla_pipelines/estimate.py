"""`dualvla run --dry-run`: which workers each stage would start where, and about how long and at what price.

The rates are of one worker of recipe `tiny` on one x86-64 core, from its own `run.json` and `benchmarks/results`; of a
stage that trains on GPUs the rate is `plan.py`'s bound. So the figures say what a run is about, not when it ends. Knows
no cluster and starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dualvla.console import table
from dualvla_cluster.resources import Profile, Work, show
from dualvla_pipelines.recipes import STAGES, Recipe

_PEAK_TFLOPS = 400.0


@dataclass(frozen=True)
class Rate:
    """units_per_s: of one worker. start_s: before the first unit. unit: what is counted."""

    unit: str
    units_per_s: float
    start_s: float


# Measured on 2 cores: `tiny` made 35,469 demonstrated steps in 78 s with 2 workers, took 2,200 steps of 32 samples in
# 501 s (250 in 104 s with two teachers), rolled out 900 episodes in 98 s with 2 workers; benchmarks/results/prune.json.
COLLECT = Rate("steps", 246.0, 6.0)
PRUNE = Rate("rows", 8300.0, 5.0)
TRAIN = Rate("samples", 145.0, 14.0)
DUAL = Rate("samples", 90.0, 14.0)
EVAL = Rate("episodes", 5.4, 12.0)
STEPS_PER_EPISODE = 18


@dataclass(frozen=True)
class StagePlan:
    """One stage: the workers it starts, the machines they fill, and an estimate."""

    name: str
    work: Work
    machines: int
    unit: str
    units: float
    hours: float
    usd: float


def plan(recipe: Recipe, profile: Profile) -> list[StagePlan]:
    """In the order in which they run. Raises: UsageError if the profile has no room, or no word of a stage."""
    episodes = sum(recipe.collect.episodes.values())
    steps = STEPS_PER_EPISODE * episodes
    tested = 6 * sum(recipe.eval.compared.values()) + 2 * sum(recipe.eval.controls.values())
    found = [
        _stage("collect", "collect", profile, COLLECT, steps),
        _stage("prune", "prune", profile, PRUNE, steps + recipe.collect.qa + recipe.collect.qa_test),
    ]
    for name in STAGES:
        config = recipe.stage(name)
        config.micro_batches(profile.work("train").workers)  # a batch that cannot be cut is refused here
        rate = _training(recipe, name, profile.work("train"))
        found.append(_stage(name, "train", profile, rate, config.steps * config.batch_size, workers=1))
    found.append(_stage("eval", "eval", profile, EVAL, tested))
    return found


def _stage(name: str, stage: str, profile: Profile, rate: Rate, units: float, workers: int | None = None) -> StagePlan:
    """workers: that the rate counts for (default: all of the profile's, but no more than there are units)."""
    work = profile.work(stage)
    number = workers or max(1, min(work.workers, round(units)))
    hours = (rate.start_s + units / (number * rate.units_per_s)) / 3600
    return StagePlan(name, work, profile.nodes(stage), rate.unit, units, hours, hours * profile.usd_per_hour(stage))


def _training(recipe: Recipe, stage: Any, work: Work) -> Rate:
    """Of all training workers together."""
    if not work.gpus:
        return DUAL if stage == "dual" else TRAIN
    from dualvla_pipelines.plan import plan as fit

    gpus = max(1, round(work.workers * work.gpus))
    found = fit(recipe.name, gpus=gpus, gpu_memory_gb=80.0, stage=stage, gpu_tflops=_PEAK_TFLOPS)
    return Rate(TRAIN.unit, found["samples_per_s"], 60.0)


def as_dict(recipe: str, profile: Profile, stages: list[StagePlan]) -> dict[str, Any]:
    return {
        "dry_run": True,
        "recipe": recipe,
        "profile": profile.name,
        "stages": [
            {
                "stage": s.name, "workers": s.work.workers, "bundle": s.work.bundle, "placement": s.work.placement,
                "pool": s.work.pool, "machines": s.machines, "spot": profile.pools[s.work.pool].spot,
                "unit": s.unit, "units": s.units, "hours": s.hours, "usd": s.usd,
            }
            for s in stages
        ],
        "hours": sum(s.hours for s in stages),
        "usd": sum(s.usd for s in stages),
    }  # fmt: skip


def render(result: Mapping[str, Any]) -> str:
    """For a person."""
    header = ["stage", "actors", "bundle of each", "placement", "machines", "work", "about", "cost"]
    rows = [
        [
            s["stage"],
            f"{s['workers']}",
            show(s["bundle"]),
            s["placement"],
            f"{s['machines']} x {s['pool']}{' (spot)' if s['spot'] else ''}",
            f"{s['units']:,.0f} {s['unit']}",
            _time(s["hours"]),
            f"${s['usd']:.2f}",
        ]
        for s in result["stages"]
    ]
    title = f"recipe {result['recipe']} on profile {result['profile']}: nothing was started"
    total = f"in all about {_time(result['hours'])} and ${result['usd']:.2f}"
    return (
        f"{table(title, header, rows)}\n{total}\nassumed: the rates measured with recipe tiny, {_PEAK_TFLOPS:g}"
        " TFLOP/s a GPU at 35 %, and the profile's own prices; Ray Train places its bundles as one group"
    )


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
