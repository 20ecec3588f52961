"""`dualvla run`: the whole pipeline as a list of commands, each with a folder of its own, and the one table at the end.

Every stage is a `dualvla` command found by name; each claims, resumes or skips its own folder, so this module knows
only their options and results. A run that was interrupted anywhere goes on by running all stages again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualvla import cli
from dualvla.config import override, to_dict
from dualvla.console import RUN_VARIABLE, table
from dualvla.io import manifest, storage
from dualvla.io.tracking import check_tracker
from dualvla_cluster.resources import get_profile
from dualvla_pipelines import estimate
from dualvla_pipelines.recipes import STAGES, EvalConfig, Recipe, get_recipe
from dualvla_pipelines.record import tracker_settings

log = logging.getLogger(__name__)

KIND = "run"
RESULTS = "run.json"
_POLICIES = ("random", "expert", *STAGES)
_SAMPLE_EVERY_S = 2.0

Call = Callable[[str, Sequence[str]], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One command of the run. name: how results and timings call it."""

    name: str
    command: str
    argv: tuple[str, ...]


def run(
    recipe: str,
    out: str,
    *,
    assignments: Sequence[str] = (),
    seed: int = 0,
    workers: int | None = None,
    profile: str | None = None,
    track: Sequence[str] = (),
    call: Call = cli.call,
) -> dict[str, Any]:
    """Runs, or goes on with, a recipe in folder `out`. Returns what `run.json` holds: results, timings, memory.

    workers: processes of collect, prune and eval (default: one a core); profile: machines and workers of each stage
    (`dualvla_cluster.resources`), checked before anything starts; track: trackers of training (`dualvla.io.tracking`);
    none of them changes a result. call: runs a command.
    Raises: UsageError for an unknown recipe or key, OutputError if `out` belongs to another run, and what stages raise.
    """
    chosen = override(get_recipe(recipe), assignments)
    key = {"recipe": to_dict(chosen), "seed": seed}
    if profile is not None:
        estimate.plan(chosen, get_profile(profile))
    for setting in tracker_settings(track or None, out):
        check_tracker(setting)
    finished = not manifest.begin(out, KIND, key, {})
    url = storage.join(out, RESULTS)
    record = json.loads(storage.read_bytes(url)) if storage.exists(url) else {"stages": {}}
    results: dict[str, dict[str, Any]] = {}
    plan = stages(chosen, out, seed, workers, profile, track)
    for number, stage in enumerate(plan, 1):
        log.info("[%d/%d] %s", number, len(plan), stage.name)
        with _peak_memory() as peak_mb:
            started = time.perf_counter()
            results[stage.name] = call(stage.command, stage.argv)
            seconds = time.perf_counter() - started
        if not results[stage.name].get("skipped"):
            record["stages"][stage.name] = {
                "wall_s": round(seconds, 1),
                "peak_pss_mb": round(peak_mb()),
                **_price(stage.command, seconds, profile),
            }
            storage.write_bytes(url, json.dumps(record, indent=2).encode())
            log.info("[%d/%d] %s: %.0f s, at most %.0f MB", number, len(plan), stage.name, seconds, peak_mb())
    record |= {
        "recipe": recipe,
        "out": out,
        "job": os.environ.get(RUN_VARIABLE),
        "policies": policies(results),
        "controls": controls(results),
        "report": results["report"]["index"],
        "wall_s": round(sum(s["wall_s"] for s in record["stages"].values()), 1),
        "peak_pss_mb": max((s["peak_pss_mb"] for s in record["stages"].values()), default=0),
    }
    storage.write_bytes(url, json.dumps(record, indent=2).encode())
    if not finished:
        manifest.finish(out, KIND, key, {}, stages=[stage.name for stage in plan])
    return {**record, "skipped": finished}


def _price(command: str, seconds: float, profile: str | None) -> dict[str, float]:
    """What the stage's machines cost while it ran, by the profile's prices. Others than the profile's are free."""
    machines = get_profile(profile) if profile is not None else None
    if machines is None or command not in machines.stages:
        return {}
    return {"usd": round(seconds / 3600 * machines.usd_per_hour(command), 4)}


