"""`dualvla eval`: rollouts of policies on a suite, or questions of a data set. Knows the command line only."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command
from dualvla_cluster.resources import add_profile, apply_profile

_ABLATIONS = ("none", "blank-images", "other-instruction")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy",
        action="append",
        required=True,
        metavar="[NAME=]SOURCE",
        help="a checkpoint folder, expert, random, expert-random-object, or ws://host:port; may be given several "
        "times. NAME is what the results call it (default: the folder's name)",
    )
    parser.add_argument(
        "--suite",
        action="append",
        required=True,
        metavar="NAME | qa:[NAME=]PATH[#METRIC]",
        help="blocks, or questions: a data set folder (its held-out ones) or a tab-separated file as VLMEvalKit has "
        "them; METRIC: choice, exact, vqa or anls (default: as the content says). qa: may be given several times",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the evaluation folder; resumes what is there")
    parser.add_argument("--tasks", metavar="A,B", help="tasks to evaluate (default: all of the suite)")
    parser.add_argument(
        "--episodes",
        default="",
        metavar="N | TASK=N,...",
        help="numbered episodes per task (default: what the suite fixes)",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="worker processes; changes no outcome")
    add_profile(parser)
    parser.add_argument("--envs-per-worker", type=int, default=5, help="environments that share one forward pass")
    parser.add_argument(
        "--videos",
        default="2",
        metavar="N | all",
        help="film that many of the first episodes of each task; a model judge sees filmed episodes only",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the policies' randomness, never of the episodes")
    parser.add_argument(
        "--ablation",
        choices=_ABLATIONS,
        default="none",
        help="control experiment: grey images, or the instruction of another object of the scene",
    )
    parser.add_argument(
        "--reasoning",
        default="auto",
        metavar="auto | never | every:K",
        help="when a checkpoint writes reasoning: when it decides to, never, or every K control steps",
    )


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla.errors import UsageError
    from dualvla_eval import policies

    apply_profile(arguments, "eval")
    for option in ("workers", "envs_per_worker"):
        if getattr(arguments, option) < 1:
            raise UsageError(f"--{option.replace('_', '-')} must be 1 or more.", "leave it out for the default")
    refs = [policies.parse_policy(text, arguments.ablation) for text in arguments.policy]
    asks = [suite.startswith("qa:") for suite in arguments.suite]
    if all(asks):
        from dualvla_eval.qa_suite import run_questions

        summary = run_questions(arguments.out, arguments.suite, refs, workers=arguments.workers)
    elif len(asks) > 1:
        raise UsageError(
            f"Suites {', '.join(arguments.suite)} in one call.", "several suites of questions, or one of rollouts"
        )
    else:
        from dualvla_eval.suites import get_suite
        from dualvla_eval.sweep import SweepConfig, parse_tasks, run_sweep

        suite = get_suite(arguments.suite[0])
        tasks = parse_tasks(suite, arguments.tasks, arguments.episodes)
        config = SweepConfig(
            tasks=tasks,
            seed=arguments.seed,
            reasoning=arguments.reasoning,
            envs_per_worker=arguments.envs_per_worker,
            videos_per_task=_videos(arguments.videos, max(tasks.values())),
        )
        summary = run_sweep(arguments.out, suite, refs, config, workers=arguments.workers)
    return {"ok": True, "out": arguments.out, **summary}


def _videos(text: str, episodes: int) -> int:
    """Raises: UsageError."""
    from dualvla.errors import UsageError

    if text == "all":
        return episodes
    if not text.isdecimal():
        raise UsageError(f"--videos '{text}' is no number of episodes.", "write --videos 2, or --videos all")
    return int(text)


def _render(result: Mapping[str, Any]) -> str:
    from dualvla.console import table

    rows = [
        [policy, task, f"{t['successes']}/{t['n']}", f"{t['rate']:.1%}", f"{t['low']:.1%} .. {t['high']:.1%}"]
        for policy, of_policy in result["policies"].items()
        for task, t in of_policy["tasks"].items()
    ]
    title = f"Suite {result['suite']} (95 % intervals)" + (", unchanged" if result["skipped"] else "")
    return f"{table(title, ['policy', 'task', 'solved', 'rate', 'interval'], rows)}\n{result['out']}"


COMMAND = Command("roll out policies on a suite, or ask the questions of a data set", _configure, _run, _render)
