"""`dualvla eval`: rollouts of policies on a suite, or questions of a data set. Knows the command line only."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dualvla.cli import Command
from dualvla_cluster.resources import add_profile, apply_profile

if TYPE_CHECKING:
    from dualvla_eval.policies import PolicyRef

_ABLATIONS = ("none", "blank-images", "other-instruction")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy",
        action="append",
        required=True,
        metavar="[NAME=]SOURCE[?KEY=VALUE&...]",
        help="a checkpoint folder, expert, random, expert-random-object, ws://host:port or serve:APP; may be given "
        "several times. NAME is what the results call it (default: the folder's name). KEY=VALUE: how a checkpoint is "
        "asked, such as latent_reuse=4 (docs/models.md)",
    )
    parser.add_argument(
        "--suite",
        action="append",
        required=True,
        metavar="NAME | qa:[NAME=]PATH[#METRIC]",
        help="blocks, simpler-widowx, simpler-google-vm, simpler-google-va, maniskill2, maniskill2-simpler-widowx, "
        "maniskill2-simpler-google (docs/maniskill2.md), or questions: a data set folder (its held-out ones) or a "
        "tab-separated file as VLMEvalKit has them; METRIC: choice, exact, vqa or anls (default: "
        "as the content says). qa: may be given several times",
    )
    parser.add_argument(
        "--assets",
        metavar="DIR",
        help="SimplerEnv's files (default: DUALVLA_ASSETS, or the cache), or maniskill2's (default: MS2_ASSET_DIR)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the evaluation folder; resumes what is there")
    parser.add_argument("--tasks", metavar="A,B", help="tasks to evaluate (default: all of the suite)")
    parser.add_argument("--variants", metavar="A,B", help="variants of the tasks (default: all of the suite)")
    parser.add_argument(
        "--episodes",
        default="",
        metavar="N | TASK=N,...",
        help="numbered episodes per task and variant (default: what the suite fixes)",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="simulator processes, at most; changes no outcome"
    )
    add_profile(parser)
    parser.add_argument(
        "--envs-per-worker",
        type=int,
        default=4,
        help="episodes in flight in each: some simulate while others wait for a policy; changes no outcome",
    )
    parser.add_argument(
        "--hosts",
        type=int,
        help="processes that hold checkpoints (default: one a GPU; without a GPU as many as workers, on a cluster one)",
    )
    parser.add_argument(
        "--max-batch",
        type=int,
        metavar="N",
        help="observations in one forward pass, as they come; a network's last bits depend on its batch, so that only "
        "1 repeats to the bit (default: 1 on a CPU, 16 on a GPU)",
    )
    parser.add_argument(
        "--videos",
        default="2",
        metavar="N | all | failures",
        help="film that many of the first episodes of each task, all, or all and keep those that were not solved; a "
        "model judge sees filmed episodes only",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the policies' randomness, never of the episodes")
    parser.add_argument("--seeds", metavar="A,B", help="several of them: every episode is run with each")
    parser.add_argument(
        "--convention",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="how replies become actions, recorded in the results: termination=first_success|original, "
        "sticky_gripper=STEPS, ensemble=PREDICTIONS, proprioception=given|withheld (docs/evaluation.md)",
    )
    parser.add_argument(
        "--step-limit", type=float, default=120.0, metavar="S", help="seconds for one reply, or one simulated step"
    )
    parser.add_argument("--episode-limit", type=float, default=1800.0, metavar="S", help="seconds for an episode")
    parser.add_argument(
        "--patience", type=float, default=60.0, metavar="S", help="seconds for which an endpoint may be away"
    )
    parser.add_argument(
        "--ablation",
        action="append",
        choices=_ABLATIONS,
        help="control experiment: grey images, or the instruction of another object of the scene; repeat it for several"
        " (default: none)",
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
    for option in ("workers", "envs_per_worker", "hosts", "max_batch"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UsageError(f"--{option.replace('_', '-')} must be 1 or more.", "leave it out for the default")
    ablations = arguments.ablation or ["none"]
    refs = [policies.parse_policy(text, ablation) for text in arguments.policy for ablation in ablations]
    asks = [suite.startswith("qa:") for suite in arguments.suite]
    if all(asks):
        from dualvla_eval.qa_suite import run_questions

        summary = run_questions(arguments.out, arguments.suite, refs, workers=arguments.workers)
    elif len(asks) > 1:
        raise UsageError(
            f"Suites {', '.join(arguments.suite)} in one call.", "several suites of questions, or one of rollouts"
        )
    else:
        summary = _roll_out(arguments, refs)
    return {"ok": True, "out": arguments.out, **summary}


def _roll_out(arguments: argparse.Namespace, refs: Sequence[PolicyRef]) -> dict[str, Any]:
    from dualvla_eval.conventions import Conventions, parse
    from dualvla_eval.rollout import Limits
    from dualvla_eval.suites import get_suite
    from dualvla_eval.sweep import Machinery, SweepConfig, parse_seeds, parse_tasks, parse_videos, run_sweep

    suite = get_suite(arguments.suite[0], arguments.assets)
    tasks = parse_tasks(suite, arguments.tasks, arguments.episodes)
    films, only_failures = parse_videos(arguments.videos, tasks)
    variants = tuple(arguments.variants.split(",")) if arguments.variants else None
    suite.check([t for t in suite.tasks if t.name in tasks and (variants is None or t.variant in variants)])
    config = SweepConfig(
        tasks=tasks,
        variants=variants,
        seeds=parse_seeds(arguments.seeds) if arguments.seeds else (arguments.seed,),
        reasoning=arguments.reasoning,
        conventions=parse(Conventions(**suite.default_conventions), arguments.convention),
        max_batch=arguments.max_batch,
        videos_per_task=films,
        only_failures=only_failures,
    )
    machinery = Machinery(
        workers=arguments.workers,
        envs_per_worker=arguments.envs_per_worker,
        hosts=arguments.hosts,
        limits=Limits(arguments.step_limit, arguments.episode_limit),
        patience_s=arguments.patience,
    )
    return run_sweep(arguments.out, suite, refs, config, machinery=machinery)


def _render(result: Mapping[str, Any]) -> str:
    from dualvla.console import table

    rows = [
        [policy, task, f"{t['successes']}/{t['n']}", f"{t['rate']:.1%}", f"{t['low']:.1%} .. {t['high']:.1%}"]
        for policy, of_policy in result["policies"].items()
        for task, t in of_policy["tasks"].items()
    ]
    title = f"Suite {result['suite']} (95 % intervals)" + (", unchanged" if result["skipped"] else "")
    parts = [table(title, ["policy", "task", "solved", "rate", "interval"], rows)]
    if result.get("paired"):
        parts.append(_paired(result["paired"]))
    if result.get("reference"):
        parts.append(_reference(result["reference"]))
    substituted = result.get("assets", {}).get("substituted")
    if substituted:
        parts.append(f"with substituted assets, so not comparable: {', '.join(substituted)}")
    return "\n".join([*parts, result["out"]])


def _paired(pairs: Sequence[Mapping[str, Any]]) -> str:
    from dualvla.console import table

    rows = [
        [
            f"{p['a']} - {p['b']}",
            str(p["episodes"]),
            f"{p['only_a']} / {p['only_b']}",
            f"{p['difference']:+.1%}",
            f"{p['low']:+.1%} .. {p['high']:+.1%}",
            f"{p['p']:.2g}",
            f"{p['p_holm']:.2g}",
        ]
        for p in pairs
    ]
    header = ["pair", "episodes", "only one solved", "difference", "interval", "McNemar p", "p (Holm)"]
    return table("The same episodes, two policies", header, rows)


def _reference(reference: Mapping[str, Any]) -> str:
    from dualvla.console import table

    cells = reference["cells"]
    rows = [[f"{name} (here)", *(_percent(of.get(cell)) for cell in cells)] for name, of in reference["ours"].items()]
    rows += [[row["model"], *(_percent(row["values"].get(cell)) for cell in cells)] for row in reference["published"]]
    return table("Success in percent, ours above the published rows", ["policy", *cells], rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


COMMAND = Command("roll out policies on a suite, or ask the questions of a data set", _configure, _run, _render)
