"""`dualvla score`: VLA Score of an evaluation. Knows the command line only."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from dualvla.cli import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="EVAL_DIR", help="a finished evaluation folder; scores are written into it")
    add_judge(parser)


def add_judge(parser: argparse.ArgumentParser) -> None:
    """The options of every command that judges."""
    parser.add_argument(
        "--judge",
        default="rubric",
        help="who judges: rubric (deterministic, free), openai:MODEL (an OpenAI-compatible endpoint; its key from "
        "OPENAI_API_KEY), local:CHECKPOINT (a Hugging Face image-text-to-text model, on Ray)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of a model judge: frames=8, concurrency=16, max_calls=1000, max_tokens=2000000, "
        "openai.base_url=http://HOST/v1, local.gpus=1, ... (docs/judges.md lists all)",
    )
    parser.add_argument("--kb", metavar="DIR", help="knowledge base whose scored examples a model judge is shown")
    parser.add_argument(
        "--text-embedder", default="built-in", help="finds similar tasks: built-in, hf:NAME, clip:NAME or api:MODEL"
    )
    parser.add_argument("--image-embedder", default="built-in", help="finds similar scenes: built-in or clip:NAME")


def make_judge(arguments: argparse.Namespace, store: str, knowledge: str | None = None) -> Any:
    """The judge of `add_judge`'s options; store: where a model's verdicts are kept; knowledge: where examples lie."""
    from dualvla_eval.judges import get_judge

    return get_judge(
        arguments.judge,
        arguments.set,
        store=store,
        knowledge=knowledge,
        text_embedder=arguments.text_embedder,
        image_embedder=arguments.image_embedder,
    )


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla.io import storage
    from dualvla_eval.score import require_rollouts, score_folder

    require_rollouts(arguments.folder)
    judge = make_judge(arguments, storage.join(arguments.folder, "verdicts"), arguments.kb)
    return {"ok": True, "out": arguments.folder, **score_folder(arguments.folder, judge)}


def _render(result: Mapping[str, Any]) -> str:
    from dualvla.console import table

    rows = [
        [
            name,
            str(p["n"]),
            *[_figure(p[part]) for part in ("R", "A", "I", "RA", "success")],
            f"{_figure(p['score'])} ({_figure(p['low'])} .. {_figure(p['high'])})",
            str(p["without_reasoning"]) if p["kind"] == "reasoning" else "-",
            f"{p['unjudged']} ({_figure(p['worst'])} .. {_figure(p['best'])})" if p["unjudged"] else "0",
        ]
        for name, p in result["policies"].items()
    ]
    header = ["policy", "n", "R", "A", "I", "RA", "success", "VLA Score (95 %)", "silent", "unjudged (worst .. best)"]
    title = f"VLA Score, judge {result['judge']}" + (", unchanged" if result["skipped"] else "")
    again = f"{result['try_again']} got no answer from the judge: the same command asks again, for them alone"
    notes = [again] if result["try_again"] else []
    return "\n".join([table(title, header, rows), *_differences(result["differences"]), *notes, result["out"]])


def _differences(differences: list[Mapping[str, Any]]) -> list[str]:
    from dualvla.console import table

    if not differences:
        return []
    parts = list(differences[0]["parts"])
    rows = [
        [
            f"{d['a']} - {d['b']}",
            str(d["n"]),
            f"{d['difference']:+.1f} ({d['low']:+.1f} .. {d['high']:+.1f})",
            *[f"{d['parts'][part]:+.1f}" for part in parts],
        ]
        for d in differences
    ]
    header = ["same episodes", "n", "difference (95 %)", *(f"by {part}" for part in parts)]
    return [table("Differences in VLA Score, and where they come from", header, rows)]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


COMMAND = Command("VLA Score of an evaluation: reasoning, action, intention, alignment", _configure, _run, _render)
