"""`dualvla detector train|eval`: the command line of the learned event-boundary detector."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="train|eval")
    train = actions.add_parser("train", help="learn from episodes with events or annotations")
    train.add_argument("data", nargs="+", metavar="DATA", help="data set folders")
    train.add_argument("out", metavar="OUT", help="detector folder to make")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the defaults, as in network.dim=128"
    )
    judge = actions.add_parser("eval", help="F1 of its boundaries beside methods that need no training")
    judge.add_argument("model", metavar="MODEL", help="detector folder")
    judge.add_argument("data", nargs="+", metavar="DATA", help="data set folders; of one trained on, its test share")
    for each in (train, judge):
        each.add_argument(
            "--labels",
            action="append",
            default=[],
            metavar="FILE",
            help="annotations of `dualvla annotate` to use in place of the events; repeat it for several data sets",
        )
        each.add_argument("--device", default="cpu", help="where PyTorch computes: cpu, cuda")
        for name, text in (("--json", "print the result as JSON on stdout"), ("--verbose", "log more (to stderr)")):
            each.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=text)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.action == "eval":
        from dualvla_pipelines.detector_eval import evaluate_detector

        result = evaluate_detector(arguments.model, arguments.data, arguments.labels, arguments.device)
    else:
        from dualvla.config import override
        from dualvla_pipelines.detector import DetectorConfig, train_detector

        config = override(DetectorConfig(), arguments.set)
        result = train_detector(arguments.data, arguments.out, config, arguments.labels, arguments.device)
    return {"action": arguments.action, **result}


def _render(result: Mapping[str, Any]) -> str:
    if result["action"] == "eval":
        from dualvla_pipelines.detector_eval import render

        return render(result)
    counts = ", ".join(
        f"{result['episodes'][split]} episodes with {result['boundaries'][split]} boundaries to {verb}"
        for split, verb in (("train", "learn from"), ("validation", "validate on"))
    )
    agreement = ", ".join(f"{name} {value:.3f}" for name, value in result["validation"].items())
    skipped = " (finished before: nothing to do)" if result["skipped"] else ""
    return f"{result['out']}: {counts}{skipped}\nvalidation: {agreement}, at threshold {result['threshold']:.3f}"


COMMAND = Command("train and judge the event-boundary detector", _configure, _run, _render)
