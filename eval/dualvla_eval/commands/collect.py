"""`dualvla collect`: demonstrations with reasoning and questions about scenes, as a data set folder."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command
from dualvla.errors import UsageError
from dualvla_cluster.resources import add_profile, apply_profile


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", default="blocks", help="which suite's experts demonstrate")
    parser.add_argument("--tasks", help="comma-separated tasks (default: all of the suite, or those in --episodes)")
    parser.add_argument(
        "--episodes", default="100", help="demonstrations per task: a number, or task=number,task=number"
    )
    parser.add_argument(
        "--variant",
        help="look of the scenes, by default the suite's first; blocks: base, second (camera, light), varied",
    )
    parser.add_argument("--qa", type=int, default=0, help="questions about scenes, split train")
    parser.add_argument("--qa-test", type=int, help="held-out questions, split test (default: a fifth of --qa)")
    parser.add_argument("--assets", metavar="DIR", help="SimplerEnv's files (default: DUALVLA_ASSETS, or the cache)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes and other noise")
    parser.add_argument("--workers", type=int, default=2, help="simulator processes; changes no result")
    add_profile(parser)
    parser.add_argument("--out", required=True, help="data set folder (local or URL)")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_eval.collect import CollectConfig, collect
    from dualvla_eval.suites import get_suite

    apply_profile(arguments, "collect")
    suite = get_suite(arguments.suite, arguments.assets)
    tasks = arguments.tasks.split(",") if arguments.tasks else None
    config = CollectConfig(
        suite=suite.name,
        episodes=parse_episodes(arguments.episodes, tasks, suite.task_names),
        qa=_not_negative(arguments.qa, "--qa"),
        qa_test=_not_negative(arguments.qa // 5 if arguments.qa_test is None else arguments.qa_test, "--qa-test"),
        seed=_not_negative(arguments.seed, "--seed"),
        variant=arguments.variant or suite.variants[0],
    )
    if arguments.workers < 1:
        raise UsageError(f"--workers {arguments.workers} is less than 1.", "pass --workers 1 or more")
    made = collect(config, arguments.out, arguments.workers, arguments.assets)
    return {
        "out": arguments.out,
        "skipped": made.get("skipped", False),
        "episodes": made["episodes"],
        "rows": made["rows_out"],
        "rows_by_task": made["rows_by_task"],
        "failed_attempts": made["failed_attempts"],
    }


def parse_episodes(text: str, tasks: list[str] | None, known: list[str]) -> dict[str, int]:
    """ "100" or "touch=600,pick=400" -> task -> number. Raises: UsageError."""
    if "=" not in text:
        return {task: _number(text) for task in tasks or known}
    counts = {}
    for entry in text.split(","):
        task, _, number = entry.partition("=")
        counts[task.strip()] = _number(number)
    if tasks is not None and set(tasks) != set(counts):
        raise UsageError(f"--tasks {','.join(tasks)} and --episodes {text} name other tasks.", "pass one of them")
    return counts


def _number(text: str) -> int:
    try:
        return _not_negative(int(text), "--episodes")
    except ValueError as error:
        raise UsageError(f"--episodes: '{text}' is not a number.", "write 100, or touch=600,pick=400") from error


def _not_negative(value: int, option: str) -> int:
    if value < 0:
        raise UsageError(f"{option} {value} is negative.", f"pass {option} 0 or more")
    return value


def _render(result: Mapping[str, Any]) -> str:
    from dualvla.console import table

    rows = [
        [source, str(count), str(result["failed_attempts"][source])]
        for source, count in sorted(result["rows_by_task"].items())
    ]
    title = f"{result['episodes']} episodes, {result['rows']} rows in {result['out']}"
    return table(title, ["source", "rows", "failed attempts"], rows)


COMMAND = Command("make demonstrations by scripted experts, and questions about scenes", _configure, _run, _render)
