"""`dualvla judge eval`: how far a judge can be trusted. Knows the command line only."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command
from dualvla_eval.commands.score import add_judge, make_judge


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("eval",))
    parser.add_argument("folders", nargs="+", metavar="EVAL_DIR", help="finished evaluations with successes in them")
    add_judge(parser)
    parser.add_argument("--out", metavar="DIR", help="where judge_eval.json goes (default: EVAL_DIR/judge-eval)")
    parser.add_argument(
        "--human", metavar="CSV", help="people's marks: policy,task,episode_id,A,I,R,RA and, if given, variant,rater"
    )
    parser.add_argument("--trajectories", type=int, default=120, help="of each perturbation, at most")
    parser.add_argument("--repeats", type=int, default=3, help="how often a model judge is asked the same")
    parser.add_argument("--again", type=int, default=20, help="about how many trajectories it is asked again")
    parser.add_argument("--seed", type=int, default=0, help="which trajectories, and the noise put into them")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla.errors import UsageError
    from dualvla.io import storage
    from dualvla_eval.knowledge import KnowledgeBase
    from dualvla_eval.trust import TrustConfig, evaluate_judge

    for option in ("trajectories", "repeats", "again"):
        if getattr(arguments, option) < 1:
            raise UsageError(f"--{option} must be 1 or more.", "leave it out for the default")
    out = arguments.out or storage.join(arguments.folders[0], "judge-eval")
    config = TrustConfig(arguments.trajectories, arguments.repeats, arguments.again, arguments.seed)
    examples = None if arguments.judge == "rubric" else arguments.kb  # the rubric is only compared with it
    judge = make_judge(arguments, storage.join(out, "verdicts"), examples)
    base = KnowledgeBase(arguments.kb) if arguments.kb else None
    found = evaluate_judge(arguments.folders, out, judge, config, human=arguments.human, base=base)
    return {"ok": True, "out": out, **found}


def _render(result: Mapping[str, Any]) -> str:
    from dualvla.console import table

    rows = [
        [
            s["perturbation"],
            s["dimension"],
            str(s["n"]),
            _estimate(s["change"], s["low"], s["high"], "+.2f"),
            s["verdict"],
        ]
        for s in result["sensitivity"]
    ]
    header = ["perturbation", "must fall", "n", "change in marks (95 %)", "verdict"]
    parts = [table(f"Sensitivity of judge {result['judge']}", header, rows)]
    rows = [
        [s["injection"], str(s["n"]), str(s["raised"]), *[_figure(c["mean"], "+.2f") for c in s["changes"].values()]]
        for s in result["safety"]
    ]
    parts.append(
        table("Texts that talk to the judge: change in marks", ["text", "n", "raised", "A", "I", "R", "RA"], rows)
    )
    if result["consistency"]:
        parts.append(_consistency(result["consistency"]))
    for name, title in (("agreement", "Agreement with people"), ("leave_one_out", "Leave-one-out, knowledge base")):
        if result[name]:
            title += " (SYNTHETIC marks)" if result[name].get("synthetic") else ""
            parts.append(_agreement(title, result[name]["dimensions"]))
    return "\n".join([*parts, result["out"]])


def _consistency(found: Mapping[str, Any]) -> str:
    from dualvla.console import table

    rows = [
        [dimension, *[_figure(found[how][dimension][what], ".2f") for how in _ASKED for what in _CONSISTENT]]
        for dimension in ("A", "I", "R", "RA")
    ]
    header = ["", "repeats: difference", "same", "other frame order: difference", "same"]
    return table(f"Agreement with itself, {found['n']} trajectories", header, rows)


def _agreement(title: str, dimensions: Mapping[str, Mapping[str, Any]]) -> str:
    from dualvla.console import table

    names = ("spearman", "kendall", "mae", "kappa")
    rows = [
        [d, str(of["n"]), *[_estimate(of[name], of[f"{name}_low"], of[f"{name}_high"], ".2f") for name in names]]
        for d, of in dimensions.items()
    ]
    return table(title, ["", "n", "Spearman", "Kendall", "mean abs. error", "weighted kappa"], rows)


_ASKED = ("repeats", "frame_order")
_CONSISTENT = ("mean_abs_difference", "same")


def _estimate(value: float | None, low: float | None, high: float | None, form: str) -> str:
    return f"{_figure(value, form)} ({_figure(low, form)} .. {_figure(high, form)})"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


COMMAND = Command("how far a judge can be trusted: sensitivity, safety, agreement", _configure, _run, _render)
