"""`dualvla runs list|lineage|clean`: what ran on what, where it lies, what it cost; ancestors; old folders away."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from dualvla.cli import Command


def _configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|lineage|clean")
    listing = actions.add_parser("list", help="every folder that a command made below the roots")
    listing.add_argument("roots", nargs="+", metavar="ROOT", help="folder or URL")
    lineage = actions.add_parser(
        "lineage", help="what a folder, or a served policy, was made from, back to the raw rows"
    )
    lineage.add_argument("target", help="a folder, or ws://HOST:PORT of an endpoint")
    lineage.add_argument("--root", action="append", default=[], help="where to look for ancestors (default: beside it)")
    lineage.add_argument("--key", help="of the endpoint")
    lineage.add_argument("--verify", action="store_true", help="also read every file and compare it with its hash")
    clean = actions.add_parser("clean", help="show what the retention rules let go; with --yes, delete it")
    clean.add_argument("roots", nargs="+", metavar="ROOT", help="folder or URL")
    clean.add_argument("--keep", type=int, default=3, help="newest checkpoints of each stage and folder")
    clean.add_argument("--cache-days", type=float, default=14.0, help="teacher caches untouched for longer go")
    clean.add_argument("--unfinished-days", type=float, default=7.0, help="folders unfinished for longer go")
    clean.add_argument("--yes", action="store_true", help="delete, instead of only showing")
    for action in (listing, lineage, clean):
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON")


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"list": _list, "lineage": _lineage, "clean": _clean}[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_pipelines import lineage
    from dualvla_pipelines.run import costs

    records = lineage.find(arguments.roots)
    return {
        "runs": [
            {
                "folder": r.folder, "kind": r.kind, "finished": r.finished, "at": r.at, "code": r.code_version,
                "digest": r.digest, "inputs": r.inputs, "what": lineage.describe(r),
                **(costs(r.folder) if r.kind == "run" else {}),
            }
            for r in records
        ]
    }  # fmt: skip


def _lineage(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla.errors import DataError
    from dualvla_pipelines import lineage

    target = arguments.target
    if "://" in target and target.startswith(("ws", "http")):
        version = _served_version(target, arguments.key)
        records = lineage.find(arguments.root or ["."])
        record = lineage.served(version, records)
    else:
        target = target.rstrip("/")
        found = lineage.read(target)
        if found is None or not found.finished:
            raise DataError(f"'{target}' is not a finished folder.", "run the command that makes it again: it resumes")
        record = found
        records = lineage.find(arguments.root or [target.rsplit("/", 1)[0] if "/" in target else "."])
    chain = [
        {
            "depth": depth, "role": node.role, "digest": node.digest,
            "folder": node.record and node.record.folder, "kind": node.record and node.record.kind,
            "code": node.record and node.record.code_version,
            "what": lineage.what(node), "raw": node.raw,
            "damaged": lineage.damaged(node.record) if node.record and arguments.verify else [],
        }
        for depth, node in lineage.walk(lineage.lineage(record, records))
    ]  # fmt: skip
    whole = all((link["folder"] or link["raw"]) and not link["damaged"] for link in chain)
    return {"target": arguments.target, "lineage": chain, "ok": whole}


def _served_version(url: str, key: str | None) -> str:
    import json
    import urllib.error
    import urllib.request

    from dualvla.errors import ServerError

    base = url.replace("ws", "http", 1) if url.startswith("ws") else url
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{base.rstrip('/')}/v1/models", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["models"][0]["version"]
    except (urllib.error.URLError, OSError) as error:
        raise ServerError(
            f"'{url}' does not say which model it serves: {error}.", "check the address and --key"
        ) from error


def _clean(arguments: argparse.Namespace) -> dict[str, Any]:
    from dualvla_pipelines import lineage, retention

    rules = retention.Retention(arguments.keep, arguments.cache_days, arguments.unfinished_days)
    doomed = retention.choose(lineage.find(arguments.roots), rules)
    if arguments.yes:
        retention.delete(doomed)
    return {
        "deleted": arguments.yes,
        "folders": [{"folder": d.record.folder, "reason": d.reason, "bytes": d.size_bytes} for d in doomed],
    }


def _render(result: Mapping[str, Any]) -> str:
    from dualvla.console import table

    if "runs" in result:
        rows = [
            [r["folder"], r["kind"], "finished" if r["finished"] else "unfinished", _time(r["at"]), r["code"],
             r["what"], f"{r['wall_s'] / 60:.1f} min" if r.get("wall_s") else "-",
             f"${r['usd']:.2f}" if r.get("usd") else "-"]
            for r in result["runs"]
        ]  # fmt: skip
        header = ["folder", "kind", "state", "at", "code", "what", "work", "cost"]
        return table(f"{len(rows)} folders", header, rows, width=220)
    if "lineage" in result:
        lines = [f"{result['target']} was made from"]
        for link in result["lineage"]:
            state = f"  DAMAGED: {', '.join(link['damaged'])}" if link["damaged"] else ""
            where = link["folder"] or "?"
            lines.append(
                f"{'   ' * link['depth']}{link['role']}: {where} ({link['what']}) sha256 {link['digest'][:12]}{state}"
            )
        return "\n".join(lines)
    rows = [[f["folder"], f["reason"], f"{f['bytes'] / 1e6:.1f} MB"] for f in result["folders"]]
    title = "deleted" if result["deleted"] else "would go; add --yes to delete"
    return f"{table('retention', ['folder', 'why', 'size'], rows)}\n{len(rows)} folders: {title}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "minutes")


COMMAND = Command("what ran on what, at what cost; lineage of a policy; retention", _configure, _run, _render)
