"""The page of `dualvla kb edit`: watch a rollout, correct its four marks and the rationale, go on to the next.

Knows the knowledge base and the page server; what the page looks like is in `kb_page.html`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from typing import Any

from dualvla.errors import UsageError
from dualvla.webpage import Content, Page
from dualvla_eval.knowledge import Entry, KnowledgeBase


def make_page(base: KnowledgeBase, author: str) -> Page:
    """author: kept with every version that this page saves."""
    if not author.strip():
        raise UsageError("A correction needs the name of who makes it.", "pass --as NAME")
    html = (resources.files("dualvla_eval") / "kb_page.html").read_bytes()

    def entries(query: Mapping[str, Any]) -> Any:
        return {"author": author, "entries": [_summary(e) for e in base.entries()]}

    def entry(query: Mapping[str, Any]) -> Any:
        return _whole(base, base.entry(_id(query)))

    def video(query: Mapping[str, Any]) -> Content:
        return Content(base.video(base.entry(_id(query))), "video/mp4")

    def save(payload: Mapping[str, Any]) -> Any:
        based_on, marks, rationale = (payload.get(name) for name in ("based_on", "marks", "rationale"))
        if not isinstance(based_on, int) or not isinstance(marks, dict) or not isinstance(rationale, str):
            raise UsageError("A correction needs based_on, marks and rationale.", "load the page again")
        return _whole(base, base.revise(_id(payload), based_on, marks, rationale, author))

    return Page(html, get={"entries": entries, "entry": entry, "video": video}, post={"save": save})


def _id(values: Mapping[str, Any]) -> str:
    return str(values.get("id", ""))


def _summary(entry: Entry) -> dict[str, Any]:
    row = entry.row
    return {
        "id": entry.id,
        "policy": row["policy"],
        "task": row["task"],
        "success": row["success"],
        "instruction": row["instruction"],
        "marks": entry.current.marks,
        "reviewed": entry.current.reviewed,
    }


def _whole(base: KnowledgeBase, entry: Entry) -> dict[str, Any]:
    """steps: where a text begins or something happens, for the list beside the film."""
    trajectory = base.trajectory(entry)
    steps = []
    for t in range(trajectory.num_steps):
        text = trajectory.reasoning[t]
        new = text is not None and (t == 0 or text != trajectory.reasoning[t - 1])
        if new or trajectory.events[t]:
            steps.append({"step": t, "text": text if new else None, "events": trajectory.events[t]})
    return {
        **_summary(entry),
        "stop_reason": entry.row["stop_reason"],
        "num_steps": trajectory.num_steps,
        "control_hz": entry.control_hz,
        "steps": steps,
        "versions": [asdict(v) for v in entry.versions],
    }
