"""What the rollout browser reads: an index of all episodes, and one small script of data an episode.

Scripts, not JSON: a page opened from disk may load a script but fetch nothing. They only pass JSON to the page, and the
page shows its texts as text. Knows evaluation folders; nothing of how the browser looks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dualvla.io import dataset
from dualvla.schema import ACTION_SPACES
from dualvla_eval import results
from dualvla_eval.report.gather import Episode, Gathered
from dualvla_eval.report.leaderboard import PARTS, Palette

INDEX = "data/index.js"

_COLUMNS = ("step", "action", "ee_pose", "gripper", "reasoning", "keyframe", "events", "state", "infer_ms")
_SCHEMA_SIZES = {space.size: space.dimensions for space in ACTION_SPACES.values()}
_MOVED_M = 0.002  # an object that stays within this is drawn once


def data_file(episode: Episode) -> str:
    return f"data/{episode.id}.js"


def video_file(episode: Episode) -> str | None:
    return f"videos/{episode.id}.mp4" if episode.row["video"] else None


def index_script(found: Gathered, palette: Palette) -> str:
    """One row an episode, as columns and rows, to stay small: about 200 bytes each."""
    columns = (
        "id", "suite", "task", "variant", "episode", "policy", "control", "instruction", "success", "stop", "failure",
        "steps", "score", *PARTS, "unjudged", "video",
    )  # fmt: skip
    controls = {p.label for p in found.policies if p.control}
    rows = [_index_row(e, e.policy in controls) for e in found.episodes]
    assert all(len(row) == len(columns) for row in rows)
    return f"report.index({_json({'columns': columns, 'rows': rows, 'colors': palette.to_dict()})});\n"


def _index_row(episode: Episode, control: bool) -> list[Any]:
    row, judged = episode.row, episode.judged
    scores = [None if judged is None else judged[k] for k in ("score", *PARTS)]
    return [
        episode.id, episode.evaluation.suite, row["task"], row["variant"], row["episode_id"], episode.policy, control,
        row["instruction"], row["success"], row["stop_reason"], row["failure"], row["steps"],
        *(_rounded(100 * v if i == 0 else v, 2) if v is not None else None for i, v in enumerate(scores)),
        episode.score is not None and judged is None, video_file(episode) is not None,
    ]  # fmt: skip


def rollout_script(episode: Episode) -> str:
    """All that the viewer shows of one episode. Raises: DataError if its trajectory is missing or damaged."""
    about = {"hz": episode.evaluation.control_hz, "judge": episode.evaluation.judge, "score": _score(episode)}
    url = results.trajectory_url(episode.evaluation.folder, episode.row)
    steps = dataset.read_table(url, _COLUMNS).to_pylist() if results.has_trajectory(episode.row) else []
    return f"report.rollout({_json(episode.id)},{_json({**about, **_steps(steps)})});\n"


def _steps(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """T steps as columns; poses and objects have T + 1 entries: the last is where the last action led.

    texts: [step, text] wherever the text in force changes. fresh: steps at which one was newly written.
    """
    acted = steps[:-1]
    size = len(acted[0]["action"]) if acted else 0
    texts: list[tuple[int, str | None]] = []
    for t, step in enumerate(acted):
        if not texts or texts[-1][1] != step["reasoning"]:
            texts.append((t, step["reasoning"]))
    return {
        "steps": len(acted),
        "dimensions": _SCHEMA_SIZES.get(size, [f"a{i}" for i in range(size)]),
        "actions": [[_rounded(v, 4) for v in s["action"]] for s in acted],
        "tool": [[_rounded(v, 4) for v in s["ee_pose"][:3]] for s in steps],
        "gripper": [[_rounded(v, 2) for v in s["gripper"]] for s in steps],
        "texts": texts,
        "fresh": [t for t, s in enumerate(acted) if s["keyframe"]],
        "events": [[t, event] for t, s in enumerate(acted) for event in s["events"]],
        "infer_ms": [None if s["infer_ms"] is None else _rounded(s["infer_ms"], 1) for s in acted],
        "objects": _objects([json.loads(s["state"]) for s in steps]),
    }


def _objects(states: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where things were, seen from above: {name, color, path: [[x, y], ...]}, one place if it never moved."""
    if not states or "objects" not in states[0]:
        return []
    found = []
    for i, first in enumerate(states[0]["objects"]):
        path = [[_rounded(v, 3) for v in state["objects"][i]["position"][:2]] for state in states]
        moved = any(abs(x - path[0][0]) + abs(y - path[0][1]) > _MOVED_M for x, y in path)
        found.append({"name": first["name"], "color": first.get("color"), "path": path if moved else path[:1]})
    return found


def _score(episode: Episode) -> dict[str, Any] | None:
    """The verdict with its reasons, and what a model judge wrote and was shown."""
    if episode.score is None:
        return None
    s = episode.score
    return {
        **{part: s[part] for part in PARTS},
        "score": s["score"],
        "unjudged": s["unjudged"],
        "silent": s["without_reasoning"],
        "reasons": s["explanation"],
        "judge": s["judge"] or episode.evaluation.judge,
        "rationale": s["rationale"] or "",
        "examples": s["examples"],
        "judge_success": s["judge_success"],
    }


def _rounded(value: float, digits: int) -> float:
    return round(float(value), digits) + 0.0  # without -0.0


def _json(value: Any) -> str:
    """JSON that means the same wherever a script may stand: no tag, comment or line separator can end it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e")