def costs(out: str) -> dict[str, float]:
    """What the run in `out` has taken so far: wall time of its stages, and dollars where it had a profile."""
    url = storage.join(out, RESULTS)
    done = json.loads(storage.read_bytes(url))["stages"].values() if storage.exists(url) else ()
    return {name: round(sum(stage.get(name, 0.0) for stage in done), 2) for name in ("wall_s", "usd")}


def dry_run(recipe: str, assignments: Sequence[str], profile: str) -> dict[str, Any]:
    """What `run` would start, for a person to read first. Raises: UsageError for a plan that cannot be placed."""
    chosen, machines = override(get_recipe(recipe), assignments), get_profile(profile)
    return estimate.as_dict(recipe, machines, estimate.plan(chosen, machines))


def stages(
    recipe: Recipe,
    out: str,
    seed: int,
    workers: int | None = None,
    profile: str | None = None,
    track: Sequence[str] = (),
) -> list[Stage]:
    """The plan of a run. Folders: data, pruned, one a checkpoint, eval/*, qa, report."""

    def at(*parts: str) -> str:
        return storage.join(out, *parts)

    common = ("--seed", str(seed))
    placed = () if profile is None else ("--profile", profile)
    counted = () if profile is not None and workers is None else ("--workers", str(workers or os.cpu_count() or 1))
    many = (*common, *counted, *placed)
    tracked = [option for setting in track for option in ("--track", setting)]
    collect, evaluation = recipe.collect, recipe.eval
    plan = [
        Stage("collect", "collect", (
            "--suite", collect.suite, "--episodes", _pairs(collect.episodes), "--tasks", ",".join(collect.episodes),
            "--qa", str(collect.qa), "--qa-test", str(collect.qa_test), *many, "--out", at("data"))),
        Stage("prune", "prune", (at("data"), at("pruned"), "--mode", recipe.prune.mode, *many)),
    ]  # fmt: skip
    teachers = {
        "specialist": (),
        "reasoning": ("--init", at("specialist")),
        "dual": ("--init", at("reasoning"), "--action-teacher", at("specialist")),
    }
    for stage in STAGES:
        data = at("pruned") if stage == "dual" else at("data")
        argv = ("--stage", stage, "--recipe", recipe.name, "--data", data, "--out", at(stage), *teachers[stage])
        plan.append(Stage(stage, "train", (*argv, *common, *placed, *tracked, *_differences(recipe))))
    for name, argv in _evaluations(evaluation, at).items():
        where = ("--suite", collect.suite, "--out", at("eval", name), "--reasoning", evaluation.reasoning)
        plan.append(Stage(f"eval {name}", "eval", (*argv, *where, *many)))
    questions = [option for stage in STAGES for option in ("--policy", f"{stage}={at(stage)}")]
    plan.append(Stage("qa", "eval", (*questions, "--suite", f"qa:{at('data')}", "--out", at("qa"), *many)))
    plan.append(Stage("score", "score", (at("eval", "compared"), "--judge", "rubric")))
    plan.append(Stage("report", "report", (out, "--out", at("report"))))
    return plan


def _evaluations(config: EvalConfig, at: Callable[..., str]) -> dict[str, tuple[str, ...]]:
    """Evaluation folder -> options of `dualvla eval`. Policies with equal episodes share a folder, and its start-up."""

    def options(policies: Sequence[str], episodes: Mapping[str, int], videos: int, *more: str) -> tuple[str, ...]:
        named = [f"{p}={at(p)}" if p in STAGES else p for p in policies]
        chosen = [option for name in named for option in ("--policy", name)]
        tasks = ("--tasks", ",".join(episodes), "--episodes", _pairs(episodes), "--videos", str(videos))
        return (*chosen, *tasks, *more)

    specialist, videos = ["specialist"], config.videos
    return {
        "compared": options([*_POLICIES, "expert-random-object"], config.compared, videos),
        "controls": options(
            specialist, config.controls, 0, "--ablation", "blank-images", "--ablation", "other-instruction"
        ),
    }


def _pairs(counts: Mapping[str, int]) -> str:
    return ",".join(f"{name}={count}" for name, count in counts.items())


def _differences(recipe: Recipe) -> list[str]:
    """`--set` options that turn the recipe of that name into this one."""
    return [
        option
        for path, value in _leaves(to_dict(recipe), to_dict(get_recipe(recipe.name)))
        for option in ("--set", f"{path}={json.dumps(value)}")
    ]


def _leaves(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in ours.items():
        if value == theirs.get(name):
            continue
        if isinstance(value, dict) and isinstance(theirs.get(name), dict) and value.keys() == theirs[name].keys():
            yield from _leaves(value, theirs[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def policies(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Policy -> success per task, VLA Score and its parts, question accuracy, tokens a step, inference time (ms)."""
    evaluated, scored, asked = (results[stage]["policies"] for stage in ("eval compared", "score", "qa"))
    return {
        name: {
            "tasks": evaluated[name]["tasks"],
            "vla_score": scored[name],
            "qa": asked[name]["tasks"]["all"] if name in asked else None,
            "reasoning_tokens_per_step": evaluated[name]["reasoning_tokens_per_step"],
            "infer_ms": evaluated[name]["infer_ms"],
        }
        for name in _POLICIES
    }


def controls(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the specialist must beat: control -> success per task."""
    found = [results[f"eval {folder}"]["policies"] for folder in ("compared", "controls")]
    return {name: p["tasks"] for group in found for name, p in group.items() if name not in _POLICIES}


def render(result: Mapping[str, Any]) -> str:
    """The table of a run, its controls, and where the report is."""
    found, tasks = result["policies"], list(result["policies"]["specialist"]["tasks"])
    header = ["policy", *tasks, "VLA Score", "R", "A", "I", "RA", "QA", "tokens/step", "infer ms"]
    rows = [
        [
            name,
            *(_rate(policy["tasks"].get(task)) for task in tasks),
            *(_number(policy["vla_score"][part]) for part in ("score", "R", "A", "I", "RA")),
            _rate(policy["qa"]),
            _number(policy["reasoning_tokens_per_step"]),
            _number(policy["infer_ms"]),
        ]
        for name, policy in found.items()
    ]
    controls_header = ["control", *sorted({task for c in result["controls"].values() for task in c})]
    controls_rows = [
        [name, *(_rate(per_task.get(task)) for task in controls_header[1:])]
        for name, per_task in result["controls"].items()
    ]
    note = "success % [95 % Wilson interval] n; VLA Score and its parts x100 (rubric judge)"
    return "\n".join(
        [
            table(f"recipe {result['recipe']}: {note}", header, rows, width=240),
            table("controls: what the specialist has to beat", controls_header, controls_rows),
            f"{result['wall_s'] / 60:.1f} min of work, at most {result['peak_pss_mb'] / 1024:.1f} GB of memory",
            f"report: {result['report']}",
        ]
    )


def _rate(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{100 * found['rate']:.0f} [{100 * found['low']:.0f}, {100 * found['high']:.0f}] {found['n']}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


@contextlib.contextmanager
def _peak_memory() -> Iterator[Callable[[], float]]:
    """Yields a function: the largest sum of PSS (MB) of this process and all under it since then."""
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], _tree_pss_mb())
            if stop.wait(_SAMPLE_EVERY_S):
                return

    thread = threading.Thread(target=watch, name="memory", daemon=True)
    thread.start()
    try:
        yield lambda: peak[0]
    finally:
        stop.set()
        thread.join()


def _tree_pss_mb() -> float:
    import psutil

    this = psutil.Process()
    total = 0
    for process in [this, *this.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # it may just have ended
            total += process.memory_full_info().pss
    return total / 2**20
